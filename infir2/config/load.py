"""Merge TOML files, environment variables and options into one checked recipe.

From lowest to highest priority: the file that `extends` names, the file itself, further files,
environment variables, `--section.key=value` options. Tables merge key by key. A list replaces the
earlier list, except that `data.sources.0.path` (an option, or a table `[data.sources.0]`) changes
one element. A relative path is relative to the working directory; in `extends`, to the file.
"""

import re
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
    lookup,
    section_class,
)
from infir2.config.paths import unusable_paths
from infir2.config.rules import violations
from infir2.config.toml import parse, read_chain, shown
from infir2.config.unknown import unknown_key
from infir2.errors import ConfigError

R = TypeVar("R", bound=BaseModel)
_REQUIREMENTS = {  # pydantic's error type -> how the sentence "KEY ..." continues
    "bool_type": "must be true or false",
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "string_type": "must be text, in quotes",
    "tuple_type": "must be a list",
}


@dataclass(frozen=True)
class Loaded(Generic[R]):
    """A checked recipe and the origin of each value.

    Attributes:
        recipe: the recipe.
        provenance: {dotted key: origin}, such as {"data.sources.0.path": "file:recipes/x.toml"};
            an origin is "file:PATH", "option", "environment NAME" or "default".
        notes: sentences to print about the environment variables that were used.
        accept_changes: `--accept-changes`, a resumed run may change keys that are not safe.
    """

    recipe: R
    provenance: dict[str, str]
    notes: tuple[str, ...] = ()
    accept_changes: bool = False


class _Layers:
    """The values merged so far, and the origin of each leaf key."""

    def __init__(self, recipe_class: Recipe) -> None:
        self.recipe_class = recipe_class
        self.values: dict[str, Any] = {}
        self.origins: dict[str, str] = {}
        self.location = ""  # of the layer being merged, for error sentences

    def merge(self, table: Mapping[str, Any], origin: str, key: str = "") -> None:
        """Merge a table over the values so far.

        Args:
            table: nested TOML tables.
            origin: origin of the values, as in `Loaded.provenance`.
            key: dotted key of an option or variable, for error sentences.
        """
        self.location = _location(origin, key)
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
                raise ConfigError(f"{self.location}: {unknown_key(self.recipe_class, key)}")
            if section_class(kind) is not None:
                if not isinstance(value, Mapping):
                    raise ConfigError(
                        f"{self.location}: {key} is a section, so write [{key}] and keys under it, "
                        "not a single value."
                    )
                self._merge_section(into.setdefault(name, {}), kind, value, f"{key}.", origin)
            elif item_class(kind) is not None:
                self._merge_tables(into, name, kind, value, key, origin)
            elif isinstance(value, Mapping) and value:
                inner = f"{key}.{next(iter(value))}"
                raise ConfigError(f"{self.location}: {unknown_key(self.recipe_class, inner)}")
            else:
                into[name], self.origins[key] = value, origin

    def _merge_tables(
        self, into: dict[str, Any], name: str, kind: Any, value: Any, key: str, origin: str
    ) -> None:
        value = _with_text_key(item_class(kind), value)
        if isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
            into[name] = []
            self.origins = {
                k: o for k, o in self.origins.items() if k != key and not k.startswith(f"{key}.")
            }
            self.origins[key] = origin
            value = {str(index): item for index, item in enumerate(value)}
        elif not isinstance(value, Mapping) or not all(
            re.fullmatch("[0-9]{1,9}", index) and isinstance(item, Mapping)
            for index, item in value.items()
        ):
            raise ConfigError(
                f"{self.location}: {key} is a list of tables, so write [[{key}]] and keys under "
                f"it, or {key}.0.KEY for one."
            )
        items = into.setdefault(name, [])
        for index, item in value.items():
            if int(index) > len(items):
                raise ConfigError(
                    f"{self.location}: {key}.{index} is not an element of {key}, "
                    f"which has {len(items)}; count from 0."
                )
            if int(index) == len(items):
                items.append({})
            self._merge_section(
                items[int(index)], item_class(kind), item, f"{key}.{index}.", origin
            )

    def set_text(self, key: str, text: str, origin: str) -> None:
        """Set one key from text: an option's or an environment variable's value."""
        if text != text.encode("utf-8", "ignore").decode():
            raise ConfigError(
                f"{_location(origin, key)}: the value is not valid UTF-8, which a recipe cannot "
                "store; rename the file or directory."
            )
        value: Any = _parse_text(lookup(self.recipe_class, key), text)
        for name in reversed(key.split(".")):
            value = {name: value}
        self.merge(value, origin, key)

    def set_source(self, key: str, path: str, origin: str) -> None:
        """Replace a list of sources by one path, keeping the field names of the first source."""
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


