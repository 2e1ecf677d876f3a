"""The result of one check."""

from dataclasses import dataclass
from typing import Literal

from infir2.errors import UserError

Status = Literal["ok", "warn", "fail", "skipped"]
_PRINTED: dict[Status, str] = {"ok": "ok", "warn": "warn", "fail": "FAIL", "skipped": "skip"}


@dataclass(frozen=True)
class Finding:
    """What one check found; `detail` says on a failure what to do.

    Example: Finding("disk", "fail", "run.dir: 3.0 GiB free, ...; free some space.")
    """

    check: str
    status: Status
    detail: str

    def __str__(self) -> str:
        return f"{_PRINTED[self.status]:5} {self.check:10} {self.detail}"


class SkippedError(UserError):
    """A check cannot run because an earlier check, whose result it needs, failed."""
