"""Verb report."""

from collections.abc import Sequence
from pathlib import Path

from infir2.cli.arguments import Parser
from infir2.errors import ConfigError, disk_reason
from infir2.terminal import print_json, print_result


def report(arguments: Sequence[str]) -> None:
    """infir2 report RUN_DIR... [--to FILE]"""
    parser = Parser(
        prog="infir2 report",
        description="Writes one self-contained HTML page: curves, tables, samples.",
    )
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN_DIR",
        help="run directories, one for each stage in order",
    )
    parser.add_argument(
        "--to",
        type=Path,
        metavar="FILE",
        help="page to write, or a directory for report.html (default RUN_DIR/report.html, "
        "several runs: report.html)",
    )
    parser.add_argument("--json", action="store_true", help="print the table of stages as JSON")
    options = parser.parse_args(arguments)
    default = options.runs[0] / "report.html" if len(options.runs) == 1 else Path("report.html")
    page = options.to or default
    from infir2.report import stage_table, write_report

    if page.is_dir():
        page /= "report.html"
    try:
        write_report(options.runs, page)
    except OSError as error:
        raise ConfigError(
            f"--to {page}: the page cannot be written ({disk_reason(error)}); name another file."
        ) from error
    if options.json:
        stages = [row.as_json() for row in stage_table(options.runs)]
        print_json({"report": str(page.resolve()), "stages": stages})
    else:
        print_result(str(page))
