"""What one reward says of one response."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from infir2.data import Prompt
from infir2.verify import Verdict
from infir2.verify.verdict import Reason


@dataclass(frozen=True)
class Score:
    """A value, usually between 0 and 1, and the verdict that it comes from.

    With one of `verdict.FAILURES` as reason, the reward failed and the value means nothing.
    """

    value: float
    reason: Reason
    detail: str = ""


# Rates the responses to a prompt, given as texts, in order.
Reward = Callable[[Sequence[str], Prompt], list[Score]]


def score_of(verdict: Verdict) -> Score:
    """1 for a right answer, else 0."""
    return Score(float(verdict.correct), verdict.reason, verdict.detail)


def failure(detail: str, is_timeout: bool = False) -> Score:
    """The score of a reward that failed, or took too long."""
    return Score(0.0, "reward_timeout" if is_timeout else "reward_error", detail)


def score_of_value(value: Any) -> Score:
    """The score of what a function or a server returned: right from 1 on."""
    if not isinstance(value, int | float):
        return failure(f"it returned {str(value)[:50]!r}, which is no number")
    if not -sys.float_info.max <= value <= sys.float_info.max:  # nor NaN
        return failure(f"it returned {value}, which is no finite number")
    return Score(float(value), "ok" if value >= 1 else "wrong")
