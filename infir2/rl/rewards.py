"""The reward of a response: the weighted sum of what the recipe's rewards give, plus DAPO's soft
penalty for overlong responses if the recipe asks for it."""

from collections.abc import Sequence
from functools import partial

from infir2.config.reward_rules import GYM, is_function, is_gym, is_server
from infir2.config.schema import RewardSection, RlSection
from infir2.data import Prompt
from infir2.data.labels import labels_of
from infir2.engines.types import Completion
from infir2.errors import DataError
from infir2.rl.groups import OVERLONG, Response
from infir2.rl.reward_answers import (
    choice_reward,
    code_reward,
    format_reward,
    math_reward,
    thinking_reward,
)
from infir2.rl.reward_score import Reward, Score
from infir2.rl.reward_services import function_reward, gym_reward, server_reward
from infir2.terminal import log
from infir2.verify.verdict import FAILURES


def find_reward(name: str, rl: RlSection) -> Reward:
    """The reward of that name, which `config.reward_rules` has accepted."""
    if is_gym(name):
        return partial(gym_reward, task=name.removeprefix(GYM), rl=rl)
    if is_function(name) or is_server(name):
        return partial(function_reward if is_function(name) else server_reward, name, rl=rl)
    answer_format = rl.answer_format
    rewards: dict[str, Reward] = {
        "math": partial(math_reward, answer_format=answer_format),
        "answer": partial(math_reward, answer_format="answer_line"),
        "require_thinking": partial(thinking_reward, answer_format=answer_format),
        "format": partial(format_reward, answer_format=answer_format),
        "choice": choice_reward,
        "code": partial(code_reward, rl=rl),
    }
    return rewards[name]


def overlong_penalty(num_tokens: int, rl: RlSection) -> float:
    """Soft overlong punishment (arXiv 2503.14476, equation 13).

    0 until `overlong_buffer_tokens` before the limit, then linear down to -overlong_penalty.
    """
    if not rl.overlong_buffer_tokens:
        return 0.0
    excess = num_tokens - (rl.max_response_tokens - rl.overlong_buffer_tokens)
    return -rl.overlong_penalty * min(1.0, max(0.0, excess / rl.overlong_buffer_tokens))


def rate(
    completions: Sequence[Completion], texts: Sequence[str], prompt: Prompt, rl: RlSection
) -> list[Response]:
    """Responses to a prompt with their rewards, in order."""
    rewards = labels_of(rl).of_row(prompt.fields)
    columns = [find_reward(each.name, rl)(texts, prompt) for each in rewards]
    return [
        _response(completion, text, dict(zip(rewards, scores, strict=True)), rl)
        for completion, text, *scores in zip(completions, texts, *columns, strict=True)
    ]


def _response(
    completion: Completion, text: str, scores: dict[RewardSection, Score], rl: RlSection
) -> Response:
    """A response with the weighted sum of its scores. The first score says whether it is right."""
    first = next(iter(scores.values()))
    verdict = next((each for each in scores.values() if each.reason in FAILURES), first)
    if verdict.reason in FAILURES:
        return Response(completion, text, verdict.reason, 0.0, {}, verdict.detail)
    parts = {reward.name: reward.weight * score.value for reward, score in scores.items()}
    if rl.overlong_buffer_tokens:
        parts[OVERLONG] = overlong_penalty(len(completion.token_ids), rl)
    return Response(completion, text, verdict.reason, sum(parts.values()), parts, verdict.detail)


class FailureBudget:
    """Counts the failed rewards of a step, and ends the run when this rank has too many."""

    def __init__(self, limit: int) -> None:
        self._limit, self._count = limit, 0

    def begin(self) -> None:
        """The sampling of a step begins."""
        self._count = 0

    def spend(self, prompt: Prompt, responses: Sequence[Response]) -> None:
        """Count the failures among the responses to a prompt, and name its row.

        Raises:
            DataError: more than `rl.reward_failures` since the step began.
        """
        failed = [response for response in responses if not response.is_rated]
        if not failed:
            return
        self._count += len(failed)
        sentence = (
            f"{prompt.origin}: the reward failed for {len(failed)} of {len(responses)} responses "
            f"({failed[0].detail or failed[0].reason})"
        )
        if self._count > self._limit:
            raise DataError(
                f"{sentence}; with {self._count} failures in this step that is more than "
                f"rl.reward_failures ({self._limit}): fix the reward or the row, or raise it"
            )
        log(sentence, "rl")