def _with_text_key(section: Recipe | None, value: Any) -> Any:
    """A text, or a list of texts, as tables: `reward = "math"` is `[{name = "math"}]`."""
    key = getattr(section, "text_key", "")
    if not key or not isinstance(value, str | list):
        return value
    items = [value] if isinstance(value, str) else value
    return [{key: item} if isinstance(item, str) else item for item in items]


def load(
    recipe_class: type[R],
    paths: Sequence[str | Path],
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    verb: str = "",
) -> Loaded[R]:
    """Read, merge and check a recipe.

    Args:
        recipe_class: TrainRecipe, RlRecipe or EvalRecipe.
        paths: recipe files; later files override earlier ones.
        overrides: options `--section.key=value`; the value is TOML, and text needs no quotes.
        environ: environment variables; None or {} uses none.
        verb: "cpt" or "sft" adds the checks that are specific to it.

    Raises:
        ConfigError: one sentence with the file, option or variable, and the key.
    """
    layers = _Layers(recipe_class)
    for path in paths:
        for file, table in read_chain(Path(path)):
            layers.merge(table, f"file:{file}")
    notes = _merge_environment(layers, environ or {})
    for option in overrides:
        key, equals, text = option.removeprefix("--").partition("=")
        if not equals:
            raise ConfigError(f"option {option}: write it as --{key}=VALUE.")
        layers.set_text(key, text, "option")
    recipe = _validate(recipe_class, layers, _last_file(paths))
    values = flatten(recipe)
    provenance = {key: layers.origins.get(key, "default") for key in values}
    for key, sentence in [*unusable_paths(values), *violations(recipe, verb)]:
        origin = layers.origins.get(key, "default")
        location = _last_file(paths) if origin == "default" else _location(origin, key)
        raise ConfigError(f"{location}: {sentence}")
    return Loaded(recipe, provenance, notes)


def sections_in(paths: Sequence[str | Path]) -> set[str]:
    """Return the names of the sections in recipe files; checks no keys.

    Raises:
        ConfigError: a file is missing or is not valid TOML.
    """
    return {name for path in paths for _, table in read_chain(Path(path)) for name in table}


def _merge_environment(layers: _Layers, environ: Mapping[str, str]) -> tuple[str, ...]:
    notes = []
    run_dir = str(layers.values.get("run", {}).get("dir", ""))
    has_benchmarks = bool(layers.values.get("benchmarks", {}).get("names"))
    for variable in set_variables(layers.recipe_class, environ, run_dir, has_benchmarks):
        if variable.key:
            set_value = layers.set_source if variable.key in SOURCES else layers.set_text
            set_value(variable.key, variable.value, f"environment {variable.name}")
        notes.append(variable.note)
    return tuple(notes)


def _parse_text(annotation: Any, text: str) -> Any:
    """Parse text as a TOML value; text that is not TOML stays text, for the type check."""
    try:
        table = parse(f"value = {text}")
        value = table["value"] if len(table) == 1 else text
    except ValueError:
        value = text
    if is_text(annotation):
        return value if isinstance(value, str) else text
    if is_text_list(annotation) and not isinstance(value, list):
        return [part.strip() for part in str(value).split(",") if part.strip()]
    return value


def _validate(recipe_class: type[R], layers: _Layers, last_file: str) -> R:
    try:
        return recipe_class.model_validate(_tuples(layers.values))
    except ValidationError as error:
        first, *more = error.errors(include_url=False)
        key = ".".join(str(part) for part in first["loc"])
        location = _location(layers.origins[key], key) if key in layers.origins else last_file
        rest = f" ({len(more)} more like this)" if more else ""
        raise ConfigError(f"{location}: {_sentence(recipe_class, key, first)}{rest}") from None


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
    requirement = _REQUIREMENTS.get(error["type"]) or error["msg"].replace(
        "Input should", "must", 1
    )
    if error["type"] in ("int_type", "float_type") and _has_unit(error["input"]):
        requirement += " without a unit"
    if error["type"] == "int_type" and isinstance(number := error["input"], float):
        whole = number.is_integer() and abs(number) < 2**53
        requirement += f" ({int(number)}, without point and exponent)" if whole else ""
    return f"{key} {requirement}, not {shown(error['input'])}."


def _has_unit(value: Any) -> bool:
    """Whether this is a number and a unit: "32k", "10 min", "5%"."""
    return isinstance(value, str) and bool(re.fullmatch(r"[+-]?[\d._]+\s*[a-zA-Z%]+", value))


def _tuples(value: Any) -> Any:
    """Convert TOML's lists to tuples, which the strict schema requires."""
    if isinstance(value, dict):
        return {name: _tuples(item) for name, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _location(origin: str, key: str = "") -> str:
    """Return how an error sentence names an origin."""
    if origin == "option":
        return f"option --{key}" if key else "option"
    return origin.removeprefix("file:")


def _last_file(paths: Sequence[str | Path]) -> str:
    return str(paths[-1]) if paths else "recipe"
