"""wandb and trackio: the numbers of metrics.jsonl under the names of TensorBoard."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest
from stages import lines, make_world, options

from infir2.cli import main
from infir2.train import trackers


class Library(types.ModuleType):
    """What the two libraries have in common; it remembers what it is told."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.inits: list[dict[str, Any]] = []
        self.rows: list[tuple[dict[str, float], int]] = []
        self.finished = 0

    def Settings(self, **values: Any) -> dict[str, Any]:  # noqa: N802 - wandb's name
        return values

    def init(self, **values: Any) -> "Library":
        self.inits.append(values)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.rows.append((values, step))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("trackers") / "world")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_shows_what_metrics_jsonl_has(
    name: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Library(name)
    monkeypatch.setitem(sys.modules, name, library)
    monkeypatch.setattr(trackers, "find_spec", lambda _: object())
    words = options(world, tmp_path / "run", "cpt", train__tracker=name, train__validate_every=2)
    assert main([*words, "--train.stop_after_step=2"]) == 0
    assert main([*words, "--train.stop_after_step=3"]) == 0
    first, second = library.inits
    same = [{k: v for k, v in values.items() if k != "config"} for values in (first, second)]
    assert same[0] == same[1], "a resumed run is the same run"
    assert first["project"] == "infir2"
    assert first["config"]["train.tracker"] == name
    assert library.finished == 2
    shown = {step: values for values, step in library.rows if "train/loss" in values}
    written = lines(tmp_path / "run", "train")
    assert sorted(shown) == [1, 2, 3]
    for line in written:
        numbers = {k: v for k, v in line.items() if isinstance(v, float | int) and k != "step"}
        numbers = {k: v for k, v in numbers.items() if not isinstance(v, bool)}
        assert shown[line["step"]] == {f"train/{k}": v for k, v in numbers.items()}
    assert any("validation/validation_loss" in values for values, _ in library.rows)
    assert list((tmp_path / "run").glob("events.out.tfevents.*")), "TensorBoard is there too"


def test_a_tracker_that_fails_does_not_end_the_run(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    library = Library("wandb")

    def refuse(**_: Any) -> Library:
        raise ConnectionError("no network")

    monkeypatch.setattr(library, "init", refuse)
    monkeypatch.setitem(sys.modules, "wandb", library)
    monkeypatch.setattr(trackers, "find_spec", lambda _: object())
    words = options(world, tmp_path / "run", "cpt", train__tracker="wandb")
    assert main([*words, "--train.stop_after_step=1"]) == 0
    assert "wandb stopped (no network); metrics.jsonl is still written" in capsys.readouterr().err
    assert lines(tmp_path / "run", "train")


def test_a_missing_library_is_named_before_the_first_step(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda _: None)
    assert main(options(world, tmp_path / "run", "cpt", train__tracker="trackio")) == 2
    assert "pip install 'infir2[trackio]'" in capsys.readouterr().err
