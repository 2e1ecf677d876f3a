"""The result of checking one answer."""

from dataclasses import dataclass
from typing import Literal

Reason = Literal[
    "ok",
    "wrong",
    "no_answer",
    "timeout",
    "error",
    "oom",
    "killed",
    "jail_error",
    "reward_error",
    "reward_timeout",
]
# Of the checker and not of the answer: such an item is no part of a reward or of a score.
FAILURES: tuple[Reason, ...] = ("jail_error", "reward_error", "reward_timeout")
TIMEOUTS: tuple[Reason, ...] = ("timeout", "reward_timeout")

MAX_DETAIL_CHARACTERS = 300  # it may quote a hostile program


@dataclass(frozen=True)
class Verdict:
    """Result of one check.

    Reasons:
        ok: the answer is correct; only then `correct` is True.
        wrong: the answer differs from the reference.
        no_answer: there is nothing to compare.
        timeout: the time limit expired.
        error: the answer or the program raised an exception.
        oom: it ran out of memory.
        killed: its process died of a signal that this package did not send.
        jail_error: the jail failed. This implies nothing about the answer, so exclude the item from
            rewards.
        reward_error: a function, a server or a task's scorer failed; the same.
        reward_timeout: it took too long; the same.

    Example: Verdict("wrong", answer="41").
    """

    reason: Reason
    answer: str = ""
    detail: str = ""
    seconds: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "detail", self.detail[:MAX_DETAIL_CHARACTERS])

    @property
    def correct(self) -> bool:
        """Whether the reason is "ok"."""
        return self.reason == "ok"
