"""Verb eval."""

from collections.abc import Sequence

from infir2.cli.arguments import load_recipe, recipe_help, split_json, wants_help
from infir2.config.schema import EvalRecipe
from infir2.terminal import print_json, print_result

_DESCRIPTION = (
    "Samples answers to held-out problems and reports avg@k and pass@k with intervals. The same "
    "command, run again, continues an interrupted evaluation."
)


def evaluate(arguments: Sequence[str]) -> None:
    """infir2 eval RECIPE.toml ..."""
    if wants_help(arguments):
        print_result(recipe_help(EvalRecipe, "eval", _DESCRIPTION))
        return
    as_json, arguments = split_json(arguments)
    loaded = load_recipe(EvalRecipe, arguments, "eval")
    from infir2.evaluate.output import scores_as_json
    from infir2.evaluate.run import run_evaluation

    scores = run_evaluation(loaded)
    if as_json:
        print_json(scores_as_json(scores))
