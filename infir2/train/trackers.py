"""Weights & Biases and trackio: the numbers of metrics.jsonl under the same names.

A run keeps one identity over its restarts, from its directory. Of steps that run again after a
resume wandb keeps the first values, and trackio both.
"""

import hashlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from infir2.checkpoint.record import Show, View
from infir2.errors import ConfigError

PROJECT = "infir2"


def make_tracker(name: str, run_dir: Path, recipe: dict[str, Any]) -> View | None:
    """The view that `train.tracker` names; None for TensorBoard alone.

    Raises ConfigError if its library is not installed.
    """
    check_tracker(name)
    return None if name == "tensorboard" else Tracker(name, run_dir, recipe)


def check_tracker(name: str) -> None:
    """Raises ConfigError if the library that `train.tracker` names is not installed."""
    if name != "tensorboard" and find_spec(name) is None:
        raise ConfigError(
            f"train.tracker is {name}, which is not installed: pip install 'infir2[{name}]', or "
            "set train.tracker = 'tensorboard'."
        )


class Tracker(View):
    """Logs to a library with wandb's functions; `recipe` is shown as the run's settings."""

    def __init__(self, name: str, run_dir: Path, recipe: dict[str, Any]) -> None:
        super().__init__()
        self.name, self._dir, self._recipe = name, run_dir.resolve(), recipe

    def open(self) -> tuple[Show, Callable[[], object]]:
        digest = hashlib.sha256(str(self._dir).encode()).hexdigest()[:8]
        title = f"{self._dir.parent.name}-{self._dir.name}"
        options: dict[str, Any] = {"project": PROJECT, "config": self._recipe, "resume": "allow"}
        if self.name == "wandb":
            import wandb as library

            # Its own directory, and no copy of what the terminal shows.
            options |= {"dir": str(self._dir), "id": f"{title}-{digest}", "name": title}
            options |= {"settings": library.Settings(console="off", silent=True)}
        else:
            import trackio as library

            options |= {"name": f"{title}-{digest}", "embed": False}
        run: Any = library.init(**options)
        return (lambda values, step: run.log(values, step=step)), run.finish
