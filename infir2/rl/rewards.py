"""Rewards: 1 for a correct boxed answer after the thinking, 0 otherwise, plus DAPO's soft penalty
for overlong responses if the recipe asks for it."""

from collections.abc import Sequence

from infir2.config.schema import RlSection
from infir2.data import Prompt
from infir2.engines.types import Completion
from infir2.rl.groups import OVERLONG, Response
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
    completions: Sequence[Completion], texts: Sequence[str], prompt: Prompt, rl: RlSection
) -> list[Response]:
    """Responses to a prompt with their rewards, in order."""
    pairs = [(text, prompt.answer) for text in texts]
    verdicts = check_math_batch(pairs, answer_format=rl.answer_format)
    responses = []
    for completion, text, verdict in zip(completions, texts, verdicts, strict=True):
        parts = {"math": float(verdict.correct)}
        if rl.overlong_buffer_tokens:
            parts[OVERLONG] = overlong_penalty(len(completion.token_ids), rl)
        reward = sum(parts.values())
        responses.append(Response(completion, text, verdict.reason, reward, parts))
    return responses
