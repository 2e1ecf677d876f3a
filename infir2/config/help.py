"""What `infir2 VERB --help` prints about the keys of a recipe: meaning, unit and default, straight from the schema."""

import json
import textwrap
import types
from typing import Any, Literal, Union, get_args, get_origin

from infir2.config.env_vars import variables_of
from infir2.config.keys import Recipe, is_text_list, leaf_keys

_TYPE_WORDS = {str: "TEXT", int: "INTEGER", float: "NUMBER", bool: "true|false"}


def describe_keys(recipe_class: Recipe, width: int = 100) -> str:
    """Every key with its type, meaning and default, by section; `width` is the terminal's, in columns."""
    lines: list[str] = []
    section = ""
    for key in leaf_keys(recipe_class):
        parent = key.name.rpartition(".")[0]
        if parent != section:
            section = parent
            lines += [
                "",
                f"[{section}]"
                if not section.endswith(".0")
                else f"[[{section.removesuffix('.0')}]]  (a list; .0 is the first)",
            ]
        default = (
            "required"
            if key.field.is_required()
            else f"default {json.dumps(key.field.get_default())}"
        )
        lines.append(f"  --{key.name}={_type_word(key.field.annotation)}")
        lines += textwrap.wrap(
            f"{key.field.description} ({default})",
            width,
            initial_indent=" " * 6,
            subsequent_indent=" " * 6,
        )
    return "\n".join(lines)


def describe_variables(recipe_class: Recipe) -> str:
    """The environment variables that set keys of this recipe."""
    named = [f"  {name} sets {key}" for name, key in variables_of(recipe_class).items() if key]
    return "\n".join(named)


def _type_word(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "|".join(str(choice) for choice in get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        return "|".join(
            _type_word(option) for option in get_args(annotation) if option is not type(None)
        )
    return "TEXT,TEXT" if is_text_list(annotation) else _TYPE_WORDS[annotation]
