"""Verbs cpt and sft."""

from collections.abc import Sequence

from infir2.cli.arguments import load_recipe, recipe_help, wants_help
from infir2.cli.report import own_page
from infir2.config.schema import TrainRecipe
from infir2.terminal import print_result

RESUME = "The same command, run again, resumes from the newest good checkpoint in run.dir."


def cpt(arguments: Sequence[str]) -> None:
    """infir2 cpt RECIPE.toml ..."""
    _train("cpt", arguments, f"Trains on documents packed into windows of tokens. {RESUME}")


def sft(arguments: Sequence[str]) -> None:
    """infir2 sft RECIPE.toml ..."""
    _train("sft", arguments, f"Trains on the assistant's tokens of conversations. {RESUME}")


def _train(verb: str, arguments: Sequence[str], description: str) -> None:
    if wants_help(arguments):
        print_result(recipe_help(TrainRecipe, verb, description))
        return
    loaded = load_recipe(TrainRecipe, arguments, verb)
    from infir2.train.loop import run_training

    with own_page(loaded.recipe.run.dir):
        run_training(loaded, verb)
