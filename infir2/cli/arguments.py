"""What verbs share in reading their words: errors as one sentence, and recipe files with dotted options."""

import argparse
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NoReturn, TypeVar

from pydantic import BaseModel

from infir2.config import Loaded, load
from infir2.config.help import describe_keys, describe_variables
from infir2.errors import ConfigError
from infir2.terminal import log

R = TypeVar("R", bound=BaseModel)


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are ConfigErrors, so that they look and exit like every other one."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `{self.prog} --help`.")


@dataclass(frozen=True)
class RecipeWords:
    """The words of a command that takes a recipe, sorted."""

    paths: tuple[str, ...]
    options: tuple[str, ...]


def split_recipe_words(arguments: Sequence[str], verb: str) -> RecipeWords:
    """Sorts files from `--section.key=value` options."""
    paths: list[str] = []
    options: list[str] = []
    for word in arguments:
        if word == "--accept-changes":
            continue
        elif word.startswith("--") and "." in word.partition("=")[0]:
            options.append(word)
        elif word.startswith("-"):
            raise ConfigError(
                f"{word} is not an option of infir2 {verb}; options are --section.key=value, see `infir2 {verb} --help`."
            )
        elif paths and options and "=" not in options[-1]:
            raise ConfigError(f"option {options[-1]}: write it as {options[-1]}={word}.")
        else:
            paths.append(word)
    if not paths and not options:
        raise ConfigError(
            f"infir2 {verb} needs a recipe, such as one in recipes/demo; see `infir2 {verb} --help`."
        )
    return RecipeWords(tuple(paths), tuple(options))


def load_recipe(
    recipe_class: type[R], arguments: Sequence[str], verb: str, command: str = ""
) -> Loaded[R]:
    """The recipe of a command line, checked for `verb`; says on stderr which environment variables took part.

    `command` is the verb that was typed, if it is another one.
    """
    words = split_recipe_words(arguments, command or verb)
    loaded = load(recipe_class, words.paths, words.options, os.environ, verb)
    # Under torchrun every rank loads the recipe; one says so.
    if os.environ.get("RANK", "0") == "0":
        for note in loaded.notes:
            log(note)
    return replace(loaded, accept_changes="--accept-changes" in arguments)


def wants_help(arguments: Sequence[str]) -> bool:
    return any(word in ("-h", "--help") for word in arguments)


def recipe_help(recipe_class: type[BaseModel], verb: str, meaning: str, words: str = "") -> str:
    """The text of `infir2 VERB --help`; `words` are those of the usage line, the verb if empty."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    return (
        f"usage: infir2 {words or verb} RECIPE.toml [MORE.toml ...] [--section.key=value ...] [--accept-changes]\n\n{meaning}\n\n"
        'Later files override earlier ones, options override files; a recipe may say extends = "base.toml". Values of options\n'
        "are TOML; text needs no quotes. Relative paths in a recipe are relative to the current directory.\n"
        "--accept-changes resumes a run although its recipe changed in a key that makes it a different run.\n"
        f"\nKeys:\n{describe_keys(recipe_class, width)}\n\n"
        f"Environment variables (over files, under options):\n{describe_variables(recipe_class)}"
    )
