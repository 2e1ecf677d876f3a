"""Verbs plan and bench."""

import os
from collections.abc import Sequence
from pathlib import Path

from infir2.cli.arguments import Parser, split_recipe_arguments
from infir2.config import load
from infir2.config.load import sections_in
from infir2.config.schema import RlRecipe, TrainRecipe
from infir2.errors import ConfigError
from infir2.terminal import log, print_json, print_result


def plan(arguments: Sequence[str]) -> None:
    """infir2 plan RECIPE.toml --gpu NAME [--gpus N] [--nodes M]"""
    parser = Parser(
        prog="infir2 plan",
        usage="infir2 plan RECIPE.toml ... --gpu NAME [--gpus N] [--nodes M] [--section.key=value]",
        description="Estimates memory, time and the best layout of a run, without a GPU here.",
        allow_abbrev=False,
    )
    gpu_help = "h100, h200, a100, or a file that infir2 bench wrote on such a machine"
    parser.add_argument("--gpu", required=True, metavar="NAME", help=gpu_help)
    parser.add_argument("--gpus", type=_count, default=1, metavar="N", help="of a node (default 1)")
    parser.add_argument("--nodes", type=_count, default=1, metavar="M", help="default 1")
    tokens_help = "mean tokens of a document, conversation or response (default: from the data)"
    parser.add_argument("--sample-tokens", type=_count, default=0, metavar="N", help=tokens_help)
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    options, rest = parser.parse_known_args(arguments)
    paths, overrides = split_recipe_arguments(rest, "plan")
    recipe = _load(paths, overrides)
    from infir2.planner.gpus import find_gpu
    from infir2.planner.plan import as_json, as_text, make_plan

    gpu = find_gpu(options.gpu)
    made = make_plan(recipe, gpu, options.gpus, options.nodes, options.sample_tokens)
    print_json(as_json(made)) if options.json else print_result(as_text(made))


def _load(paths: Sequence[str], overrides: Sequence[str]) -> TrainRecipe:
    sections = sections_in(paths)
    if "evaluate" in sections and not {"data", "rl"} & sections:
        raise ConfigError(
            f"{paths[0]}: infir2 plan estimates recipes of cpt, sft and rl, and this is one of "
            "eval: infir2 check eval checks it."
        )
    loaded = load(RlRecipe if "rl" in sections else TrainRecipe, paths, overrides, os.environ)
    for note in loaded.notes:
        log(note)
    return loaded.recipe


def bench(arguments: Sequence[str]) -> None:
    """infir2 bench --to FILE.json"""
    parser = Parser(
        prog="infir2 bench",
        description="Measures this machine's GPU in a minute, for infir2 plan --gpu FILE.json.",
    )
    parser.add_argument("--to", type=Path, required=True, metavar="FILE", help="file to write")
    options = parser.parse_args(arguments)
    from infir2.planner.measure import measure_gpu

    print_result(measure_gpu(options.to))


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


_count.__name__ = "positive integer"
