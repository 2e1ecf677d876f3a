"""Verbs of the demonstration: demo, data."""

from collections.abc import Sequence
from pathlib import Path

from infir2 import __version__
from infir2.cli.arguments import Parser
from infir2.cli.outputs import write_once

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
    from infir2.demo.stages import run_demo

    run_demo(options.dir, options.seed, options.json)


def data(arguments: Sequence[str]) -> None:
    """infir2 data demo --to DIR [--seed N]"""
    parser = Parser(prog="infir2 data", description="Generates data.")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="demo", parser_class=Parser)
    demo_parser = kinds.add_parser(
        "demo",
        help="documents, conversations, prompts, problems and a tokenizer of the demo's world",
    )
    demo_parser.add_argument(
        "--to", type=Path, required=True, metavar="DIR", help="directory to write"
    )
    demo_parser.add_argument(
        "--seed", type=int, default=SEED, help=f"seed of the data (default {SEED})"
    )
    options = parser.parse_args(arguments)
    from infir2.demo.world import make_demo_world

    made_by = {"command": "data demo", "seed": options.seed, "version": __version__}
    write_once(options.to, made_by, lambda: make_demo_world(options.to, options.seed))
