"""Verb completion: a script for bash, which asks `infir2 completion words ...` at each Tab.

    eval "$(infir2 completion bash)"        in ~/.bashrc

Where there is nothing to complete, the shell completes file names.
"""

import argparse
import importlib
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

from infir2.cli.arguments import OWN_OPTIONS, RECIPE_CLASSES, DescribedError, Parser
from infir2.config.keys import leaf_keys, lookup
from infir2.config.schema import RlRecipe
from infir2.errors import ConfigError
from infir2.terminal import print_result

# The words before the cursor are taken from the line, since bash splits options at "=" and ":".
_BASH = """\
_infir2() {
    local line="${COMP_LINE:0:COMP_POINT}" words cur
    read -ra words <<< "$line"
    [[ "$line" == *" " ]] && words+=("")
    cur="${words[${#words[@]}-1]}"
    mapfile -t COMPREPLY < <(infir2 completion words -- "${words[@]:1}" 2>/dev/null)
    if [[ "$cur" == *=* ]]; then COMPREPLY=("${COMPREPLY[@]#*=}"); fi
    [[ "${COMPREPLY[0]}" == *= ]] && compopt -o nospace
}
complete -o default -F _infir2 infir2"""
_OVERRIDES = (*RECIPE_CLASSES, "check", "plan")


def completion(arguments: Sequence[str]) -> None:
    """infir2 completion bash; infir2 completion words -- WORD... prints what may follow."""
    if arguments[:2] == ["words", "--"]:
        if found := completions(list(arguments[2:]) or [""]):  # an empty line would be a match
            print_result("\n".join(found))
        return
    parser = Parser(
        prog="infir2 completion",
        description='Prints the completion for bash: eval "$(infir2 completion bash)"',
    )
    parser.add_argument("shell", choices=("bash",), metavar="bash", help="the shell")
    parser.parse_args(arguments)
    print_result(_BASH)


def completions(words: list[str]) -> list[str]:
    """What the last word may become; the others precede it. Empty where it is a file."""
    from infir2.cli import VERBS

    *before, current = words
    if not before:
        return [verb for verb in (*VERBS, "--help", "--version") if verb.startswith(current)]
    verb = before[0]
    if verb not in VERBS:
        return []
    found: list[str] = []
    if verb in _OVERRIDES and current.startswith("--"):
        found = _key_values(current) if "=" in current else _keys(verb)
    if verb not in RECIPE_CLASSES and verb != "check":
        found += _options(_parser(verb), before[1:], current)
    elif verb == "check" and len(before) == 1:
        found += list(RECIPE_CLASSES)
    return sorted({word for word in found if word.startswith(current)})


def _keys(verb: str) -> list[str]:
    known = RECIPE_CLASSES.get(verb, RlRecipe)
    return [*(f"--{key.name}=" for key in leaf_keys(known)), *OWN_OPTIONS[verb], "--help"]


def _key_values(current: str) -> list[str]:
    """The values of a key that has few: `--fp8.enabled=` true and false."""
    key = current.removeprefix("--").partition("=")[0]
    annotation: Any = lookup(RlRecipe, key)
    values = ["true", "false"] if annotation is bool else []
    if get_origin(annotation) is Literal:
        values = [str(value) for value in get_args(annotation)]
    return [f"--{key}={value}" for value in values]


def _parser(verb: str) -> argparse.ArgumentParser:
    """The parser that a verb's function builds."""
    from infir2.cli import VERBS

    entry = VERBS[verb]
    function = getattr(importlib.import_module(f"infir2.cli.{entry.module}"), entry.function)
    Parser.describes = True
    try:
        function([])
    except (DescribedError, ConfigError) as error:
        return error.parser if isinstance(error, DescribedError) else Parser()
    finally:
        Parser.describes = False
    return Parser()


def _options(parser: argparse.ArgumentParser, before: Sequence[str], current: str) -> list[str]:
    """Options, choices and subcommands of a parser after the words `before`."""
    for number, word in enumerate(before):
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction) and word in action.choices:
                return _options(action.choices[word], before[number + 1 :], current)
    named = {name: action for action in parser._actions for name in action.option_strings}
    if before and before[-1] in named and named[before[-1]].nargs != 0:
        return [str(choice) for choice in named[before[-1]].choices or ()]
    if current.startswith("-"):
        return list(named)
    positional = [action for action in parser._actions if not action.option_strings]
    return [str(choice) for action in positional for choice in action.choices or ()]
