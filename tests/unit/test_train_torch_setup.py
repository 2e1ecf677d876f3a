"""`run.threads` and `run.deterministic` reach torch."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from infir2.config.load import load
from infir2.config.schema import EvalRecipe, RunSection
from infir2.demo.stages import RECIPES
from infir2.errors import ConfigError
from infir2.evaluate.run import run_evaluation
from infir2.train.plan import set_up_torch


@pytest.fixture(autouse=True)
def torch_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    threads, fills = torch.get_num_threads(), torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fills


def test_the_defaults_change_nothing() -> None:
    threads = torch.get_num_threads()
    set_up_torch(RunSection())
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_an_evaluation_sets_torch_up_before_it_loads_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def stop(section: RunSection) -> None:
        asked.append(section.threads)
        raise InterruptedError

    monkeypatch.setattr("infir2.evaluate.run.set_up_torch", stop)
    options = [f"--run.dir={tmp_path / 'e'}", "--run.threads=3", "--model.path=hf"]
    with pytest.raises(InterruptedError):
        run_evaluation(load(EvalRecipe, [RECIPES / "eval.toml"], options))
    assert asked == [3]


def test_a_gpu_without_flash_attention_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("infir2.train.plan.flash_attention_4", lambda: None)
    with pytest.raises(ConfigError, match="needs FlashAttention 4 on a GPU"):
        set_up_torch(RunSection(deterministic=True))
    assert not torch.are_deterministic_algorithms_enabled()


def test_both_keys_reach_torch() -> None:
    threads = torch.get_num_threads() + 1
    set_up_torch(RunSection(threads=threads, deterministic=True))
    assert torch.get_num_threads() == threads
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
