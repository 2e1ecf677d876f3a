"""Errors of the user's that end a command: one sentence, one exit code, no traceback.

Every class says which exit code the command line returns for it (docs/DESIGN.md has the table). A message names the
key, file or row and says what to do.
"""

import errno
from typing import Self


class UserError(Exception):
    """Something the user can mend. Base of all errors that are shown without a traceback.

    `told_by_first`: every rank raises it, so rank 0 alone need say it.
    """

    exit_code = 2
    reported_by_rank0 = False

    def of_all_ranks(self) -> Self:
        """The same error, which every rank raises."""
        self.reported_by_rank0 = True
        return self


class ConfigError(UserError):
    """A recipe, an option or an environment variable that cannot be used."""

    reported_by_rank0 = True


class OutputExistsError(UserError):
    """The place to write to is already taken; nothing was written."""


class CheckFailedError(UserError):
    """A check the user asked for did not hold (verify-weights, a gate)."""

    exit_code = 1


class CheckpointError(UserError):
    """A checkpoint or a model directory that cannot be read or written."""

    exit_code = 3


class CheckpointCorruptError(CheckpointError):
    """A file of a checkpoint does not have the bytes its manifest promises."""


class DataError(UserError):
    """A data file that cannot be used."""

    exit_code = 4


class NonFiniteError(UserError):
    """Training stopped because loss or gradients stayed non-finite."""

    exit_code = 17


class LaunchedError(UserError):
    """A launched command ended badly; carries the worst rank's exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the worst rank ended with code {code}; its message is above")
        self.exit_code = code


class RankError(UserError):
    """A process of a run of several died, hung or failed; the others cannot go on."""

    exit_code = 71


class Preempted(UserError):
    """SIGTERM arrived: the state is saved, the same command goes on from it."""

    exit_code = 75


class Interrupted(UserError):
    """Ctrl-C arrived: the state is saved, the same command goes on from it."""

    exit_code = 130


def disk_reason(error: OSError) -> str:
    """Why the system refused, for brackets in a sentence. Example: "No space left on device, errno 28 ENOSPC"."""
    return f"{error.strerror}, errno {error.errno} {errno.errorcode.get(error.errno or 0, '')}".rstrip()


def first_line(error: BaseException) -> str:
    """A library's error for the middle of a sentence: the first line of its text, else its class."""
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
