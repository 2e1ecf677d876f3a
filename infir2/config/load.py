"""Recipes from TOML files, environment variables and options into one checked object.

Order, the later wins: `extends`, the file, further files, environment variables, `--section.key=value` options. Tables
merge key by key; a list replaces the earlier list as a whole, except that `data.sources.0.path` (an option, or a
table `[data.sources.0]`) changes one element. A relative path inside a recipe is relative to the current directory, `extends` to the
file that says it.
"""

import difflib
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from infir2.config.env_vars import SOURCES, set_variables
from infir2.config.keys import (
    Recipe,
    child,
    flatten,
    is_text,
    is_text_list,
    item_class,
    leaf_keys,
    lookup,
    section_class,
)
from infir2.config.rules import problems
from infir2.errors import ConfigError

R = TypeVar("R", bound=BaseModel)
_MUST = {
    "bool_type": "must be true or false",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "string_type": "must be text, in quotes",
    "tuple_type": "must be a list",
}


@dataclass(frozen=True)
class Loaded(Generic[R]):
    """A checked recipe, and for each of its dotted keys where the value came from.

    `provenance`: `data.sources.0.path` -> `file:recipes/x.toml` | `option` | `environment NAME` | `default`.
    `notes`: sentences about the environment variables that were used, for the terminal.
    """

    recipe: R
    provenance: dict[str, str]
    notes: tuple[str, ...] = ()
    accept_changes: bool = False


class _Layers:
    """The values merged so far, and the origin of each leaf."""

    def __init__(self, recipe_class: Recipe) -> None:
        self.recipe_class = recipe_class
        self.values: dict[str, Any] = {}
        self.origins: dict[str, str] = {}
        self.place = ""

    def merge(self, table: Mapping[str, Any], origin: str, key: str = "") -> None:
        """Puts a table over the values so far; `key` is the one key of an option or variable, for errors."""
        self.place = _place(origin, key)
        self._merge_section(self.values, self.recipe_class, table, "", origin)

    def _merge_section(
        self,
        into: dict[str, Any],
        annotation: Any,
        table: Mapping[str, Any],
        prefix: str,
        origin: str,
    ) -> None:
        for name, value in table.items():
            key, kind = f"{prefix}{name}", child(annotation, name)
            if kind is None:
                raise ConfigError(f"{self.place}: {unknown_key(self.recipe_class, key)}")
            if section_class(kind) is not None:
                if not isinstance(value, Mapping):
                    raise ConfigError(
                        f"{self.place}: {key} is a section, so write [{key}] and keys under it, not a single value."
                    )
                self._merge_section(into.setdefault(name, {}), kind, value, f"{key}.", origin)
            elif item_class(kind) is not None:
                self._merge_tables(into, name, kind, value, key, origin)
            elif isinstance(value, Mapping) and value:
                raise ConfigError(
                    f"{self.place}: {unknown_key(self.recipe_class, f'{key}.{next(iter(value))}')}"
                )
            else:
                into[name], self.origins[key] = value, origin

    def _merge_tables(
        self, into: dict[str, Any], name: str, kind: Any, value: Any, key: str, origin: str
    ) -> None:
        if isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
            into[name] = []
            self.origins = {
                k: o for k, o in self.origins.items() if k != key and not k.startswith(f"{key}.")
            }
            self.origins[key] = origin
            value = {str(index): item for index, item in enumerate(value)}
        elif not isinstance(value, Mapping) or not all(
            index.isdecimal() and isinstance(item, Mapping) for index, item in value.items()
        ):
            raise ConfigError(
                f"{self.place}: {key} is a list of tables, so write [[{key}]] and keys under it, or {key}.0.KEY for one."
            )
        items = into.setdefault(name, [])
        for index, item in value.items():
            if int(index) > len(items):
                raise ConfigError(
                    f"{self.place}: {key}.{index} is not an element of {key}, which has {len(items)}; count from 0."
                )
            if int(index) == len(items):
                items.append({})
            self._merge_section(
                items[int(index)], item_class(kind), item, f"{key}.{index}.", origin
            )

    def set_text(self, key: str, text: str, origin: str) -> None:
        """One value that arrives as text, from an option or the environment."""
        if text != text.encode("utf-8", "ignore").decode():
            raise ConfigError(
                f"{_place(origin, key)}: the value is not valid UTF-8, and a recipe is text; rename what it names."
            )
        value: Any = _parse_text(lookup(self.recipe_class, key), text)
        for name in reversed(key.split(".")):
            value = {name: value}
        self.merge(value, origin, key)

    def set_source(self, key: str, path: str, origin: str) -> None:
        """One path in place of a list of sources; the first source's field names stay."""
        section, name = key.split(".")
        table = self.values.get(section, {})
        if name in table:
            del table[name][1:]
            self.origins = {
                k: o
                for k, o in self.origins.items()
                if not k.startswith(f"{key}.") or k.startswith(f"{key}.0.")
            }
        self.set_text(f"{key}.0.path", path, origin)


