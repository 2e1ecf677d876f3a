"""The policy loss and the advantages against closed forms."""

import math

import numpy as np
import pytest
import torch

from infir2.rl.groups import group_advantages
from infir2.rl.policy_loss import PolicyLoss
from infir2.train.losses import TokenScores

LOSS = PolicyLoss(clip_low=0.2, clip_high=0.28, tis_cap=2.0)


def scores(
    logprobs: list[float], advantages: list[float], trainer: list[float], rollout: list[float]
) -> TokenScores:
    inputs = {
        "advantages": torch.tensor(advantages),
        "trainer_logprobs": torch.tensor(trainer),
        "rollout_logprobs": torch.tensor(rollout),
    }
    return TokenScores(
        torch.tensor(logprobs, requires_grad=True), torch.full((len(logprobs),), 0.5), inputs
    )


def gradient(given: TokenScores) -> list[float]:
    loss, _ = LOSS(given)
    loss.backward()
    return given.logprobs.grad.tolist()  # type: ignore[union-attr]


def test_on_policy_gradient_is_the_negative_advantage() -> None:
    given = scores([-1.0, -2.0], [1.5, -0.5], [-1.0, -2.0], [-1.0, -2.0])
    assert gradient(given) == pytest.approx([-1.5, 0.5])


def test_clip_stops_the_gradient_only_where_the_ratio_has_gone_far_enough() -> None:
    up, down = math.log(1.3), math.log(0.7)
    given = scores([up, up, down, down], [1.0, -1.0, 1.0, -1.0], [0.0] * 4, [0.0] * 4)
    assert gradient(given) == pytest.approx([0.0, 1.3, -0.7, 0.0])
    _, metrics = LOSS(given)
    assert metrics["clip_fraction"].item() == 2
    assert metrics["entropy"].item() == pytest.approx(2.0)


def test_clip_is_asymmetric() -> None:
    given = scores([math.log(1.25), math.log(0.79)], [1.0, -1.0], [0.0, 0.0], [0.0, 0.0])
    assert gradient(given) == pytest.approx([-1.25, 0.0])


def test_truncated_importance_weight_scales_and_is_capped() -> None:
    given = scores([-1.0, -1.0], [1.0, 1.0], [-1.0, -1.0], [-1.5, -3.0])
    assert gradient(given) == pytest.approx([-math.exp(0.5), -2.0])
    _, metrics = LOSS(given)
    assert metrics["tis_capped_fraction"].item() == 1


def test_advantages_are_centred_and_scaled_by_the_groups_deviation() -> None:
    assert group_advantages([1, 0, 0, 0], True) == pytest.approx(
        [math.sqrt(3), *[-1 / math.sqrt(3)] * 3], abs=1e-5
    )
    assert group_advantages([1, 0, 0, 0], False) == pytest.approx([0.75, -0.25, -0.25, -0.25])
    assert np.all(group_advantages([1, 1, 1], True) == 0)
