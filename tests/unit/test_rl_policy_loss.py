"""The objectives, corrections, weights and advantages of RL against closed forms."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from infir2.config.schema import RlSection
from infir2.data import Batch
from infir2.errors import ConfigError
from infir2.rl.groups import group_advantages, response_weights
from infir2.rl.importance import add_importance, importance_weights
from infir2.rl.policy_loss import PolicyLoss, PolicyTokens, find_objective
from infir2.train.losses import TokenScores

LOG = math.log


class Given:
    """Tokens of responses of the given lengths, and the gradients of their loss."""

    def __init__(
        self,
        logprobs: Sequence[float],
        advantages: Sequence[float],
        trainer: Sequence[float] | None = None,
        lengths: Sequence[int] = (),
        **inputs: Sequence[float],
    ) -> None:
        count = len(logprobs)
        lengths = lengths or [1] * count
        ends = np.repeat(np.arange(len(lengths)), lengths)
        self.logprobs = torch.tensor(logprobs, requires_grad=True)
        self.entropy = torch.full((count,), 0.5, requires_grad=True)
        plain = {name: torch.tensor(values) for name, values in inputs.items()}
        trainer_logprobs = torch.tensor(trainer or [0.0] * count)
        self.inputs = {
            "advantages": torch.tensor(advantages),
            "trainer_logprobs": trainer_logprobs,
            "rollout_logprobs": trainer_logprobs,
            "importance": torch.ones(count),
            "is_capped": torch.zeros(count, dtype=torch.bool),
            "weights": torch.ones(count),
            "sequence": torch.from_numpy(ends),
            "response_tokens": torch.tensor(lengths)[ends].float(),
        } | plain
        self.num_sequences = len(lengths)

    def loss(self, **rl: Any) -> tuple[Tensor, dict[str, float]]:
        section = RlSection(**rl)
        scores = TokenScores(self.logprobs, self.entropy, self.inputs, self.num_sequences)
        loss, metrics = PolicyLoss(section, find_objective(section.loss))(scores)
        return loss, {name: value.item() for name, value in metrics.items()}

    def gradient(self, **rl: Any) -> list[float]:
        loss, _ = self.loss(**rl)
        return torch.autograd.grad(loss, self.logprobs)[0].tolist()


def test_on_policy_gradient_is_the_negative_advantage_for_every_objective() -> None:
    for loss in ("grpo", "gspo", "cispo"):
        given = Given([-1.0, -2.0], [1.5, -0.5], [-1.0, -2.0])
        assert given.gradient(loss=loss) == pytest.approx([-1.5, 0.5]), loss


def test_clip_stops_the_gradient_only_where_the_ratio_has_gone_far_enough() -> None:
    up, down = LOG(1.3), LOG(0.7)
    given = Given([up, up, down, down], [1.0, -1.0, 1.0, -1.0])
    assert given.gradient() == pytest.approx([0.0, 1.3, -0.7, 0.0])
    _, metrics = given.loss()
    assert metrics["clip_fraction"] == 2
    assert metrics["entropy"] == pytest.approx(2.0)


def test_clip_is_asymmetric() -> None:
    given = Given([LOG(1.25), LOG(0.79)], [1.0, -1.0])
    assert given.gradient() == pytest.approx([-1.25, 0.0])


def test_dual_clip_bounds_the_loss_of_a_bad_token_that_became_likely() -> None:
    given = Given([LOG(5.0), LOG(2.0), LOG(5.0)], [-1.0, -1.0, 1.0])
    assert given.gradient() == pytest.approx([5.0, 2.0, 0.0])
    assert given.gradient(clip_dual=3.0) == pytest.approx([0.0, 2.0, 0.0])
    loss, metrics = given.loss(clip_dual=3.0)
    assert loss.item() == pytest.approx(3 + 2 - 1.28)
    assert metrics["clip_fraction"] == 2


def test_gspo_clips_by_the_response_and_keeps_the_gradient_of_its_mean() -> None:
    # Two responses: geometric mean ratios sqrt(1.1 * 1.2) and sqrt(1.5 * 0.9).
    logprobs = [LOG(1.1), LOG(1.2), LOG(1.5), LOG(0.9)]
    given = Given(logprobs, [1.0] * 4, lengths=[2, 2], weights=[0.5] * 4)
    first = math.sqrt(1.1 * 1.2)
    options = {"loss": "gspo", "clip_low": 0.15, "clip_high": 0.16}
    loss, metrics = given.loss(**options)
    # weights of 1 / length make it the mean over the response: s * A of the first, the clip of the
    # second
    assert loss.item() == pytest.approx(-first - 1.16)
    assert given.gradient(**options) == pytest.approx([-first / 2, -first / 2, 0.0, 0.0])
    assert metrics["clip_fraction"] == 2


def test_gspo_sums_over_the_ranks_that_share_the_batch() -> None:
    given = Given([LOG(1.1)], [1.0], lengths=[1], response_tokens=[2.0])
    other = torch.tensor([LOG(1.2)])
    scores = TokenScores(given.logprobs, given.entropy, given.inputs, 1, lambda v: v.add_(other))
    loss, _ = PolicyLoss(RlSection(loss="gspo"), find_objective("gspo"))(scores)
    assert loss.item() == pytest.approx(-math.sqrt(1.1 * 1.2))


def test_cispo_keeps_the_gradient_of_every_token_and_clips_its_weight() -> None:
    given = Given([LOG(1.5), LOG(0.5), LOG(1.1)], [1.0, 1.0, -2.0])
    assert given.gradient(loss="cispo", clip_low=1.0) == pytest.approx([-1.28, -0.5, 2.2])
    assert given.loss(loss="cispo", clip_low=1.0)[1]["clip_fraction"] == 1


@pytest.mark.parametrize(
    ("estimator", "value", "gradient"),
    [("k1", 0.5, 1.0), ("k2", 0.125, 0.5), ("k3", math.exp(-0.5) - 0.5, 1 - math.exp(-0.5))],
)
def test_kl_to_the_reference(estimator: str, value: float, gradient: float) -> None:
    given = Given([-1.0], [0.0], [-1.0], reference_logprobs=[-1.5])
    rl = {"kl_coefficient": 0.1, "kl_estimator": estimator, "reference": "x"}
    loss, metrics = given.loss(**rl)
    assert loss.item() == pytest.approx(0.1 * value)
    assert metrics["reference_kl"] == pytest.approx(value)
    assert given.gradient(**rl) == pytest.approx([0.1 * gradient])


def test_entropy_bonus_raises_the_entropy_and_is_not_weighted_by_importance() -> None:
    given = Given([-1.0], [1.0], [-1.0], importance=[0.0], weights=[2.0])
    loss, _ = given.loss(entropy_coefficient=0.01)
    assert torch.autograd.grad(loss, given.entropy)[0].tolist() == pytest.approx([-0.02])
    assert loss.item() == pytest.approx(-0.01)


def half_of_the_advantage(tokens: PolicyTokens, rl: RlSection) -> tuple[Tensor, dict[str, Tensor]]:
    return -0.5 * tokens.advantages * tokens.logprobs, {
        "length": tokens.response_mean(tokens.sequence.float())
    }


def test_a_loss_of_one_s_own() -> None:
    name = f"{__name__}:half_of_the_advantage"
    given = Given([-1.0, -1.0], [1.0, -2.0])
    assert given.gradient(loss=name) == pytest.approx([-0.5, 1.0])
    assert given.loss(loss=name)[1]["length"] == 1


@pytest.mark.parametrize("name", ["nothing.here:f", "math:nothing", "math:pi"])
def test_a_loss_that_is_not_there_is_one_sentence(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^rl\.loss: "):
        find_objective(name)


def batch(trainer: Sequence[float], rollout: Sequence[float]) -> Batch:
    """Responses of 2 and 1 trained tokens after prompts of 2 and 1."""
    mask = torch.tensor([False, True, True, False, True, False])
    logprobs = torch.zeros(2, 6)
    logprobs[:, mask] = torch.tensor([trainer, rollout])
    nothing = torch.zeros(6, dtype=torch.int64)
    inputs = {"trainer_logprobs": logprobs[0], "rollout_logprobs": logprobs[1]}
    bounds = torch.tensor([0, 4, 6], dtype=torch.int32)
    return Batch(nothing, nothing, nothing, mask, bounds, inputs, (0, 1))


def importance(level: str, **rl: Any) -> tuple[list[float], list[bool], Batch]:
    given = batch([LOG(3.0), LOG(0.5), LOG(1.5)], [0.0, 0.0, 0.0])
    found = add_importance(given, RlSection(correction_level=level, **rl))
    mask, inputs = found.loss_mask, found.token_inputs
    return inputs["importance"][mask].tolist(), inputs["is_capped"][mask].tolist(), found


def test_importance_weight_by_token_is_capped_or_dropped() -> None:
    weights, capped, found = importance("token", correction="tis")
    assert weights == pytest.approx([2.0, 0.5, 1.5])
    assert capped == [True, False, False]
    assert found.token_inputs["sequence"].tolist() == [0, 0, 0, 0, 1, 1]
    assert found.token_inputs["response_tokens"].tolist() == [2, 2, 2, 2, 1, 1]
    assert importance("token", correction="mis")[0] == pytest.approx([0.0, 0.5, 1.5])
    assert importance("token", correction="icepop", correction_floor=0.6)[:2] == (
        pytest.approx([0.0, 0.0, 1.5]),
        [True, True, False],
    )
    assert importance("token", correction="none")[:2] == ([1.0] * 3, [False] * 3)


def test_importance_weight_by_response_is_its_product_or_its_geometric_mean() -> None:
    assert importance("sequence", correction="tis")[0] == pytest.approx([1.5, 1.5, 1.5])
    geometric = math.sqrt(1.5)
    assert importance("geometric", correction="tis")[0] == pytest.approx([geometric] * 2 + [1.5])
    assert importance("geometric", correction="mis", correction_cap=1.4)[0] == pytest.approx(
        [geometric] * 2 + [0.0]
    )
    assert importance("sequence", correction="mis", correction_floor=1.6)[0] == [0.0] * 3


def test_an_importance_weight_that_overflows_is_capped() -> None:
    for correction, expected in (("tis", 2.0), ("mis", 0.0)):
        weights, capped = importance_weights(
            torch.tensor([200.0]), RlSection(correction=correction)
        )
        assert (weights.tolist(), capped.tolist()) == ([expected], [True])


def test_advantages_are_centred_and_scaled_by_the_groups_deviation() -> None:
    rl = RlSection()
    assert group_advantages([1, 0, 0, 0], rl) == pytest.approx(
        [math.sqrt(3), *[-1 / math.sqrt(3)] * 3], abs=1e-5
    )
    unbiased = RlSection(unbiased_std=True)
    assert group_advantages([1, 0, 0, 0], unbiased) == pytest.approx(
        [1.5, -0.5, -0.5, -0.5], abs=1e-5
    )
    plain = RlSection(normalize_by_std=False)
    assert group_advantages([1, 0, 0, 0], plain) == pytest.approx([0.75, -0.25, -0.25, -0.25])
    assert np.all(group_advantages([1, 1, 1], rl) == 0)


def test_weights_make_the_mean_over_tokens_that_of_the_recipe() -> None:
    lengths, losses = [1, 3], [[5.0], [1.0, 2.0, 3.0]]

    def mean(loss_mean: str) -> float:
        weights = response_weights(lengths, RlSection(loss_mean=loss_mean, max_response_tokens=8))
        return sum(w * sum(each) for w, each in zip(weights, losses, strict=True)) / sum(lengths)

    assert mean("token") == pytest.approx(11 / 4)
    assert mean("response") == pytest.approx((5 + 2) / 2)
    assert mean("constant") == pytest.approx((5 + 6) / 8 / 2)
