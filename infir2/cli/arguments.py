"""Command-line parsing that verbs share: argparse errors, and recipe files with dotted options."""

import argparse
import difflib
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel

from infir2.config import Loaded, load
from infir2.config.help import describe_keys, describe_variables
from infir2.config.keys import lookup
from infir2.config.paths import refuse_tildes
from infir2.config.schema import EvalRecipe, RlRecipe, TrainRecipe
from infir2.config.unknown import nearest_key
from infir2.errors import ConfigError
from infir2.terminal import log

R = TypeVar("R", bound=BaseModel)

ACCEPT_CHANGES, JSON = "--accept-changes", "--json"
_MANY = "infir2 launch torchrun --gpus-per-node M -- VERB ... runs on several GPUs"
_HABITS = {
    "resume": "The same command, run again, resumes",
    "dry_run": "infir2 check RECIPE.toml checks everything and trains nothing",
    "config": "A recipe is named without an option",
    "verbose": "There is no such option; --quiet leaves results and errors only",
    **dict.fromkeys(("gpus", "num_gpus", "nproc_per_node", "gpus_per_node", "nodes"), _MANY),
}
ROLLOUT_ONLY, TRAIN_ONLY = "--rollout-only", "--train-only"
# Options of the verbs that take a recipe, beside its keys; "=" where a value follows it.
OWN_OPTIONS = {
    "cpt": (ACCEPT_CHANGES,),
    "sft": (ACCEPT_CHANGES,),
    "rl": (ROLLOUT_ONLY, f"{TRAIN_ONLY}=", ACCEPT_CHANGES),
    "eval": (JSON, "--benchmarks", "--setup"),
    "check": (JSON, ROLLOUT_ONLY, f"{TRAIN_ONLY}=", ACCEPT_CHANGES),
    "plan": (JSON, "--gpu", "--gpus", "--nodes", ACCEPT_CHANGES),
}
RECIPE_CLASSES: dict[str, type[TrainRecipe] | type[EvalRecipe]] = {
    "cpt": TrainRecipe,
    "sft": TrainRecipe,
    "rl": RlRecipe,
    "eval": EvalRecipe,
}


class DescribedError(Exception):
    """Raised instead of parsing while `Parser.describes` is set; has the verb's parser."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


class Parser(argparse.ArgumentParser):
    """argparse that raises ConfigError, so that its errors look and exit like all others.

    While `describes` is set, a verb's function only builds its parser, for shell completion.
    """

    describes = False
    _given: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if Parser.describes:
            raise DescribedError(self)
        self._given = [str(word) for word in args or ()]
        refuse_tildes(self._given)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"invalid \w+ value", lambda name: name[0].replace("_", " "), message)
        message = message.replace("ignored explicit argument", "takes no value, and has")
        raise ConfigError(f"{message}; {self._advice(message)}see `{self.prog} --help`.")

    def _advice(self, message: str) -> str:
        """The known word that resembles the wrong one in argparse's message, if there is one."""
        wrong = re.search(r"invalid choice: '([^']*)'|unrecognized arguments: ([^ =]*)", message)
        if "are required: " in message:
            return self._misspelt()
        if not wrong:
            return ""
        choices = [str(word) for action in self._actions for word in action.choices or ()]
        if wrong[2] and wrong[2].endswith(".toml"):
            return f"{self.prog} takes no recipe, infir2 check and infir2 plan do; "
        if wrong[1] is None:
            return self._option_advice(wrong[2])
        near = difflib.get_close_matches(wrong[1].lower(), choices, 1)
        return f"did you mean {near[0]}? " if near else ""

    def _option_advice(self, option: str, prefix: str = "") -> str:
        """What an unknown option may mean: a word that stands without one, or a near spelling."""
        for action in self._actions:
            if not action.option_strings and option == f"--{action.dest.replace('_', '-')}":
                return f"{action.metavar or action.dest} is written without an option; "
        known = [
            word for each in self._actions for word in each.option_strings if word[2:] != "help"
        ]
        near = difflib.get_close_matches(option.lower(), known, 1)
        return f"{prefix}did you mean {near[0]}? " if near else ""

    def _misspelt(self) -> str:
        """What may be meant by an option that was given where a required one is missing."""
        known = [name for action in self._actions for name in action.option_strings]
        for word in (word.partition("=")[0] for word in self._given if word.startswith("-")):
            if word not in known and (
                advice := self._option_advice(word, f"{word} is not an option, ")
            ):
                return advice
        return ""


def split_recipe_arguments(
    arguments: Sequence[str], verb: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(recipe paths, `--section.key=value` options) of a command line.

    Raises ConfigError for an unknown option, an option without `=`, or no argument at all.
    """
    paths: list[str] = []
    options: list[str] = []
    refuse_tildes(arguments)
    for argument in arguments:
        if argument == ACCEPT_CHANGES and verb != "eval":
            continue
        if argument.startswith("--") and "." in argument.partition("=")[0]:
            options.append(argument)
        elif argument.startswith("-") or _lacks_dashes(argument, verb):
            raise ConfigError(
                f"{argument} is not an option of infir2 {verb}; options are --section.key=value, "
                f"see `infir2 {verb} --help`.{_option_advice(argument, verb)}"
            )
        elif paths and options and "=" not in options[-1]:
            value = "VALUE" if argument == "=" else argument.removeprefix("=")
            raise ConfigError(f"option {options[-1]}: write it as {options[-1]}={value}.")
        else:
            paths.append(argument)
    if not paths and not options:
        raise ConfigError(
            f"infir2 {verb} needs a recipe, such as one in recipes/demo; "
            f"see `infir2 {verb} --help`."
        )
    return tuple(paths), tuple(options)


def _lacks_dashes(argument: str, verb: str) -> bool:
    key, equals, _ = argument.partition("=")
    is_own = f"--{key}" in OWN_OPTIONS.get(verb, ())
    return bool(equals) and (is_own or lookup(RlRecipe, key) is not None)


def _option_advice(argument: str, verb: str) -> str:
    """What a wrong option may have meant: habits of other programs, our options, then keys."""
    name, equals, value = argument.partition("=")
    word = name.lstrip("-").replace("-", "_")
    own = [*(option.rstrip("=") for option in OWN_OPTIONS[verb]), "--help", "--quiet"]
    if (habit := _HABITS.get(word)) and f"--{word}" not in own:
        return f" {habit}."
    near = difflib.get_close_matches(name.replace("_", "-"), own, 1, 0.75)
    key = nearest_key(RECIPE_CLASSES.get(verb, RlRecipe), word)
    meant = near[0] if near else f"--{key}" if key else ""
    return f" Did you mean {meant}{equals}{value}?" if meant else ""


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


def split_json(arguments: Sequence[str]) -> tuple[bool, list[str]]:
    """Whether `--json` is among the arguments, and the others."""
    return JSON in arguments, [argument for argument in arguments if argument != JSON]


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
