"""Reports: from run folders to a table, figures and one self-contained page. Needs no torch."""

from stochastic_depth_lab.errors import ReportError
from stochastic_depth_lab.report.page import write_report
from stochastic_depth_lab.report.runs import Run, read_run, run_folders
from stochastic_depth_lab.report.schedule import schedule_figure, schedule_text
from stochastic_depth_lab.report.study.write import StudyReport, write_study
from stochastic_depth_lab.report.table import text_table

__all__ = [
    "ReportError",
    "Run",
    "StudyReport",
    "read_run",
    "run_folders",
    "schedule_figure",
    "schedule_text",
    "text_table",
    "write_report",
    "write_study",
]
