"""Verb eval: an evaluation of a recipe; compare and contamination read what there is."""

import difflib
from collections.abc import Sequence
from pathlib import Path

from infir2.cli.arguments import JSON, Parser, load_recipe, recipe_help, split_json, wants_help
from infir2.cli.benchmarks import run_benchmarks, run_recipe
from infir2.config.schema import EvalRecipe
from infir2.errors import ConfigError
from infir2.terminal import print_json, print_result

_DESCRIPTION = """\
Samples answers to held-out problems and reports avg@k, pass@k and majority@k with intervals. The
same command, run again, continues an interrupted evaluation.

infir2 eval MODEL|URL --benchmarks NAMES --data DIR --run.dir DIR: evalscope's benchmarks;
infir2 eval compare A B: the difference of two evaluations;
infir2 eval contamination --train SOURCE... --data DIR: looks for questions in training data.
Each of them has a --help of its own."""


def evaluate(arguments: Sequence[str]) -> None:
    """infir2 eval RECIPE.toml ... | URL --benchmarks ... | compare A B | contamination ..."""
    if arguments and arguments[0] in _COMMANDS:
        return _COMMANDS[arguments[0]](arguments[1:])
    if any(word.partition("=")[0] in ("--benchmarks", "--setup") for word in arguments):
        return run_benchmarks(arguments)
    if wants_help(arguments):
        print_result(recipe_help(EvalRecipe, "eval", _DESCRIPTION))
        return
    _check_target(arguments)
    as_json, arguments = split_json(arguments)
    loaded = load_recipe(EvalRecipe, arguments, "eval")
    if loaded.recipe.benchmarks.names:
        return run_recipe(loaded.recipe, as_json)
    from infir2.evaluate.output import scores_as_json
    from infir2.evaluate.run import run_evaluation

    scores = run_evaluation(loaded)
    if as_json:
        print_json(scores_as_json(scores))


def _check_target(arguments: Sequence[str]) -> None:
    """Raise ConfigError for a misspelt command, and for a model or URL."""
    first = arguments[0] if arguments else ""
    near = difflib.get_close_matches(first, _COMMANDS, 1)
    if near and not Path(first).exists():
        raise ConfigError(f"infir2 eval {first}: did you mean infir2 eval {near[0]}?")
    if first.startswith(("http://", "https://")) or Path(first, "config.json").is_file():
        raise ConfigError(
            f"{first}: is no recipe; infir2 eval {first} --benchmarks NAMES --data DIR runs "
            "benchmarks, infir2 eval RECIPE.toml --model.path=DIR your own problems."
        )


def _compare(arguments: Sequence[str]) -> None:
    """infir2 eval compare A B"""
    parser = Parser(
        prog="infir2 eval compare",
        description="The difference of two evaluations over the questions that both asked, with "
        "its paired bootstrap interval. Different settings are refused.",
    )
    parser.add_argument("first", type=Path, metavar="A", help="run.dir of an evaluation")
    parser.add_argument("second", type=Path, metavar="B", help="run.dir of another one")
    parser.add_argument(JSON, action="store_true", help="print the numbers as JSON")
    options = parser.parse_args(arguments)
    from infir2.evaluate.compare import compare

    found = compare(options.first, options.second)
    if options.json:
        print_json([each.as_json() for each in found])
        return
    for each in found:
        print_result(each.describe(str(options.first), str(options.second)))


def _contamination(arguments: Sequence[str]) -> None:
    """infir2 eval contamination --train SOURCE... --data DIR"""
    parser = Parser(
        prog="infir2 eval contamination",
        description="Lists the questions that share sequences of 13 words with training data.",
    )
    parser.add_argument(
        "--train", type=Path, nargs="+", required=True, help="files or directories of training rows"
    )
    parser.add_argument("--data", type=Path, required=True, help="file or directory of questions")
    parser.add_argument(JSON, action="store_true", help="print what was found as JSON")
    options = parser.parse_args(arguments)
    from infir2.evaluate.contamination import find_contamination

    found = find_contamination(options.train, options.data)
    if options.json:
        print_json(found.as_json())
    else:
        print_result(found.describe())


_COMMANDS = {"compare": _compare, "contamination": _contamination}
