"""AdamW with clipping inside, small or offloaded moments: the update of torch's AdamW, within what
the format of the moments allows.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from infir2.checkpoint import Store, open_checkpoint
from infir2.config.schema import OptimizerSection
from infir2.errors import CheckpointError
from infir2.numerics.adamw import adamw_
from infir2.numerics.adamw_reference import Hyper, Moments, new_moment
from infir2.train.optimizer import load_optimizer_tensors, make_optimizer, optimizer_tensors, update


def model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(53, 37)


def trained(section: OptimizerSection, steps: int = 20) -> tuple[nn.Linear, torch.optim.Optimizer]:
    layer = model()
    optimizer = make_optimizer(layer, section)
    run(layer, optimizer, range(steps))
    return layer, optimizer


def run(layer: nn.Linear, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        for parameter in layer.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(
                parameter.grad_dtype
            )
        optimizer.step()


CASES = [
    ({"offload": True}, 1e-6),
    ({"moment_dtype": "bf16"}, 0.01),
    ({"moment_dtype": "fp8"}, 0.15),
    ({"moment_dtype": "fp8", "offload": True}, 0.15),
    ({"grad_dtype": "bf16"}, 0.01),
]


@pytest.mark.parametrize(("keys", "bound"), CASES)
def test_updates_are_torch_s_within_the_format_s_error(keys: dict, bound: float) -> None:
    expected, found, start = (
        trained(OptimizerSection())[0],
        trained(OptimizerSection(**keys))[0],
        model(),
    )
    for wanted, got, before in zip(
        expected.parameters(), found.parameters(), start.parameters(), strict=True
    ):
        assert (got - wanted).norm() < bound * (wanted - before).norm()


def test_offloaded_moments_are_handed_out_when_the_gpu_has_brought_them_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """tests/gpu/test_gpu_parallel.py saves them from a GPU that is late."""
    waits = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(1))
    for offload, expected in ((False, 0), (True, 1)):
        layer, optimizer = trained(OptimizerSection(moment_dtype="bf16", offload=offload), 1)
        optimizer_tensors(layer, optimizer)
        assert len(waits) == expected


@pytest.mark.parametrize("states", ["bf16", "fp8"])
def test_a_resumed_run_continues_bit_for_bit(tmp_path: Path, states: str) -> None:
    section = OptimizerSection(moment_dtype=states)
    whole = trained(section, 20)[0]
    first, optimizer = trained(section, 9)
    Store(tmp_path).save(9, optimizer_tensors(first, optimizer), {})
    second = model()
    second.load_state_dict(first.state_dict())
    again = make_optimizer(second, section)
    load_optimizer_tensors(second, again, open_checkpoint(tmp_path).tensors(), {})
    run(second, again, range(9, 20))
    assert torch.equal(second.weight, whole.weight)


def test_moments_of_another_format_are_refused(tmp_path: Path) -> None:
    first, optimizer = trained(OptimizerSection(moment_dtype="bf16"), 1)
    Store(tmp_path).save(1, optimizer_tensors(first, optimizer), {})
    other = model()
    with pytest.raises(CheckpointError, match="fp8"):
        load_optimizer_tensors(
            other,
            make_optimizer(other, OptimizerSection(moment_dtype="fp8")),
            open_checkpoint(tmp_path).tensors(),
            {},
        )


def test_8_bit_moments_take_two_bytes_per_parameter() -> None:
    layer, optimizer = trained(OptimizerSection(moment_dtype="fp8"), 1)
    moments = {
        name: value
        for name, value in optimizer_tensors(layer, optimizer).items()
        if name.startswith("optimizer/weight/exp")
    }
    assert sum(t.nbytes for t in moments.values()) < 2.1 * layer.weight.numel()


def test_a_moment_that_decays_by_less_than_half_a_step_still_decays() -> None:
    """sqrt(v) falls by 2.5 % a step, less than half a step of E4M3: rounding to nearest would hold
    it for ever.
    """
    p = torch.zeros(4, 128)
    (m, m_scale), (v, v_scale) = new_moment(p, "fp8", "cpu"), new_moment(p, "fp8", "cpu")
    root: list[Tensor] = []
    for step in range(1, 121):
        grad = torch.ones(4, 128) if step <= 60 else torch.zeros(4, 128)
        adamw_(
            [p],
            [grad],
            [Moments(m, v, m_scale, v_scale)],
            Hyper(step, 0.0, 0.9, 0.95, 1e-8, 0.0),
            torch.ones(()),
        )
        assert v_scale is not None
        root.append(v.view(torch.float8_e4m3fn).float() * v_scale[:, None])
    assert root[59].mean() == pytest.approx((1 - 0.95**60) ** 0.5, rel=0.02)
    assert root[119].mean() == pytest.approx((1 - 0.95**60) ** 0.5 * 0.95**30, rel=0.08)


@pytest.mark.parametrize("states", ["fp32", "bf16"])
def test_clipping_scales_the_gradients_of_one_step(states: str) -> None:
    results = []
    for factor, clip in ((0.25, None), (1.0, torch.tensor(0.25))):
        layer = model()
        optimizer = make_optimizer(layer, OptimizerSection(moment_dtype=states))
        for _ in range(2):
            for parameter in layer.parameters():
                parameter.grad = (
                    factor
                    * torch.ones_like(parameter)
                    * torch.arange(1.0, 1 + len(parameter)).view(-1, *[1] * (parameter.ndim - 1))
                )
            update(
                optimizer, [p.grad for p in layer.parameters() if p.grad is not None], 1e-2, clip
            )
        results.append(layer)
    assert torch.equal(results[0].weight, results[1].weight)
    assert not torch.equal(results[0].weight, model().weight)
