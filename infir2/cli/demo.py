"""Verb demo."""

from collections.abc import Sequence
from pathlib import Path

from infir2.cli.arguments import Parser
from infir2.errors import ConfigError
from infir2.terminal import pulse

SEED = 1236


def demo(arguments: Sequence[str]) -> None:
    """infir2 demo [DIR] [--seed N]"""
    parser = Parser(
        prog="infir2 demo",
        description=(
            "Trains a tiny model through every stage, then exports, verifies and scores it."
        ),
    )
    parser.add_argument(
        "dir",
        nargs="?",
        type=Path,
        default=Path("runs/demo"),
        help="directory for data and runs (default runs/demo)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=SEED,
        help=f"seed of data, weights and sampling (default {SEED})",
    )
    parser.add_argument("--json", action="store_true", help="print the table of stages as JSON")
    options = parser.parse_args(arguments)
    _check_directory(options.dir)
    with pulse("demo is starting"):
        from infir2.demo.stages import run_demo

    run_demo(options.dir, options.seed, options.json)


def _check_directory(directory: Path) -> None:
    """Raise ConfigError for a directory with something else than a demo."""
    if not directory.is_dir() or not any(directory.iterdir()):
        return
    if not any((directory / name).is_dir() for name in ("logs", "world")):
        raise ConfigError(
            f"{directory} holds something else than a demo; name a new directory: infir2 demo DIR."
        )
