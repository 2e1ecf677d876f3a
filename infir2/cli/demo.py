"""Verb demo."""

from argparse import ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path

from infir2.cli.arguments import Parser
from infir2.errors import ConfigError
from infir2.terminal import pulse

SEED = 1236
_OWN = "the demo chooses its device and recipes itself; infir2 init writes a recipe of your own"
_HABITS = {
    **dict.fromkeys(("--to", "--out", "--output", "--run.dir"), "write infir2 demo DIR"),
    **dict.fromkeys(("--gpu", "--gpus", "--device", "--model"), _OWN),
    **dict.fromkeys(("--force", "--overwrite", "--clean"), "name a new directory"),
    "--resume": "the same command, run again, resumes",
}


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
        type=_directory,
        default=Path("runs/demo"),
        metavar="DIR",
        help="directory for data and runs (default runs/demo)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=SEED,
        help=f"seed of data, weights and sampling (default {SEED})",
    )
    parser.add_argument("--json", action="store_true", help="print the table of stages as JSON")
    for argument in arguments:
        if advice := _HABITS.get(argument.partition("=")[0]):
            raise ConfigError(f"{argument} is not an option of infir2 demo; {advice}.")
    options = parser.parse_args(arguments)
    if not 0 <= options.seed < 2**63:
        raise ConfigError(f"--seed {options.seed}: name a number from 0 to 2^63 - 1.")
    _check_directory(options.dir)
    with pulse("demo is starting"):
        from infir2.demo.stages import run_demo

    run_demo(options.dir, options.seed, options.json)


def _directory(text: str) -> Path:
    from infir2.cli import VERBS

    if not text.strip():
        raise ArgumentTypeError("the name is empty; name a directory, or leave it out")
    if text in {*VERBS, "help"} - {"demo"}:
        raise ArgumentTypeError(f"{text} is a word of infir2; a directory of that name is ./{text}")
    if "://" in text:
        raise ArgumentTypeError(f"{text} is an address; name a directory to write to")
    return Path(text)


def _check_directory(directory: Path) -> None:
    """Raise ConfigError for a file, and for a directory with something else than a demo."""
    if directory.is_file():
        raise ConfigError(
            f"{directory} is a file; infir2 demo DIR names a directory to write to, and takes no "
            "recipe."
        )
    names = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    # A demo that was killed early has its logs, and a directory whose name is not yet `world`.
    others = {name for name in names if name != "logs" and not name.startswith(".world.")}
    if others and "world" not in others:
        raise ConfigError(
            f"{directory} holds something else than a demo; name a new directory: infir2 demo DIR."
        )
