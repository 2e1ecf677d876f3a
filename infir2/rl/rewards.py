"""Rewards: 1 for a right boxed answer after the thinking, 0 otherwise, with DAPO's soft penalty for overlong answers if asked."""

from collections.abc import Sequence

from infir2.config.schema import RlSection
from infir2.engines.types import Completion
from infir2.rl.groups import Response
from infir2.verify import check_math_batch


def overlong_penalty(num_tokens: int, rl: RlSection) -> float:
    """Soft overlong punishment (arXiv 2503.14476, equation 13): 0 up to the buffer, then a line down to -overlong_penalty."""
    if not rl.overlong_buffer_tokens:
        return 0.0
    excess = num_tokens - (rl.max_response_tokens - rl.overlong_buffer_tokens)
    return -rl.overlong_penalty * min(1.0, max(0.0, excess / rl.overlong_buffer_tokens))


def rate(
    completions: Sequence[Completion], texts: Sequence[str], answers: Sequence[str], rl: RlSection
) -> list[Response]:
    """Responses with their rewards, in order."""
    verdicts = check_math_batch(list(zip(texts, answers, strict=True)))
    return [
        Response(
            completion,
            text,
            verdict.correct,
            float(verdict.correct) + overlong_penalty(len(completion.token_ids), rl),
        )
        for completion, text, verdict in zip(completions, texts, verdicts, strict=True)
    ]
