"""Makes one file operation below a directory fail, as a disk or a file server does; a campaign.

    python tests/faults/file_faults.py        every operation of three commands fails once

A case must end with code 0 or 3 and without a traceback; the same command, run again, must end like
a run that nothing disturbed, bit for bit. For other commands:

    command = Faulty(directory)
    total = command.count(work)                       # operations that `work` performs
    for number in range(total):
        code, stderr = command.run(work, number, errno.EIO)

`work` runs in a forked process and returns its exit code. Counted are opening, listing, creating,
renaming, removing, linking, truncating, syncing, locking, stat and free space; files that are read
or written after they were opened are not. Several threads may write, so the number of an operation
can differ between two runs; every number up to the total still fails once.
"""

import argparse
import contextlib
import errno
import fcntl
import functools
import io
import itertools
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stages import assert_same_state, curve, make_rl_start, make_world, options

from infir2.cli import main

ERRORS = (
    *(errno.EACCES, errno.EIO, errno.ENOSPC, errno.EDQUOT),
    *(errno.EROFS, errno.ESTALE, errno.EMFILE),
)
_FUNCTIONS = (
    *("stat", "lstat", "fstat", "statvfs", "listdir", "scandir", "mkdir", "rename", "replace"),
    *("unlink", "remove", "rmdir", "link", "truncate", "ftruncate", "fsync", "utime", "chmod"),
    *("pread", "pwrite", "readlink"),
)
Work = Callable[[], int]


@dataclass(frozen=True)
class Outcome:
    """What a process printed, returned, and how many operations it performed (-1: killed)."""

    code: int
    stderr: str
    operations: int
    failed: str = ""  # the operation that failed, and its path


