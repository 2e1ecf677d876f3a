"""Verb rl."""

from collections.abc import Sequence

from infir2.cli.arguments import load_recipe, recipe_help, wants_help
from infir2.cli.train import RESUME
from infir2.config.schema import RlRecipe
from infir2.terminal import print_result


def rl(arguments: Sequence[str]) -> None:
    """infir2 rl RECIPE.toml ..."""
    if wants_help(arguments):
        description = (
            f"Trains a model on its own answers, rewarded when they are right (GRPO). {RESUME}"
        )
        print_result(recipe_help(RlRecipe, "rl", description))
        return
    loaded = load_recipe(RlRecipe, arguments, "rl")
    from infir2.rl.loop import run_rl

    run_rl(loaded)
