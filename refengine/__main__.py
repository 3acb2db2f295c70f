"""``python -m refengine`` is the command line."""

from __future__ import annotations

from refengine.cli import main

if __name__ == "__main__":
    main()