class Faulty:
    """Runs work in processes in which operations below `directory` are counted or fail."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def count(self, work: Work) -> int:
        """The number of operations of `work`, which must succeed."""
        outcome = self.run(work, -1, 0)
        assert outcome.code == 0, outcome.stderr
        return outcome.operations

    def run(self, work: Work, number: int, error: int) -> Outcome:
        """Run `work` with its operation `number`, from 0, failing with `error`."""
        with tempfile.TemporaryDirectory(prefix="infir2-faulty-") as temporary:
            stderr, record = Path(temporary, "stderr"), Path(temporary, "record")
            pid = os.fork()
            if pid == 0:
                self._child(work, number, error, stderr, record)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            operations, _, failed = record.read_text().partition(" ")
            return Outcome(code, stderr.read_text(), int(operations or -1), failed)

    def _child(self, work: Work, number: int, error: int, stderr: Path, record: Path) -> None:
        os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        file = os.open(record, os.O_RDWR | os.O_CREAT)
        code = 70
        try:
            faults = _Faults(os.path.realpath(self.directory), number, error)
            faults.install()
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            faults.end()
            os.write(file, f"{faults.count} {faults.failed}".encode())
            sys.stderr.flush()
            os._exit(code)


class _Faults:
    """Patches `os`, `fcntl.flock` and every way to open a file, for good: in a child only."""

    def __init__(self, directory: str, number: int, error: int) -> None:
        self._directory, self._number, self._error = directory, number, error
        self._numbers = itertools.count()
        self._active = True
        self._readlink = os.readlink
        self.count, self.failed = 0, ""

    def install(self) -> None:
        for name in _FUNCTIONS:
            setattr(os, name, self._wrap(name, getattr(os, name)))
        fcntl.flock = self._wrap("flock", fcntl.flock)
        real_open = os.open

        def open_file(
            path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None
        ) -> int:
            if dir_fd is not None:  # the audit event lacks it
                self._pass("open", os.path.join(self._path_of(dir_fd), path))
            return real_open(path, flags, mode, dir_fd=dir_fd)

        os.open = open_file
        sys.addaudithook(self._audit)

    def end(self) -> None:
        self._active = False

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and self._active and isinstance(arguments[0], str | bytes):
            path = os.fsdecode(arguments[0])
            if os.path.isabs(path):
                self._pass(event, path)

    def _wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def function(*arguments: Any, **options: Any) -> Any:
            if self._active and arguments:
                self._pass(name, self._path_of(arguments[0]))
            return real(*arguments, **options)

        return function

    def _path_of(self, target: Any) -> str:
        if isinstance(target, int) or hasattr(target, "fileno"):
            number = target if isinstance(target, int) else target.fileno()
            return self._readlink(f"/proc/self/fd/{number}")
        return os.path.abspath(os.fsdecode(target))

    def _pass(self, name: str, path: str) -> None:
        if path != self._directory and not path.startswith(f"{self._directory}/"):
            return
        number = next(self._numbers)
        self.count = max(self.count, number + 1)
        if number == self._number:
            self.failed = f"{name} {path.removeprefix(self._directory)}"
            raise OSError(self._error, os.strerror(self._error), path)


def cases(total: int, errors: tuple[int, ...] = ERRORS, step: int = 1) -> Iterator[tuple[int, int]]:
    """(number, error) of every `step`-th operation; the errors take turns."""
    return zip(range(0, total, step), itertools.cycle(errors), strict=False)


class Campaign:
    """Commands in a directory: a first run, a resumed one, and RL with a journal."""

    def __init__(self, world: Path, directory: Path) -> None:
        self.world, self.directory = world, directory
        self.undisturbed: dict[str, Path] = {}
        self.start: Path | None = None

    def arguments(self, kind: str, run_dir: Path) -> list[str]:
        if kind == "rl":
            self.start = self.start or make_rl_start(self.world, self.directory / "start")
            keys = {"model__path": self.start / "cpt", "rollout__model": self.start / "fp8"}
            keys |= {"schedule__total_steps": 2, "checkpoint__save_every": 1}
            return options(self.world, run_dir, "rl1", **keys)
        keys = {"schedule__total_steps": 4, "checkpoint__save_every": 2}
        return options(self.world, run_dir, "cpt", train__validate_every=2, **keys)

    def prepare(self, kind: str, run_dir: Path) -> list[str]:
        """The command of `kind` and what it finds in its run directory."""
        if kind == "resume":
            if "resume" not in self.undisturbed:
                stopped = self.directory / "stopped"
                command = [*self.arguments(kind, stopped), "--train.stop_after_step=3"]
                assert main(command) == 0
                (stopped / "rollouts").mkdir()
                self.undisturbed["resume"] = stopped
            shutil.copytree(self.directory / "stopped", run_dir)
        return self.arguments(kind, run_dir)

    def check(self, kind: str, cases: Iterator[tuple[int, int]]) -> list[str]:
        """Run the cases; returns a sentence about each that did not end as it should."""
        wrong = []
        for number, error in cases:
            run_dir = self.directory / f"{kind}-{number}-{errno.errorcode[error]}"
            command = self.prepare(kind, run_dir)
            outcome = Faulty(run_dir).run(functools.partial(main, command), number, error)
            case = f"{kind} {number} {errno.errorcode[error]} {outcome.failed}: "
            errors = [line for line in outcome.stderr.splitlines() if "error:" in line]
            if outcome.code not in (0, 3) or "Traceback" in outcome.stderr:
                wrong.append(f"{case}code {outcome.code}\n{outcome.stderr}")
            elif len(errors) != (outcome.code != 0):
                wrong.append(f"{case}code {outcome.code}, errors {errors}")
            else:
                wrong += [case + text for text in self._after(kind, run_dir, command)]
            shutil.rmtree(run_dir, ignore_errors=True)
        return wrong

    def _after(self, kind: str, run_dir: Path, command: list[str]) -> Iterator[str]:
        reference = self.reference(kind)
        if code := main(command):
            yield f"the same command returned {code} afterwards"
        else:
            names = ("loss", "gradient_norm")
            if curve(run_dir, *names) != curve(reference, *names):
                yield "the curve differs"
            assert_same_state(run_dir, reference)

    def reference(self, kind: str) -> Path:
        """A finished run of the kind."""
        reference = self.directory / f"{kind}-reference"
        if not reference.exists():
            assert main(self.prepare(kind, reference)) == 0
        return reference

    def total(self, kind: str) -> int:
        """How many file operations the command performs."""
        run_dir = self.directory / f"{kind}-counted"
        command = self.prepare(kind, run_dir)
        total = Faulty(run_dir).count(lambda: main(command))
        shutil.rmtree(run_dir)
        return total


def run_campaign(kinds: tuple[str, ...] = ("cpt", "resume", "rl"), step: int = 1) -> str:
    """Every operation of every command; returns a line per command, raises on the first failure."""
    results = []
    with tempfile.TemporaryDirectory(prefix="infir2-file-faults-") as temporary:
        directory = Path(temporary)
        campaign = Campaign(make_world(directory / "world"), directory)
        for kind in kinds:
            with contextlib.redirect_stderr(io.StringIO()):
                total = campaign.total(kind)
                wrong = campaign.check(kind, cases(total, ERRORS, step))
            assert not wrong, "\n".join(wrong)
            results.append(
                f"{kind}: {len(range(0, total, step))} of {total} file operations failed once"
            )
    return "\n".join(results)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--step", type=int, default=1, help="let every STEP-th operation fail")
    print(run_campaign(step=parser.parse_args().step))
