"""Verb report, and the page that every run writes as it ends."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from infir2.cli.arguments import Parser
from infir2.errors import (
    ConfigError,
    DataError,
    RunMovedError,
    UserError,
    disk_reason,
    first_line,
)
from infir2.terminal import begin_phase, log, print_json, print_result

PAGE = "report.html"
FOLLOW_SECONDS = 10.0
_PAGE_START = b"<!doctype html>"
_AXES = ("step", "tokens", "time")


def report(arguments: Sequence[str]) -> None:
    """infir2 report RUN_DIR... [--to FILE] [--axis AXIS] [--follow]"""
    options = _parser().parse_args(arguments)
    if options.every is not None and not options.follow:
        raise ConfigError("--every is how often --follow writes the page; add --follow.")
    if options.follow and options.json:
        raise ConfigError("--follow and --json exclude each other; remove one.")
    _check_runs(options.runs, options.follow)
    default = options.runs[0] / PAGE if len(options.runs) == 1 else Path(PAGE)
    page = options.to or default
    from infir2.report import follow, read_runs, stage_rows, write_page

    if page.is_dir():
        page /= PAGE
    _check_target(page)
    try:
        if options.follow:
            follow(options.runs, page, options.axis, options.every or FOLLOW_SECONDS)
        else:
            runs = read_runs(options.runs)
            write_page(runs, page, options.axis)
    except OSError as error:
        raise ConfigError(
            f"--to {page}: the page cannot be written ({disk_reason(error)}); name another file."
        ) from error
    if options.json:
        stages = [row.as_json() for row in stage_rows(runs)]
        print_json({"report": str(page.resolve()), "stages": stages})
    else:
        print_result(str(page))


def _parser() -> Parser:
    parser = Parser(
        prog="infir2 report",
        description="Writes one self-contained HTML page: curves, tables, samples. Runs of one "
        "stage are drawn in the same charts; the page has a control for the x axis and smoothing.",
    )
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN_DIR",
        help="run directories, or directories of runs",
    )
    parser.add_argument(
        "--to",
        type=Path,
        metavar="FILE",
        help="page to write, or a directory for report.html (default RUN_DIR/report.html, "
        "several runs: report.html)",
    )
    parser.add_argument(
        "--axis", choices=_AXES, default="step", help="x axis of the charts (default step)"
    )
    parser.add_argument(
        "--follow",
        action="store_true",
        help="write the page again and again until the runs end; an open page shows it",
    )
    parser.add_argument(
        "--every",
        type=seconds,
        metavar="SECONDS",
        help=f"how often --follow writes the page (default {FOLLOW_SECONDS:g})",
    )
    parser.add_argument("--json", action="store_true", help="print the table of stages as JSON")
    return parser


def seconds(text: str) -> float:
    """A number of seconds from 1 to a day. Raises ValueError."""
    value = float(text)
    if not 1 <= value <= 86_400:
        raise ValueError
    return value


def _check_runs(runs: Sequence[Path], may_be_empty: bool) -> None:
    """Raises DataError for a path that cannot be a run, ConfigError for one that is named twice."""
    for index, path in enumerate(runs):
        if path.resolve() in [other.resolve() for other in runs[:index]]:
            raise ConfigError(f"{path} is named twice; name each run once.")
        if advice := _advice(path):
            raise DataError(f"{path} {advice}")
        if not may_be_empty and _is_blank(path):
            raise DataError(
                f"{path} has recorded nothing yet (its metrics.jsonl is empty); wait for its first "
                "step, or add --follow"
            )


def _advice(path: Path) -> str:
    """What is wrong with a path that is no directory of runs, and what to name; "" if it may be."""
    if path.suffix in (".html", ".htm"):
        return f"is no run directory; to write the page there: --to {path}"
    if not path.exists():
        return "does not exist; name the run.dir of a run"
    if path.suffix == ".toml":
        return "is a recipe; name its run.dir"
    if not path.is_dir():
        return f"is a file; name the run directory, such as {path.parent}"
    if (path / "metrics.jsonl").exists():
        return ""
    if "checkpoints" in (path.name, path.parent.name):
        run = path if path.name == "checkpoints" else path.parent
        return f"is not a run but its checkpoints; name {run.parent}"
    if (path / "result.json").exists():
        return "is a run of benchmarks, which has no curves; infir2 eval compare reads it"
    if (path / "config.json").exists():
        return "is a model's directory; name the run.dir of the run that trained it"
    return ""


def _is_blank(run_dir: Path) -> bool:
    metrics = run_dir / "metrics.jsonl"
    has_rollouts = (run_dir / "kept_rollouts").is_dir()
    return metrics.is_file() and not metrics.stat().st_size and not has_rollouts


def _check_target(page: Path) -> None:
    """Raises ConfigError for a file that is no page: it may be one of a run, or a recipe."""
    if not page.is_file() or not page.stat().st_size:
        return
    with page.open("rb") as file:
        if file.read(len(_PAGE_START)).lower() != _PAGE_START:
            raise ConfigError(f"--to {page}: exists and is not an HTML page; name another file.")


@contextmanager
def own_page(run_dir: str) -> Iterator[None]:
    """Write RUN_DIR/report.html when the run in the block has ended, or ended by a UserError.

    A page that cannot be written ends no run. A run that refused to begin gets none, nor does one
    that was moved: its path may lead to another run.
    """
    directory = Path(run_dir)
    before = _state(directory)
    try:
        yield
    except UserError as error:
        if _state(directory) != before and not isinstance(error, RunMovedError):
            _write_own_page(directory)
        raise
    _write_own_page(directory)


def _state(run_dir: Path) -> tuple[int, int]:
    """Size and time of a run's metrics, which change as soon as it has a line."""
    try:
        found = (run_dir / "metrics.jsonl").stat()
    except OSError:
        return 0, 0
    return (found.st_size, found.st_mtime_ns) if found.st_size else (0, 0)


def _write_own_page(run_dir: Path) -> None:
    if os.environ.get("RANK", "0") != "0" or not (run_dir / "metrics.jsonl").is_file():
        return
    begin_phase("writing the report")
    try:
        from infir2.report import write_report

        log(f"report: {write_report([run_dir], run_dir / PAGE)}")
    except OSError as error:
        log(f"{run_dir / PAGE} cannot be written ({disk_reason(error)}); the run is not affected")
    except UserError as error:
        log(f"{run_dir / PAGE} is not written: {error}")
    except Exception as error:  # the run is done, whatever its page meets
        log(
            f"{run_dir / PAGE} is not written ({type(error).__name__}: {first_line(error)}); the "
            "run is not affected"
        )
