"""Verb rl."""

from collections.abc import Sequence

from infir2.cli.arguments import ROLLOUT_ONLY, TRAIN_ONLY, load_recipe, recipe_help, wants_help
from infir2.cli.report import own_page
from infir2.cli.train import RESUME
from infir2.config.schema import RlRecipe
from infir2.errors import ConfigError
from infir2.terminal import print_result

_MODES = (
    f"{ROLLOUT_ONLY} samples all steps with the first weights, keeps them in run.dir and trains "
    f"nothing. {TRAIN_ONLY}=DIR trains on the rollouts that the run in DIR has kept "
    "(rl.keep_rollouts), without an engine."
)


def rl(arguments: Sequence[str]) -> None:
    """infir2 rl RECIPE.toml ... [--rollout-only | --train-only=DIR]"""
    if wants_help(arguments):
        description = (
            "Trains a model on its own answers, rewarded when they are right (GRPO). "
            f"{RESUME}\n\n{_MODES}"
        )
        print_result(recipe_help(RlRecipe, "rl", description))
        return
    arguments, rollout_only, run_dir = split_modes(arguments)
    loaded = load_recipe(RlRecipe, arguments, "rl")
    from infir2.rl.loop import run_rl, run_train_only

    with own_page(loaded.recipe.run.dir):
        if run_dir:
            run_train_only(loaded, run_dir)
        else:
            run_rl(loaded, rollout_only)


def split_modes(arguments: Sequence[str]) -> tuple[list[str], bool, str]:
    """(the other arguments, whether only to sample, whose rollouts to train on)."""
    rest, run_dir, words = list[str](), "", iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name == TRAIN_ONLY:
            run_dir = value if equals else next(words, "")
            if not run_dir:
                raise ConfigError(f"{TRAIN_ONLY} names the run.dir of a run: {TRAIN_ONLY}=DIR.")
        elif word != ROLLOUT_ONLY:
            rest.append(word)
    rollout_only = ROLLOUT_ONLY in arguments
    if rollout_only and run_dir:
        raise ConfigError(f"{ROLLOUT_ONLY} and {TRAIN_ONLY} exclude each other; remove one.")
    return rest, rollout_only, run_dir
