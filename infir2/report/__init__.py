"""One self-contained HTML page per run or recipe, and the table of each stage's accuracy."""

from infir2.report.live import follow
from infir2.report.page import write_page, write_report
from infir2.report.read import read_runs
from infir2.report.stages import StageRow, render_stage_table, stage_rows, stage_table
