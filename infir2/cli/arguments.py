"""Command-line parsing that verbs share: argparse errors, and recipe files with dotted options."""

import argparse
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn, TypeVar

from pydantic import BaseModel

from infir2.config import Loaded, load
from infir2.config.help import describe_keys, describe_variables
from infir2.config.schema import EvalRecipe, RlRecipe, TrainRecipe
from infir2.errors import ConfigError
from infir2.terminal import log

R = TypeVar("R", bound=BaseModel)

ACCEPT_CHANGES = "--accept-changes"
RECIPE_CLASSES: dict[str, type[TrainRecipe] | type[EvalRecipe]] = {
    "cpt": TrainRecipe,
    "sft": TrainRecipe,
    "rl": RlRecipe,
    "eval": EvalRecipe,
}


class Parser(argparse.ArgumentParser):
    """argparse that raises ConfigError, so that its errors look and exit like all others."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `{self.prog} --help`.")


def split_recipe_arguments(
    arguments: Sequence[str], verb: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(recipe paths, `--section.key=value` options) of a command line.

    Raises ConfigError for an unknown option, an option without `=`, or no argument at all.
    """
    paths: list[str] = []
    options: list[str] = []
    for argument in arguments:
        if argument == ACCEPT_CHANGES and verb != "eval":
            continue
        if argument.startswith("--") and "." in argument.partition("=")[0]:
            options.append(argument)
        elif argument.startswith("-"):
            raise ConfigError(
                f"{argument} is not an option of infir2 {verb}; options are --section.key=value, "
                f"see `infir2 {verb} --help`."
            )
        elif paths and options and "=" not in options[-1]:
            raise ConfigError(f"option {options[-1]}: write it as {options[-1]}={argument}.")
        else:
            paths.append(argument)
    if not paths and not options:
        raise ConfigError(
            f"infir2 {verb} needs a recipe, such as one in recipes/demo; "
            f"see `infir2 {verb} --help`."
        )
    return tuple(paths), tuple(options)


def load_recipe(
    recipe_class: type[R], arguments: Sequence[str], verb: str, command: str = ""
) -> Loaded[R]:
    """Load and check the recipe of a command line, and log which environment variables it uses.

    Args:
        recipe_class: the class of the verb's recipes.
        arguments: the command line after the verb.
        verb: the verb whose rules the recipe must follow.
        command: the typed verb, if it is another one (`infir2 check sft`).
    """
    paths, options = split_recipe_arguments(arguments, command or verb)
    loaded = load(recipe_class, paths, options, os.environ, verb)
    if os.environ.get("RANK", "0") == "0":  # under torchrun every rank loads the recipe
        for note in loaded.notes:
            log(note)
    return replace(loaded, accept_changes=ACCEPT_CHANGES in arguments)


def wants_help(arguments: Sequence[str]) -> bool:
    return any(argument in ("-h", "--help") for argument in arguments)


def recipe_help(recipe_class: type[BaseModel], usage: str, description: str) -> str:
    """The text of `infir2 VERB --help`; `usage` is what precedes RECIPE.toml in the usage line."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    changes = issubclass(recipe_class, TrainRecipe)  # an evaluation never mixes settings
    accept = f" [{ACCEPT_CHANGES}]" if changes else ""
    note = (
        f"\n{ACCEPT_CHANGES} resumes a run although its recipe changed in a key that makes it "
        "another run."
    )
    return f"""\
usage: infir2 {usage} RECIPE.toml [MORE.toml ...] [--section.key=value ...]{accept}

{description}

Later files override earlier ones, options override files; a recipe may extend another with
extends = "base.toml". Values of options are TOML; text needs no quotes. Relative paths in a
recipe are relative to the current directory.{note if changes else ""}

Keys:
{describe_keys(recipe_class, width)}

Environment variables (they override files; options override them):
{describe_variables(recipe_class)}"""
