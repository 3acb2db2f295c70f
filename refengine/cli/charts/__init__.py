"""Pictures of memory: SVG in HTML pages that need nothing else, neither script nor font nor network."""

from __future__ import annotations