def load(
    recipe_class: type[R],
    paths: Sequence[str | Path],
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    verb: str = "",
) -> Loaded[R]:
    """Reads, merges and checks a recipe.

    Args:
        recipe_class: TrainRecipe, RlRecipe or EvalRecipe.
        paths: recipe files, the later override the earlier.
        overrides: options as typed, `--section.key=value`; the value is TOML, and text needs no quotes.
        environ: environment variables; None or {} uses none.
        verb: `cpt` or `sft` adds the checks that only this kind of training has.

    Raises:
        ConfigError: one sentence with the file, option or variable and the key.
    """
    layers = _Layers(recipe_class)
    for path in paths:
        for file, table in _read_chain(Path(path)):
            layers.merge(table, f"file:{file}")
    notes = _merge_environment(layers, environ or {})
    for option in overrides:
        key, equals, text = option.removeprefix("--").partition("=")
        if not equals:
            raise ConfigError(f"option {option}: write it as --{key}=VALUE.")
        layers.set_text(key, text, "option")
    recipe = _validate(recipe_class, layers, _main_place(paths))
    provenance = {key: layers.origins.get(key, "default") for key in flatten(recipe)}
    for key, sentence in problems(recipe, verb):
        origin = layers.origins.get(key, "default")
        place = _main_place(paths) if origin == "default" else _place(origin, key)
        raise ConfigError(f"{place}: {sentence}")
    return Loaded(recipe, provenance, notes)


def sections_in(paths: Sequence[str | Path]) -> set[str]:
    """The sections that recipe files set, unchecked: what kind of recipe they are. Raises ConfigError."""
    return {name for path in paths for _, table in _read_chain(Path(path)) for name in table}


def _merge_environment(layers: _Layers, environ: Mapping[str, str]) -> tuple[str, ...]:
    notes = []
    for word in set_variables(
        layers.recipe_class, environ, str(layers.values.get("run", {}).get("dir", ""))
    ):
        if word.key:
            put = layers.set_source if word.key in SOURCES else layers.set_text
            put(word.key, word.text, f"environment {word.name}")
        notes.append(word.note)
    return tuple(notes)


def _read_chain(path: Path, seen: tuple[Path, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """The file's table after those it extends, each with the name to show."""
    if path.resolve() in seen:
        raise ConfigError(
            f"{path}: extends goes round in a circle; remove one of the extends lines."
        )
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: there is no such recipe file; recipes are in recipes/."
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: this is not valid TOML: {error}.") from None
    except OSError as error:
        raise ConfigError(f"{path}: the recipe cannot be read: {error.strerror}.") from None
    base = table.pop("extends", None)
    if base is None:
        return [(str(path), table)]
    if not isinstance(base, str):
        raise ConfigError(
            f'{path}: extends must be the name of one file, such as extends = "base.toml".'
        )
    below = Path(os.path.normpath(path.parent / base))
    return [*_read_chain(below, (*seen, path.resolve())), (str(path), table)]


def _parse_text(annotation: Any, text: str) -> Any:
    """Text as the TOML value that the key takes; what TOML cannot read stays text, for the type check to refuse."""
    try:
        table = tomllib.loads(f"value = {text}")
        value = table["value"] if len(table) == 1 else text
    except tomllib.TOMLDecodeError:
        value = text
    if is_text(annotation):
        return value if isinstance(value, str) else text
    if is_text_list(annotation) and not isinstance(value, list):
        return [part.strip() for part in str(value).split(",") if part.strip()]
    return value


def _validate(recipe_class: type[R], layers: _Layers, main_place: str) -> R:
    try:
        return recipe_class.model_validate(_tuples(layers.values))
    except ValidationError as error:
        first, *more = error.errors(include_url=False)
        key = ".".join(str(part) for part in first["loc"])
        place = _place(layers.origins[key], key) if key in layers.origins else main_place
        rest = f" ({len(more)} more like this)" if more else ""
        raise ConfigError(f"{place}: {_sentence(recipe_class, key, first)}{rest}") from None


def _sentence(recipe_class: Recipe, key: str, error: Any) -> str:
    if error["type"] == "missing":
        section = section_class(lookup(recipe_class, key))
        if section is not None:
            needed = ", ".join(
                f"{key}.{name}"
                for name, field in section.model_fields.items()
                if field.is_required()
            )
            return f"section [{key}] is missing; set {needed}."
        leaf = key.rsplit(".", 1)[-1]
        parent = section_class(lookup(recipe_class, key.rpartition(".")[0]))
        meaning = parent.model_fields[leaf].description if parent else ""
        return f"{key} is missing; set it ({meaning})."
    must = _MUST.get(error["type"]) or error["msg"].replace("Input should", "must", 1)
    return f"{key} {must}, not {error['input']!r}."


def unknown_key(recipe_class: Recipe, key: str) -> str:
    """The sentence for a key that the recipe class does not have, with the nearest one that it has."""
    section = key.split(".")[0]
    if section not in recipe_class.model_fields:
        known = list(recipe_class.model_fields)
        near = difflib.get_close_matches(section, known, 1, 0.6)
        hint = f"did you mean {near[0]}?" if near else f"the sections here are {', '.join(known)}."
        return f"{section} is not a section of this kind of recipe; {hint}"
    known = [leaf.name for leaf in leaf_keys(recipe_class)]
    leaf_name = key.rsplit(".", 1)[-1]
    same_leaf = [name for name in known if name.rsplit(".", 1)[-1] == leaf_name]
    near = same_leaf[:1] or difflib.get_close_matches(key, known, 1, 0.6)
    return f"{key} is not a key" + (
        f"; did you mean {near[0]}?" if near else "; `infir2 VERB --help` lists the keys."
    )


def _tuples(value: Any) -> Any:
    """TOML's lists as the tuples that the strict schema takes."""
    if isinstance(value, dict):
        return {name: _tuples(item) for name, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _place(origin: str, key: str = "") -> str:
    """How an origin is named in an error."""
    if origin == "option":
        return f"option --{key}" if key else "option"
    return origin.removeprefix("file:")


def _main_place(paths: Sequence[str | Path]) -> str:
    return str(paths[-1]) if paths else "recipe"
