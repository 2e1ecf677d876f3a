"""Errors that the user can fix: a command prints one sentence and exits with a code, no traceback.

Each class defines the exit code of the command line (docs/DESIGN.md has the table). A message names
the key, file or row and tells the user what to do.
"""

import errno
from typing import Self

_REFUSALS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
    *(errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENAMETOOLONG),
)


class UserError(Exception):
    """Base class of all errors that are printed without a traceback.

    `exit_code`: what the command returns. `reported_by_rank0`: every rank raises this error, so
    only rank 0 prints it.
    """

    exit_code = 2
    reported_by_rank0 = False

    def on_all_ranks(self) -> Self:
        """Mark this error as raised on every rank, and return it.

        Example: `raise CheckpointError("...").on_all_ranks()`.
        """
        self.reported_by_rank0 = True
        return self


class ConfigError(UserError):
    """A recipe, an option or an environment variable is invalid."""

    reported_by_rank0 = True


class OutputExistsError(UserError):
    """The output path exists already, or another job uses it; nothing was written."""


class CheckFailedError(UserError):
    """A check that the user asked for failed (verify-weights, a gate)."""

    exit_code = 1


class CheckpointError(UserError):
    """A checkpoint or a model directory cannot be read or written."""

    exit_code = 3


class CheckpointCorruptError(CheckpointError):
    """A file of a checkpoint differs from what its manifest lists."""


class RunMovedError(CheckpointError):
    """The run directory was moved or replaced while the run was writing to it."""


class DataError(UserError):
    """A data file cannot be used."""

    exit_code = 4


class NonFiniteError(UserError):
    """Training stopped because the loss or the gradients stayed non-finite."""

    exit_code = 17


class LaunchedError(UserError):
    """A launched command failed; the exit code is that of its worst rank."""

    def __init__(self, code: int, message_place: str) -> None:
        super().__init__(f"the worst rank ended with code {code}; its message is {message_place}")
        self.exit_code = code


class RankError(UserError):
    """A process of a distributed run died, hung or failed, and the others cannot continue."""

    exit_code = 71


class Preempted(UserError):
    """SIGTERM arrived; the state is saved, and the same command resumes from it."""

    exit_code = 75


class Interrupted(UserError):
    """Ctrl-C arrived; the state is saved, and the same command resumes from it."""

    exit_code = 130


def disk_reason(error: OSError) -> str:
    """Why the system refused an operation. Example: "No space left on device, errno 28 ENOSPC"."""
    name = errno.errorcode.get(error.errno or 0, "")
    return f"{error.strerror}, errno {error.errno} {name}".rstrip()


def system_error(error: BaseException) -> UserError | None:
    """The sentence for an operation that the system refused, whatever asked for it; else None.

    Such an error is about the disk or the machine and not about the code, so it needs no traceback.
    """
    if not isinstance(error, OSError) or error.errno not in _REFUSALS:
        return None
    subject = f"{error.filename}: " if error.filename else ""
    return CheckpointError(
        f"{subject}the system refused an operation ({disk_reason(error)}); "
        "make it possible, then run the same command again."
    )


def first_line(error: BaseException) -> str:
    """First line of an error's text without its period, or its class if it has no text."""
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
