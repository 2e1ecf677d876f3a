"""The help on recipe keys in `infir2 VERB --help`: type, meaning and default, from the schema."""

import json
import textwrap
import types
from typing import Any, Literal, Union, get_args, get_origin

from infir2.config.env_vars import variables_of
from infir2.config.keys import Key, Recipe, is_text_list, leaf_keys

_TYPE_NAMES = {str: "TEXT", int: "INTEGER", float: "NUMBER", bool: "true|false"}


def describe_keys(recipe_class: Recipe, width: int = 100) -> str:
    """Return the help on every key by section: type, meaning, default.

    Args:
        width: width of the terminal, columns.
    """
    lines: list[str] = []
    section = ""
    for key in leaf_keys(recipe_class):
        parent = key.name.rpartition(".")[0]
        if parent != section:
            section = parent
            lines += ["", _section_header(section)]
        lines += _describe_key(key, width)
    return "\n".join(lines)


def _section_header(section: str) -> str:
    if section.endswith(".0"):
        return f"[[{section.removesuffix('.0')}]]  (a list; .0 is the first element)"
    return f"[{section}]"


def _describe_key(key: Key, width: int) -> list[str]:
    field = key.field
    default = "required" if field.is_required() else f"default {json.dumps(field.get_default())}"
    text = f"{field.description} ({default})"
    indent = " " * 6
    return [
        f"  --{key.name}={_type_name(field.annotation)}",
        *textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent),
    ]


def describe_variables(recipe_class: Recipe) -> str:
    """Return the help on the environment variables that set keys of this kind of recipe."""
    lines = [f"  {name} sets {key}" for name, key in variables_of(recipe_class).items() if key]
    return "\n".join(lines)


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "|".join(str(choice) for choice in get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        return "|".join(
            _type_name(option) for option in get_args(annotation) if option is not type(None)
        )
    return "TEXT,TEXT" if is_text_list(annotation) else _TYPE_NAMES[annotation]
