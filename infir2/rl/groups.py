"""Groups of responses to one prompt, their advantages, and the samples to train on."""

from dataclasses import dataclass

import numpy as np

from infir2.data import Prompt, Sample
from infir2.engines.types import Completion


@dataclass(frozen=True)
class Response:
    """One response of the policy and its reward."""

    completion: Completion
    text: str  # decoded, for the checker and for people
    correct: bool
    reward: float


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
        """Whether some responses are correct and some are not (DAPO, arXiv 2503.14476, 3.2).

        By the verdict, not by the reward: a length penalty makes the rewards of wrong responses
        differ, and training on them would only teach to be short.
        """
        return len({response.correct for response in self.responses}) > 1


def group_advantages(rewards: list[float], normalize_by_std: bool) -> np.ndarray:
    """GRPO's advantages (arXiv 2402.03300, equation 3), FP64 [group_size].

    Reward minus the group's mean, divided by its standard deviation if `normalize_by_std`.
    Example: rewards [1, 0, 0, 0] give [1.732, -0.577, -0.577, -0.577].
    """
    values = np.asarray(rewards, dtype=np.float64)
    centered = values - values.mean()
    return centered / (values.std() + 1e-6) if normalize_by_std else centered


def training_samples(group: Group, normalize_by_std: bool) -> list[Sample]:
    """One sample per response: prompt and response, of which the response's tokens are trained.

    `token_inputs` hold the advantage and the rollout_logprobs of every token.
    """
    rewards = [response.reward for response in group.responses]
    advantages = group_advantages(rewards, normalize_by_std)
    num_prompt, samples = len(group.prompt_token_ids), []
    for response, advantage in zip(group.responses, advantages, strict=True):
        completion = response.completion
        token_ids = np.array([*group.prompt_token_ids, *completion.token_ids], dtype=np.int32)
        rollout_logprobs = np.zeros(len(token_ids), dtype=np.float32)
        rollout_logprobs[num_prompt:] = completion.rollout_logprobs
        token_inputs = {
            "advantages": np.full(len(token_ids), advantage, dtype=np.float32),
            "rollout_logprobs": rollout_logprobs,
        }
        loss_mask = np.arange(len(token_ids)) >= num_prompt
        samples.append(Sample(token_ids, loss_mask, group.prompt.origin, token_inputs))
    return samples
