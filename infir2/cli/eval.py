"""Verb eval."""

from collections.abc import Sequence

from infir2.cli.arguments import load_recipe, recipe_help, wants_help
from infir2.config.schema import EvalRecipe
from infir2.terminal import print_result

_DESCRIPTION = (
    "Samples answers to held-out problems and reports avg@k and pass@k with intervals. The same "
    "command, run again, continues an interrupted evaluation."
)


def evaluate(arguments: Sequence[str]) -> None:
    """infir2 eval RECIPE.toml ..."""
    if wants_help(arguments):
        print_result(recipe_help(EvalRecipe, "eval", _DESCRIPTION))
        return
    loaded = load_recipe(EvalRecipe, arguments, "eval")
    from infir2.evaluate.run import run_evaluation

    run_evaluation(loaded)
