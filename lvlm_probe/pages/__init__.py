"""Pages: the report of explained answers, and the comparison of methods, each one HTML file that needs no network."""

from lvlm_probe.pages.comparison import Comparison, compare
from lvlm_probe.pages.report_page import report

__all__ = ["Comparison", "compare", "report"]
