"""What a checker says about one answer."""

from dataclasses import dataclass
from typing import Literal

Reason = Literal["ok", "wrong", "no_answer", "timeout", "error", "oom", "killed", "jail_error"]


MAX_DETAIL_CHARACTERS = 300  # it may quote a hostile program


@dataclass(frozen=True)
class Verdict:
    """Outcome of one check. `correct` holds exactly for the reason "ok".

    wrong: an answer that is not the reference. no_answer: nothing to compare. timeout: the wall clock ran out.
    error: the answer (or the program) raised. oom: it ran out of memory. killed: its process died of a signal that was
    not ours. jail_error: the jail failed, which says nothing about the answer: such an item belongs in no reward.

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
        return self.reason == "ok"
