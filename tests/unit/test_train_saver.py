"""Saves of a running training: a failed one neither hangs the end of a run nor is forgotten."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from infir2.checkpoint import Store
from infir2.config.schema import CheckpointSection
from infir2.errors import CheckpointError
from infir2.train.run_log import RunLog
from infir2.train.saver import Saver


class OneTensor:
    """As much of a Trainer as a Saver asks for."""

    before_update: Any = None

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"parameters/w": torch.ones(3)}

    def shard_specs(self) -> dict[str, Any]:
        return {}


def saver_of(tmp_path: Path, **section: Any) -> Saver:
    store = Store(tmp_path, keep=2)
    saver = Saver(store, CheckpointSection(**section), "cpt", RunLog("cpt", True), saved_step=0)
    saver.attach(OneTensor())  # type: ignore[arg-type]
    return saver


@pytest.mark.parametrize("background", [True, False])
def test_a_finished_save_moves_the_saved_step(tmp_path: Path, background: bool) -> None:
    saver = saver_of(tmp_path, background=background)
    saver.save(1, {})
    saver.finish_pending_save()
    assert saver.saved_step == 1
    saver.close()


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt(), CheckpointError("full")])
def test_a_foreground_save_that_fails_in_any_way_lets_the_run_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """Its future used to stay open for every error but CheckpointError: close() waited forever."""
    saver = saver_of(tmp_path, background=False)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(saver._store, "save", fail)
    with pytest.raises(type(error)):
        saver.save(1, {})
    closing = threading.Thread(target=saver.close, daemon=True)
    closing.start()
    closing.join(10)
    assert not closing.is_alive()
    assert saver.saved_step == 0


def test_a_failed_save_may_be_an_event_instead(tmp_path: Path, monkeypatch: Any) -> None:
    saver = saver_of(tmp_path, background=False, on_save_error="warn")

    def fail(*_: object) -> None:
        raise CheckpointError("the disk is full")

    monkeypatch.setattr(saver._store, "save", fail)
    saver.save(1, {})
    assert saver.saved_step == 0
