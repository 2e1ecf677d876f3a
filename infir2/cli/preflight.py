"""Verb check: a recipe's preflight."""

import difflib
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infir2.cli.arguments import (
    RECIPE_CLASSES,
    ROLLOUT_ONLY,
    TRAIN_ONLY,
    load_recipe,
    recipe_help,
    split_json,
    split_recipe_arguments,
    wants_help,
)
from infir2.cli.rl import split_modes
from infir2.config import Loaded, load
from infir2.config.load import sections_in
from infir2.config.schema import RlRecipe, TrainRecipe
from infir2.errors import CheckFailedError, ConfigError
from infir2.preflight.checks import Preflight
from infir2.preflight.finding import Finding
from infir2.terminal import print_json, print_result

if TYPE_CHECKING:
    from infir2.data import ChatTokenizer

_DESCRIPTION = (
    "Checks everything that the verb needs with this recipe, and trains nothing. "
    "The verb is guessed if left out. "
    f"{ROLLOUT_ONLY} and {TRAIN_ONLY}=DIR check what infir2 rl needs with them."
)


def check(arguments: Sequence[str]) -> None:
    """infir2 check [cpt|sft|rl|eval] RECIPE.toml ...

    Raises:
        CheckFailedError: at least one check failed; the printed lines say which and what to do.
    """
    if wants_help(arguments):
        usage = "check [cpt|sft|rl|eval]"
        print_result(recipe_help(RlRecipe, usage, _DESCRIPTION))
        return
    as_json, arguments = split_json(arguments)
    arguments, rollout_only, train_only = split_modes(arguments)
    verb, arguments = _split_verb(arguments)
    if verb != "rl" and (rollout_only or train_only):
        raise ConfigError(f"{ROLLOUT_ONLY} and {TRAIN_ONLY} are options of infir2 rl.")
    loaded = load_recipe(RECIPE_CLASSES[verb], arguments, verb, command="check")
    findings: list[Finding] = []
    for finding in _preflight(loaded, verb, rollout_only, train_only).findings():
        findings.append(finding)
        if not as_json:
            print_result(str(finding))
    if as_json:
        print_json([asdict(finding) for finding in findings])
    failed = [finding.check for finding in findings if finding.status == "fail"]
    if failed:
        raise CheckFailedError(
            f"{len(failed)} of the checks failed ({', '.join(failed)}); "
            "the lines marked FAIL say what to do."
        )


def _preflight(loaded: Loaded[Any], verb: str, rollout_only: bool, train_only: str) -> Preflight:
    if not rollout_only and not train_only:
        return Preflight(loaded, verb)
    from infir2.rl.kept_rollouts import check_kept

    def kept(tokenizer: "ChatTokenizer") -> str:
        return check_kept(loaded.recipe, tokenizer.fingerprint(), train_only)

    return Preflight(loaded, verb, kept, bool(train_only))


def _split_verb(arguments: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The verb and the remaining arguments.

    A verb that is left out follows from the sections of the recipe and from the first row.
    """
    if arguments and arguments[0] in RECIPE_CLASSES:
        return arguments[0], arguments[1:]
    if arguments and not arguments[0].startswith("-") and not Path(arguments[0]).suffix:
        near = difflib.get_close_matches(arguments[0], RECIPE_CLASSES, 1)
        if near and not Path(arguments[0]).exists():
            raise ConfigError(f"{arguments[0]} is not a verb of check; did you mean {near[0]}?")
    paths, options = split_recipe_arguments(arguments, "check")
    sections = sections_in(paths)
    if "rl" in sections:
        return "rl", arguments
    if sections and "schedule" not in sections:
        return "eval", arguments
    recipe = load(TrainRecipe, paths, options, os.environ).recipe
    if recipe.data.batch_samples:
        return "sft", arguments
    from infir2.preflight.data import first_row_is_conversation

    return "sft" if first_row_is_conversation(recipe) else "cpt", arguments
