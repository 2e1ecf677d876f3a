"""Groups of responses to one prompt, their advantages, and the samples to train on."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import repeat

import numpy as np

from infir2.config.schema import RlSection
from infir2.data import Prompt, Sample
from infir2.engines.types import Completion
from infir2.verify.verdict import FAILURES, Reason

OVERLONG = "overlong"  # the part of the reward that is the penalty for a response's length


@dataclass(frozen=True)
class Response:
    """One response of the policy and its reward."""

    completion: Completion
    text: str  # decoded, for the checker and for people
    reason: Reason  # of the verdict
    reward: float
    parts: dict[str, float] = field(default_factory=dict)  # by name; their sum is the reward
    detail: str = ""  # of the verdict

    @property
    def correct(self) -> bool:
        """Whether the answer is right."""
        return self.reason == "ok"

    @property
    def raw(self) -> float:
        """The reward without the penalty for its length."""
        scores = [value for name, value in self.parts.items() if name != OVERLONG]
        return sum(scores) if scores else float(self.correct)

    @property
    def is_rated(self) -> bool:
        """Whether the reward worked: a broken jail or a function that raised says nothing."""
        return self.reason not in FAILURES

    @property
    def is_truncated(self) -> bool:
        """Whether the response reached the limit of its length."""
        return self.completion.finish == "length"


@dataclass(frozen=True)
class Group:
    """All responses to one prompt, sampled from one policy version.

    Example: `Group("0/p17", prompt, [5, 9, 2], responses)`.
    """

    name: str  # "epoch/id" of the prompt
    prompt: Prompt
    prompt_token_ids: list[int]
    responses: list[Response]

    @property
    def has_signal(self) -> bool:
        """Whether some responses are better than others (DAPO, arXiv 2503.14476, 3.2).

        Without the penalty for length: it makes the rewards of wrong responses differ, and training
        on them would only teach to be short.
        """
        return len({response.raw for response in self.rated}) > 1

    @property
    def rated(self) -> list[Response]:
        """The responses whose reward worked."""
        return [response for response in self.responses if response.is_rated]


def group_advantages(rewards: list[float], rl: RlSection) -> np.ndarray:
    """GRPO's advantages (arXiv 2402.03300, equation 3), FP64 [group_size].

    Reward minus the group's mean, divided by its standard deviation if `rl.normalize_by_std`, whose
    variance divides by group_size, or by group_size - 1 if `rl.unbiased_std`.
    Example: rewards [1, 0, 0, 0] give [1.732, -0.577, -0.577, -0.577].
    """
    values = np.asarray(rewards, dtype=np.float64)
    centered = values - values.mean()
    return centered / (values.std(ddof=rl.unbiased_std) + 1e-6) if rl.normalize_by_std else centered


def trained_tokens(response: Completion) -> np.ndarray:
    """Whether the policy has written each token, and not an environment, bool [n]."""
    mask = np.ones(len(response.token_ids), dtype=np.bool_)
    for start, end in response.outside:
        mask[start:end] = False
    return mask


def training_samples(groups: Sequence[Group], rl: RlSection) -> list[Sample]:
    """One sample per response that is trained: prompt and response, whose tokens are trained.

    `token_inputs` hold of every token its advantage, its rollout_logprobs, and its weight in the
    mean over the tokens of all samples (`rl.loss_mean`). Responses whose reward failed are left
    out, and truncated ones if `rl.mask_truncated`.
    """
    rated = []
    for group in groups:
        rewards = [response.reward for response in group.rated]
        advantages = group_advantages(rewards, rl)
        rated += list(zip(repeat(group), group.rated, advantages, strict=False))
    kept = [each for each in rated if not (rl.mask_truncated and each[1].is_truncated)]
    lengths = [int(trained_tokens(response.completion).sum()) for _, response, _ in kept]
    weights = response_weights(lengths, rl)
    return [_sample(*each, weight) for each, weight in zip(kept, weights, strict=True)]


def response_weights(lengths: Sequence[int], rl: RlSection) -> np.ndarray:
    """The weight of a token of each response, so that the mean over all tokens is rl.loss_mean's.

    `lengths` are the trained tokens of all responses of an update. token: 1; response: every
    response counts the same; constant: a response's sum counts 1 / max_response_tokens (Dr. GRPO,
    arXiv 2503.20783).
    """
    tokens = np.asarray(lengths, dtype=np.float64)
    if rl.loss_mean == "token" or not lengths:
        return np.ones(len(tokens))
    divisors = tokens if rl.loss_mean == "response" else np.float64(rl.max_response_tokens)
    return np.broadcast_to(tokens.sum() / (len(tokens) * divisors), tokens.shape)


def _sample(group: Group, response: Response, advantage: float, weight: float) -> Sample:
    completion, num_prompt = response.completion, len(group.prompt_token_ids)
    token_ids = np.array([*group.prompt_token_ids, *completion.token_ids], dtype=np.int32)
    rollout_logprobs = np.zeros(len(token_ids), dtype=np.float32)
    rollout_logprobs[num_prompt:] = completion.rollout_logprobs
    token_inputs = {
        "advantages": np.full(len(token_ids), advantage, dtype=np.float32),
        "rollout_logprobs": rollout_logprobs,
        "weights": np.full(len(token_ids), weight, dtype=np.float32),
    }
    loss_mask = np.concatenate([np.zeros(num_prompt, np.bool_), trained_tokens(completion)])
    return Sample(token_ids, loss_mask, group.prompt.origin, token_inputs)
