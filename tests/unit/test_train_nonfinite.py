"""FP8 blocks with an Inf or NaN are counted in the metrics of their step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from stages import lines, options, run
from torch import Tensor, nn

from infir2.numerics import nonfinite_blocks
from infir2.train.trainer import StepResult, Trainer


def counts(world: Path, directory: Path) -> list[int]:
    nonfinite_blocks.take(torch.device("cpu"))  # of earlier tests in this process
    run(options(world, directory, "cpt", schedule__total_steps=4, train__validate_every=0))
    return [line["nonfinite_blocks"] for line in lines(directory, "train")]


def test_a_nonfinite_gradient_is_counted(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFIR2_FAULTS", "train.loss:2:nan")
    first, second, *later = counts(world, tmp_path / "run")
    assert (first, *later) == (0, 0, 0)
    assert second > 0


def test_an_infinite_activation_is_counted(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    real = Trainer.step

    def plant(_: nn.Module, __: Any, embedded: Tensor) -> Tensor:
        value = torch.zeros_like(embedded)
        value[0, 0] = torch.inf
        return embedded + value

    def step(self: Trainer, *arguments: Any, **options: Any) -> StepResult:
        steps.append(len(steps) + 1)
        if steps[-1] != 2:
            return real(self, *arguments, **options)
        hook = self.model.model.embed_tokens.register_forward_hook(plant)
        result = real(self, *arguments, **options)
        hook.remove()
        return result

    monkeypatch.setattr(Trainer, "step", step)
    first, second, *later = counts(world, tmp_path / "run")
    assert (first, *later) == (0, 0, 0)
    assert second > 0
