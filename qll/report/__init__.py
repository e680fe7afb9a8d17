"""The report: report.json and one self-contained HTML page.

In: what the rooms measured. Out: JSON data (`build_report`), a page (`render`), a table for the
terminal (`text_table`). Read view.py first: it says what the page shows and from which key.
"""

from qll.report.allocation import plan_text
from qll.report.build import build_report, check_report, read_report
from qll.report.feature_data import page_value, read_features
from qll.report.features import render_features
from qll.report.page import render
from qll.report.sections import compression_section, model_section
from qll.report.text import features_table, text_table

__all__ = [
    "build_report",
    "check_report",
    "compression_section",
    "features_table",
    "model_section",
    "page_value",
    "plan_text",
    "read_features",
    "read_report",
    "render",
    "render_features",
    "text_table",
]
