"""A run of the suite, told three ways: on a terminal, as JSON, and as one HTML page."""

from __future__ import annotations

from refengine_conformance.report.html import report_html
from refengine_conformance.report.json import report_json
from refengine_conformance.report.text import print_faults, print_report

__all__ = ["print_faults", "print_report", "report_html", "report_json"]
