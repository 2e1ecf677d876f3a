"""Responses to one prompt, with what is needed to train on them."""

from dataclasses import dataclass

import numpy as np

from infir2.data import Prompt, Sample
from infir2.engines.types import Completion


@dataclass(frozen=True)
class Response:
    """One answer of the policy and its reward."""

    completion: Completion
    text: str  # decoded, for the checker and the reader
    correct: bool
    reward: float


@dataclass(frozen=True)
class Group:
    """All responses to one prompt, sampled from one policy version."""

    prompt: Prompt
    prompt_token_ids: list[int]
    responses: list[Response]

    @property
    def has_signal(self) -> bool:
        """Whether rewards differ: otherwise every advantage is 0 (DAPO, arXiv 2503.14476, section 3.2)."""
        return len({response.reward for response in self.responses}) > 1


def group_advantages(rewards: list[float], normalize_by_std: bool) -> np.ndarray:
    """GRPO's advantages (arXiv 2402.03300, equation 3): reward minus the group's mean, over its standard deviation if asked.

    Example: rewards [1, 0, 0, 0] give [1.732, -0.577, -0.577, -0.577].
    """
    values = np.asarray(rewards, dtype=np.float64)
    centred = values - values.mean()
    return centred / (values.std() + 1e-6) if normalize_by_std else centred


def training_samples(group: Group, normalize_by_std: bool) -> list[Sample]:
    """Token sequences whose response tokens are trained, with advantage and rollout_logprobs for each."""
    advantages = group_advantages(
        [response.reward for response in group.responses], normalize_by_std
    )
    num_prompt, samples = len(group.prompt_token_ids), []
    for response, advantage in zip(group.responses, advantages, strict=True):
        token_ids = np.array(
            [*group.prompt_token_ids, *response.completion.token_ids], dtype=np.int32
        )
        rollout_logprobs = np.zeros(len(token_ids), dtype=np.float32)
        rollout_logprobs[num_prompt:] = response.completion.rollout_logprobs
        token_inputs = {
            "advantages": np.full(len(token_ids), advantage, dtype=np.float32),
            "rollout_logprobs": rollout_logprobs,
        }
        samples.append(
            Sample(
                token_ids,
                np.arange(len(token_ids)) >= num_prompt,
                group.prompt.origin,
                token_inputs,
            )
        )
    return samples
