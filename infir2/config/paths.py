"""Directories that a recipe names."""

import re
from pathlib import Path

from infir2.errors import ConfigError

_HUB = re.compile(r"(?:https?://huggingface\.co/|hf://)?([\w-][\w.-]*/([\w.-]+))/?")
_OUR_FOLDERS = ("runs", "models", "checkpoints", "data", "exports", "recipes")


def check_model_directory(key: str, path: str) -> None:
    """Raise ConfigError unless `path`, the value of `key`, is a directory.

    Names of the Hugging Face hub get their own sentence: users of other stacks write them.
    """
    if Path(path).is_dir():
        return
    if Path(path).is_file():
        raise ConfigError(
            f"{key}: {path} is a file, not a model's directory; name the directory, or convert "
            f"the file first: infir2 import hf {path} --to DIR."
        )
    hub = _HUB.fullmatch(path)
    folder = path.split("/")[0]
    if hub and folder not in _OUR_FOLDERS and not Path(folder).exists():
        name, directory = hub.groups()
        raise ConfigError(
            f"{key}: {path} is not a local directory, and infir2 downloads nothing. Download the "
            f"model first: hf download {name} --local-dir models/{directory}; "
            f"then name models/{directory} instead."
        )
    raise ConfigError(
        f"{key}: {path} does not exist; run the stage that writes it, or name a local Hugging "
        "Face or run directory."
    )
