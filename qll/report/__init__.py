"""The report: report.json and one self-contained HTML page.

In: what the rooms measured. Out: JSON data (`build_report`), a page (`render`), a table for the
terminal (`text_table`). Read view.py first: it says what the page shows and from which key.
"""

from qll.report.allocation import plan_text
from qll.report.build import build_report, check_report, read_report
from qll.report.page import render
from qll.report.sections import compression_section, model_section
from qll.report.text import text_table

__all__ = [
    "build_report",
    "check_report",
    "compression_section",
    "model_section",
    "plan_text",
    "read_report",
    "render",
    "text_table",
]
