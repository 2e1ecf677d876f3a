"""Verbs data and init."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from infir2 import __version__
from infir2.cli.arguments import Parser
from infir2.cli.demo import SEED
from infir2.cli.outputs import write_once
from infir2.config.paths import check_tokenizer_directory
from infir2.errors import DataError
from infir2.terminal import print_json, print_marked, print_result

KINDS = ("documents", "messages", "prompts")


def data(arguments: Sequence[str]) -> None:
    """infir2 data inspect SOURCE... --tokenizer DIR | infir2 data demo --to DIR [--seed N]"""
    parser = Parser(prog="infir2 data", description="Looks at data, and generates the demo's.")
    kinds = parser.add_subparsers(
        dest="kind", required=True, metavar="inspect|demo", parser_class=Parser
    )
    _add_inspect(kinds)
    _add_demo(kinds)
    options = parser.parse_args(arguments)
    _demo(options) if options.kind == "demo" else _inspect(options)


def _add_demo(kinds: "argparse._SubParsersAction[Parser]") -> None:
    demo = kinds.add_parser(
        "demo",
        help="documents, conversations, prompts, problems and a tokenizer of the demo's world",
    )
    demo.add_argument("--to", type=Path, required=True, metavar="DIR", help="directory to write")
    demo.add_argument("--seed", type=int, default=SEED, help=f"seed of the data (default {SEED})")


def _add_inspect(kinds: "argparse._SubParsersAction[Parser]") -> None:
    inspect = kinds.add_parser(
        "inspect",
        help="counts, lengths, duplicates, packing, contamination, and rows as they are trained",
    )
    inspect.add_argument("sources", type=Path, nargs="+", metavar="SOURCE", help="as in a recipe")
    inspect.add_argument(
        "--tokenizer", type=Path, required=True, metavar="DIR", help="of the model"
    )
    inspect.add_argument("--kind", choices=KINDS, help="of the rows (default: found out)")
    inspect.add_argument(
        "--sequence-tokens", type=_count, default=32768, metavar="N", help="default 32768"
    )
    inspect.add_argument("--rows", type=int, default=2, metavar="N", help="to show (default 2)")
    inspect.add_argument(
        "--problems", type=Path, metavar="FILE", help="test questions to look for in the sources"
    )
    inspect.add_argument("--json", action="store_true", help="print the counts as JSON")


def _count(text: str) -> int:
    number = int(text)
    if number < 2:
        raise ValueError
    return number


_count.__name__ = "number of tokens"


def _demo(options: argparse.Namespace) -> None:
    from infir2.demo.world import make_demo_world

    made_by = {"command": "data demo", "seed": options.seed, "version": __version__}
    write_once(options.to, made_by, lambda: make_demo_world(options.to, options.seed))


def _inspect(options: argparse.Namespace) -> None:
    check_tokenizer_directory("--tokenizer", options.tokenizer)
    from infir2.data import load_tokenizer
    from infir2.evaluate.contamination import find_contamination
    from infir2.starter.inspection import inspect_sources
    from infir2.starter.words import as_json, contamination, describe, shown

    if options.problems and not options.problems.exists():
        raise DataError(f"--problems {options.problems} does not exist; name test questions.")
    tokenizer = load_tokenizer(options.tokenizer)
    found = inspect_sources(options.sources, tokenizer, options.kind, max(0, options.rows))
    overlap = find_contamination(options.sources, options.problems) if options.problems else None
    if options.json:
        sources = [as_json(each, options.sequence_tokens) for each in found]
        more = {"contamination": overlap.as_json()} if overlap else {}
        print_json({"sources": sources} | more)
        return
    for each in found:
        print_result(describe(each, options.sequence_tokens))
        for row in each.rendered:
            print_result(f"\n  {row.origin}, as tokens; marked: trained")
            print_marked(shown(row))
        print_result("")
    print_result(contamination(overlap))


def init(arguments: Sequence[str]) -> None:
    """infir2 init DIR --model HF_DIR --task sft|cpt|rl --data FILE"""
    parser = Parser(
        prog="infir2 init",
        description="Writes DIR/recipe.toml, commented, for a model and data that are here.",
    )
    parser.add_argument("dir", type=Path, metavar="DIR", help="new directory")
    model_help = "Hugging Face directory of the model to train"
    parser.add_argument("--model", type=Path, required=True, metavar="HF_DIR", help=model_help)
    parser.add_argument("--task", choices=("cpt", "sft", "rl"), required=True)
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="as in a recipe")
    parser.add_argument(
        "--validation", type=Path, metavar="FILE", help="data held out; for rl, problems"
    )
    options = parser.parse_args(arguments)
    from infir2.starter.recipe import write_recipe

    print_result(
        write_recipe(options.dir, options.model, options.task, options.data, options.validation)
    )
