"""The dotted keys of a recipe class, found by walking its pydantic fields.

A key is a path of field names, such as `schedule.total_steps`. An element of a list of tables is
named by its index: `data.sources.0.path`.
"""

import types
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

Recipe = type[BaseModel]


def section_class(annotation: Any) -> Recipe | None:
    """Return the section class of an annotation: S for `S` and `S | None`, otherwise None."""
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [
            section_class(option) for option in get_args(annotation) if option is not type(None)
        ]
        return kinds[0] if len(kinds) == 1 else None
    return (
        annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    )


def item_class(annotation: Any) -> Recipe | None:
    """Return the section class of a list of tables: S for `tuple[S, ...]`, otherwise None."""
    return section_class(get_args(annotation)[0]) if get_origin(annotation) is tuple else None


def child(annotation: Any, name: str) -> Any:
    """Return the annotation of a section's field or of a list's element; None if there is none.

    `name` is a field name for a section, and an index in decimal digits for a list of tables.
    """
    section = section_class(annotation)
    if section is not None:
        return section.model_fields[name].annotation if name in section.model_fields else None
    return item_class(annotation) if name.isdecimal() else None


def lookup(recipe_class: Recipe, key: str) -> Any:
    """Return the annotation of a dotted key; None if the recipe class has no such key."""
    annotation: Any = recipe_class
    for name in key.split("."):
        annotation = child(annotation, name)
        if annotation is None:
            return None
    return annotation


class Key(NamedTuple):
    """A leaf of the schema, such as `data.sources.0.path`, and its field."""

    name: str
    field: FieldInfo


def leaf_keys(recipe_class: Recipe, prefix: str = "") -> Iterator[Key]:
    """Yield every leaf in the order of the schema; element 0 represents a list of tables."""
    for name, field in recipe_class.model_fields.items():
        key = f"{prefix}{name}"
        section, item = section_class(field.annotation), item_class(field.annotation)
        if section is not None:
            yield from leaf_keys(section, f"{key}.")
        elif item is not None:
            yield from leaf_keys(item, f"{key}.0.")
        else:
            yield Key(key, field)


def flatten(section: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Return {dotted key: value} in the order of the schema; an empty list of tables is a leaf."""
    flat: dict[str, Any] = {}
    for name in type(section).model_fields:
        key, value = f"{prefix}{name}", getattr(section, name)
        if isinstance(value, BaseModel):
            flat |= flatten(value, f"{key}.")
        elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
            for index, item in enumerate(value):
                flat |= flatten(item, f"{key}.{index}.")
        else:
            flat[key] = value
    return flat


def is_text(annotation: Any) -> bool:
    """Whether a key's value is a string or a choice, which needs no quotes on the command line."""
    return annotation is str or get_origin(annotation) is Literal


def is_text_list(annotation: Any) -> bool:
    """Whether a key's value is a list of strings."""
    return get_origin(annotation) is tuple and get_args(annotation)[0] is str
