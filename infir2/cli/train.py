"""Verbs that take a recipe: cpt, sft, rl, eval."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from infir2.cli.arguments import load_recipe, recipe_help, wants_help
from infir2.config import Loaded
from infir2.config.schema import EvalRecipe, RlRecipe, TrainRecipe
from infir2.terminal import print_result

RESUME = "The same command run again resumes from the newest good checkpoint in run.dir."
KINDS: dict[str, tuple[type, str]] = {
    "cpt": (TrainRecipe, f"Trains on documents packed into windows of tokens. {RESUME}"),
    "sft": (TrainRecipe, f"Trains on the assistant's tokens of conversations. {RESUME}"),
    "rl": (
        RlRecipe,
        f"Trains a model on its own answers, rewarded when they are right (GRPO). {RESUME}",
    ),
    "eval": (
        EvalRecipe,
        "Samples answers to held-out problems and reports avg@k and pass@k with intervals.",
    ),
}


def _run(verb: str, arguments: Sequence[str]) -> None:
    """infir2 VERB RECIPE.toml ..."""
    recipe_class, meaning = KINDS[verb]
    if wants_help(arguments):
        return print_result(recipe_help(recipe_class, verb, meaning))
    loaded: Loaded[Any] = load_recipe(recipe_class, arguments, verb)
    if verb == "rl":
        from infir2.evaluate.run import in_loop_evaluator
        from infir2.rl.loop import run_rl

        run_rl(loaded, in_loop_evaluator(loaded.recipe))
    elif verb == "eval":
        from infir2.evaluate.run import run_evaluation

        run_evaluation(loaded)
    else:
        from infir2.train.loop import run_training

        run_training(loaded, verb)


cpt, sft, rl, evaluate = (partial(_run, verb) for verb in KINDS)
