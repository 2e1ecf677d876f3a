"""Verbs that take a recipe: cpt, sft, rl, eval."""

from collections.abc import Sequence

from infir2.cli.arguments import load_recipe, recipe_help, wants_help
from infir2.config.schema import EvalRecipe, RlRecipe, TrainRecipe

RESUME = "The same command run again resumes from the newest good checkpoint in run.dir."


def cpt(arguments: Sequence[str]) -> None:
    """infir2 cpt RECIPE.toml ..."""
    if wants_help(arguments):
        print(recipe_help(TrainRecipe, "cpt", f"Trains on documents packed into windows of tokens. {RESUME}"))
        return
    loaded = load_recipe(TrainRecipe, arguments, "cpt")
    from infir2.train.run import run_training

    run_training(loaded, "cpt")


def sft(arguments: Sequence[str]) -> None:
    """infir2 sft RECIPE.toml ..."""
    if wants_help(arguments):
        print(recipe_help(TrainRecipe, "sft", f"Trains on the assistant's tokens of conversations. {RESUME}"))
        return
    loaded = load_recipe(TrainRecipe, arguments, "sft")
    from infir2.train.run import run_training

    run_training(loaded, "sft")


def rl(arguments: Sequence[str]) -> None:
    """infir2 rl RECIPE.toml ..."""
    if wants_help(arguments):
        print(recipe_help(RlRecipe, "rl", f"Trains a model on its own answers, rewarded when they are right (GRPO). {RESUME}"))
        return
    loaded = load_recipe(RlRecipe, arguments, "rl")
    from infir2.evaluate.run import in_loop_evaluator
    from infir2.rl.run import run_rl

    run_rl(loaded, in_loop_evaluator(loaded.recipe))


def evaluate(arguments: Sequence[str]) -> None:
    """infir2 eval RECIPE.toml ..."""
    if wants_help(arguments):
        print(recipe_help(EvalRecipe, "eval", "Samples answers to held-out problems and reports avg@k and pass@k with intervals."))
        return
    loaded = load_recipe(EvalRecipe, arguments, "eval")
    from infir2.evaluate.run import run_evaluation

    run_evaluation(loaded)
