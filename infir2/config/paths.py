"""Paths that a recipe or a command line names."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from infir2.errors import ConfigError

_HUB = re.compile(r"(?:https?://?huggingface\.co/|hf://?)?([\w-][\w.-]*/([\w.-]+))/?")
_OUR_FOLDERS = ("runs", "models", "checkpoints", "data", "exports", "recipes")
_PATH_KEYS = re.compile(
    r"run\.dir|model\.path|data\.tokenizer|.*\.\d+\.path|checkpoint\.branch_from|rl\.reference"
    r"|rollout\.(model|python)|benchmarks\.data"
)
_TILDE = re.compile(r"(?:(-[^=\s]*)=)?(~[\w.-]*/.*)", re.DOTALL)


def unusable_paths(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(key, sentence) of each path that the shell should have expanded, or with escapes in it.

    `values` are those of a recipe by dotted key.
    """
    found = []
    for key, value in values.items():
        if not isinstance(value, str) or not _PATH_KEYS.fullmatch(key):
            continue
        if value.startswith("~"):
            found.append((key, f"{key} = {value!r}: {_no_tilde(value)}"))
        elif re.search(r"\$\w|\$\{", value) and not Path(value).exists():
            written = os.path.expandvars(value)
            rest = f": {written}" if written != value else ""
            text = f"{key} = {value!r}: a recipe knows no variables; write the path itself{rest}."
            found.append((key, text))
        elif re.search(r"[\a\b\t\n\v\f\r\x1b]", value) and not Path(value).exists():
            text = (
                f"{key} = {value!r} contains a control character: a backslash between double "
                "quotes starts an escape; write / or put the path in single quotes."
            )
            found.append((key, text))
    return found


def refuse_tildes(words: Iterable[str]) -> None:
    """Raise ConfigError for `--to=~/x`, which a shell leaves as it is, and for a quoted `~/x`."""
    for word in words:
        if (match := _TILDE.fullmatch(word)) and not Path(match[2]).exists():
            option = f"{match[1]}: " if match[1] else ""
            raise ConfigError(f"{option}{match[2]}: {_no_tilde(match[2])}")


def _no_tilde(path: str) -> str:
    return f"only a shell knows ~, at the start of a word; write {os.path.expanduser(path)}."


def check_model_directory(key: str, path: str) -> None:
    """Raise ConfigError unless `path`, the value of `key`, is a directory.

    Names of the Hugging Face hub get their own sentence: users of other stacks write them.
    """
    if Path(path).is_dir():
        return
    if Path(path).is_file() and Path(path).suffix in (".safetensors", ".json", ".bin"):
        raise ConfigError(
            f"{key}: {path} is a file of a model; name its directory, {Path(path).parent}."
        )
    if Path(path).is_file():
        raise ConfigError(
            f"{key}: {path} is a file, not a model's directory; name the directory, or convert "
            f"the file first: infir2 import hf {path} --to DIR."
        )
    if hub := _hub_name(path):
        name, directory = hub
        raise ConfigError(
            f"{key}: {name} is not a local directory, and infir2 downloads nothing. Download the "
            f"model first: hf download {name} --local-dir models/{directory}; "
            f"then name models/{directory} instead."
        )
    raise ConfigError(
        f"{key}: {path} does not exist; run the stage that writes it, or name a local Hugging "
        "Face or run directory."
    )


def check_tokenizer_directory(key: str, path: Path) -> None:
    """Raise ConfigError unless `path`, the value of `key`, is a directory with tokenizer.json."""
    if (path / "tokenizer.json").is_file():
        return
    if path.is_file():
        raise ConfigError(f"{key}: {path} is a file; name its directory, {path.parent}.")
    if path.is_dir():
        raise ConfigError(f"{key}: {path} has no tokenizer.json; name the model's directory.")
    if hub := _hub_name(str(path)):
        raise ConfigError(
            f"{key}: {path} is not a local directory, and infir2 downloads nothing. Download the "
            f"tokenizer first: hf download {hub[0]} --include 'tokenizer*' --local-dir "
            f"models/{hub[1]}; then name models/{hub[1]} instead."
        )
    raise ConfigError(
        f"{key}: {path} has no tokenizer.json: there is no such directory; name another "
        "(infir2 data demo writes the demo's)."
    )


def _hub_name(path: str) -> tuple[str, str] | None:
    """(OWNER/NAME, NAME) if the text looks like a name on the Hugging Face hub."""
    hub = _HUB.fullmatch(path)
    folder = path.split("/")[0]
    if not hub or folder in _OUR_FOLDERS or Path(folder).exists():
        return None
    return hub[1], hub[2]
