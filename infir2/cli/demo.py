"""Verbs of the demonstration: demo, data."""

from collections.abc import Sequence
from pathlib import Path

from infir2.cli.arguments import Parser

SEED = 1236


def demo(arguments: Sequence[str]) -> None:
    """infir2 demo [DIR] [--seed N]"""
    parser = Parser(
        prog="infir2 demo",
        description="Trains a tiny model through every stage, then exports, verifies and scores it.",
    )
    parser.add_argument(
        "dir",
        nargs="?",
        type=Path,
        default=Path("runs/demo"),
        help="where data and runs go (default runs/demo)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=SEED,
        help=f"seed of data, weights and sampling (default {SEED})",
    )
    words = parser.parse_args(arguments)
    from infir2.demo.stages import run_demo

    run_demo(words.dir, words.seed)


def data(arguments: Sequence[str]) -> None:
    """infir2 data demo --to DIR [--seed N]"""
    parser = Parser(prog="infir2 data", description="Makes data.")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="demo", parser_class=Parser)
    world = kinds.add_parser(
        "demo",
        help="documents, conversations, prompts, problems and a tokenizer of the demo's small world",
    )
    world.add_argument("--to", type=Path, required=True, metavar="DIR", help="directory to make")
    world.add_argument("--seed", type=int, default=SEED, help=f"seed of the data (default {SEED})")
    words = parser.parse_args(arguments)
    from infir2.demo.world import make_demo_world

    make_demo_world(words.to, words.seed)
