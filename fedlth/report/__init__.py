"""Tables, statistics, figures and pages from a run folder: the only room that averages."""

from fedlth.report.build import read_results, write_report
from fedlth.report.compare import Comparison, compare
from fedlth.report.diff import diff
from fedlth.report.headline import summary_text

__all__ = ["Comparison", "compare", "diff", "read_results", "summary_text", "write_report"]
