"""What a checker says about one answer."""

from dataclasses import dataclass
from typing import Literal

Reason = Literal["ok", "wrong", "no_answer", "timeout", "error", "oom", "killed", "jail_error"]


@dataclass(frozen=True)
class Verdict:
    """Outcome of one check. `correct` holds exactly for the reason "ok".

    wrong: an answer that is not the reference. no_answer: nothing to compare. timeout: the wall clock ran out.
    error: the answer (or the program) raised. oom: it ran out of memory. killed: its process died of a signal that was
    not ours. jail_error: the jail failed, which says nothing about the answer: such an item belongs in no reward.

    Example: Verdict(False, "wrong", answer="41", detail="", seconds=0.0).
    """

    correct: bool
    reason: Reason
    answer: str = ""
    detail: str = ""
    seconds: float = 0.0

    def __post_init__(self) -> None:
        assert self.correct == (self.reason == "ok"), f"a verdict that contradicts itself: {self.correct}, {self.reason}"


def verdict(reason: Reason, answer: str = "", detail: str = "", seconds: float = 0.0) -> Verdict:
    """The verdict of this reason; `detail` is cut to 300 characters, since it may quote a hostile program."""
    return Verdict(reason == "ok", reason, answer, detail[:300], seconds)
