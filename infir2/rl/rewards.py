"""Rewards: 1 for a correct boxed answer after the thinking, 0 otherwise, plus DAPO's soft penalty
for overlong responses if the recipe asks for it."""

from collections.abc import Sequence

from infir2.config.schema import RlSection
from infir2.engines.types import Completion
from infir2.rl.groups import Response
from infir2.verify import check_math_batch


def overlong_penalty(num_tokens: int, rl: RlSection) -> float:
    """Soft overlong punishment (arXiv 2503.14476, equation 13).

    0 until `overlong_buffer_tokens` before the limit, then linear down to -overlong_penalty.
    """
    if not rl.overlong_buffer_tokens:
        return 0.0
    excess = num_tokens - (rl.max_response_tokens - rl.overlong_buffer_tokens)
    return -rl.overlong_penalty * min(1.0, max(0.0, excess / rl.overlong_buffer_tokens))


def rate(
    completions: Sequence[Completion], texts: Sequence[str], answers: Sequence[str], rl: RlSection
) -> list[Response]:
    """Responses with their rewards, in order."""
    pairs = list(zip(texts, answers, strict=True))
    verdicts = check_math_batch(pairs, answer_format=rl.answer_format)
    responses = []
    for completion, text, verdict in zip(completions, texts, verdicts, strict=True):
        penalty = overlong_penalty(len(completion.token_ids), rl)
        reward = float(verdict.correct) + penalty
        responses.append(Response(completion, text, verdict.reason, reward))
    return responses
