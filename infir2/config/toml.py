"""Read recipe files and values as TOML, within bounds that no recipe of a person exceeds."""

import difflib
import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from infir2.config.toml_advice import toml_advice
from infir2.errors import ConfigError
from infir2.files import read_regular

MAX_BYTES = 1 << 20
MAX_DEPTH = 16  # of keys, of arrays, and of files that extend each other
MAX_SHOWN = 200  # characters of a value or key in a sentence
_PART = r"""(?:[A-Za-z0-9_-]+|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*"""
# The time that tomllib takes for a dotted key grows with the cube of its parts.
_LONG_KEY = re.compile(rf"(?:^|[\[{{,])[ \t]*(?:{_PART}){{{MAX_DEPTH}}}", re.MULTILINE)


def read_chain(path: Path, seen: tuple[str, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """Return (path, table) of each file that `path` extends, the base first, then of `path`.

    Raises:
        ConfigError: a file is missing, not regular, too large or not valid TOML, or the chain of
            files is a circle or too long.
    """
    if os.path.realpath(path) in seen:
        raise ConfigError(f"{path}: its extends lines form a circle; remove one of them.")
    if len(seen) == MAX_DEPTH:
        raise ConfigError(f"{path}: more than {MAX_DEPTH} files extend each other; merge some.")
    table = _read(path)
    base = table.pop("extends", None)
    if base is None:
        return [(str(path), table)]
    if not isinstance(base, str):
        raise ConfigError(
            f'{path}: extends must be the name of one file, such as extends = "base.toml".'
        )
    below = Path(os.path.normpath(path.parent / base))
    return [*read_chain(below, (*seen, os.path.realpath(path))), (str(path), table)]


def _read(path: Path) -> dict[str, Any]:
    text = ""
    try:
        if path.is_dir():
            raise ConfigError(
                f"{path}: this is a directory; name a recipe, a .toml file (a model or a run is "
                f"named by --model.path={path})."
            )
        text = read_regular(path, MAX_BYTES).decode("utf-8-sig")
        return parse(text)
    except FileNotFoundError:
        raise ConfigError(f"{shown(path)}: there is no such recipe file; {_advice(path)}") from None
    except ValueError as error:
        advice = toml_advice(path, text, error)
        raise ConfigError(f"{shown(path)}: this is not valid TOML: {error}{advice}.") from None
    except OSError as error:
        raise ConfigError(f"{shown(path)}: the recipe cannot be read: {error.strerror}.") from None


def _advice(path: Path) -> str:
    """What to name instead of a recipe file that does not exist."""
    recipes = [*path.parent.glob("*.toml"), *Path("recipes").glob("*/*.toml")]
    near = difflib.get_close_matches(str(path.with_suffix(".toml")), map(str, recipes), 1, 0.8)
    return f"did you mean {near[0]}?" if near else "recipes are in recipes/."


def parse(text: str) -> dict[str, Any]:
    """Parse TOML. Raises ValueError for invalid TOML and for values that no recipe needs."""
    if _LONG_KEY.search(text):
        raise ValueError(f"a key has more than {MAX_DEPTH} parts")
    try:
        table = tomllib.loads(text)
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None
    except tomllib.TOMLDecodeError:
        raise
    except ValueError:  # more digits than Python converts
        raise ValueError("an integer has more than 64 bits") from None
    for value in _values(table):
        if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
            raise ValueError("an integer has more than 64 bits")
        if isinstance(value, str) and "\0" in value:
            raise ValueError("a text has a NUL character")
    return table


def _values(table: Any, depth: int = 0) -> Iterator[Any]:
    """Yield keys and values at every depth."""
    if depth > MAX_DEPTH:
        raise ValueError(f"its values are nested more than {MAX_DEPTH} deep")
    if isinstance(table, dict):
        yield from table
        table = list(table.values())
    if not isinstance(table, list):
        yield table
        return
    for value in table:
        yield from _values(value, depth + 1)


def shown(value: object) -> str:
    """A value or a path as an error sentence shows it: on one line, and not too long."""
    text = str(value) if isinstance(value, Path) else repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"
