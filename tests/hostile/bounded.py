"""Runs hostile cases in a process with bounds of time and memory, and counts how they end.

    tally = run(Reader("JSON rows", cases), 200, directory)

A case ends well if it returns (the file was read) or raises UserError (refused with a sentence). It
fails with any other exception, by ending its process, and by exceeding a bound; the cases after it
run in a new process.
"""

import contextlib
import io
import itertools
import json
import os
import resource
import select
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from infir2.cli import main
from infir2.errors import UserError

CASE_SECONDS, START_SECONDS = 20.0, 120.0
GRACE_SECONDS = 5.0  # after which a case that does not end is killed
CASE_BYTES = 2**29
PROCESS_BYTES = 2**33  # beyond what the process needs without a case
MAX_SENTENCE = 3000

Case = tuple[str, Callable[[], object]]  # its name, and what reads the file


@dataclass(frozen=True)
class Reader:
    """What reads one kind of file.

    Attributes:
        cases: makes what it needs in an empty directory, and yields cases without end, the same
            ones each time.
        share: its part of the number of cases; less for a slow reader.
    """

    name: str
    cases: Callable[[Path], Iterator[Case]]
    share: float = 1.0


@dataclass
class Tally:
    """How the cases of one reader ended.

    Attributes:
        failures: a text for each case that failed, which begins with its name.
        seconds, slowest: the longest case.
        grown: bytes that the process grew by in the largest case.
    """

    name: str
    refused: int = 0
    read: int = 0
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    slowest: str = ""
    grown: int = 0

    @property
    def cases(self) -> int:
        return self.refused + self.read + len(self.failures)

    def add(self, label: str, end: dict[str, Any]) -> None:
        """Count a case by what its process said about its end."""
        self.seconds, self.slowest = max((self.seconds, self.slowest), (end["seconds"], label))
        self.grown = max(self.grown, end["grown"])
        if end["failure"] is not None:
            self.failures.append(f"{label}: {end['failure']}")
        elif end["refused"]:
            self.refused += 1
        else:
            self.read += 1


def run(reader: Reader, number: int, directory: Path) -> Tally:
    """Run the first `number` cases of a reader."""
    tally = Tally(reader.name)
    while tally.cases < number:
        _run_some(reader, tally, number, directory)
    return tally


def run_command(arguments: Sequence[str]) -> None:
    """Run a command; it must succeed or print one sentence, which is raised as UserError."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
        code = main(arguments)
    lines = [line for line in stderr.getvalue().splitlines() if not line.endswith(" so far")]
    said = "\n".join(lines)  # without those of a slow machine
    if code:
        assert 1 <= code <= 4, f"exit code {code}: {said[-2000:]}"
        assert said.startswith("infir2: error: "), said[-2000:]
        assert said.isprintable(), repr(said[-2000:])  # which includes one line
        raise UserError(said)


@contextlib.contextmanager
def nothing_else_below(directory: Path, out: Path) -> Iterator[None]:
    """The block writes `out`, `out.failed-*` (see `export fp8`) or nothing; both are removed."""
    before = set(directory.rglob("*"))
    try:
        yield
    finally:
        for path in (out, *out.parent.glob(f"{out.name}.failed-*")):
            shutil.rmtree(path, ignore_errors=True)
        others = set(directory.rglob("*")) ^ before
        assert not others, f"other files: {sorted(map(str, others))[:5]}"


def _run_some(reader: Reader, tally: Tally, number: int, directory: Path) -> None:
    """Run cases in one process until all are done or one takes the process with it."""
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir()
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _child(reader, tally.cases, number, directory, writing)
    os.close(writing)
    label = ""
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        for said in _lines(pipe.fileno()):
            if "label" not in said:
                tally.add(label, said)
            label = said.get("label", "")
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if tally.cases < number:  # the process ended before it had run them all
        if not label:
            log = _log_of(directory).read_text(errors="replace")[-2000:]
            raise RuntimeError(f"{reader.name}: case {tally.cases} cannot be made: {log}")
        killed = f"took longer than {CASE_SECONDS:.0f} s"
        why = killed if code == -signal.SIGKILL else f"ended with {code}"
        tally.failures.append(f"{label}: {why}")


def _lines(file: int) -> Iterator[dict[str, Any]]:
    """What the process says, until it ends, or is silent for too long in a case or between two."""
    rest, limit = b"", START_SECONDS
    while select.select([file], [], [], limit)[0] and (data := os.read(file, 1 << 16)):
        *lines, rest = (rest + data).split(b"\n")
        for said in map(json.loads, lines):
            limit = CASE_SECONDS + GRACE_SECONDS if "label" in said else START_SECONDS
            yield said


def _child(reader: Reader, first: int, number: int, directory: Path, file: int) -> NoReturn:
    try:
        os.setpgid(0, 0)
        _bound_process()
        _quiet(directory)
        for label, case in itertools.islice(reader.cases(directory), first, number):
            os.write(file, json.dumps({"label": label[:200]}).encode() + b"\n")
            os.write(file, json.dumps(_end_of(case)).encode() + b"\n")
        os._exit(0)
    except BaseException:
        os.write(2, traceback.format_exc().encode())
        os._exit(1)


def _log_of(directory: Path) -> Path:
    return directory.with_suffix(".log")


def _bound_process() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (used + PROCESS_BYTES,) * 2)


def _quiet(directory: Path) -> None:
    """Send what libraries and child processes print to a file beside the directory."""
    log = os.open(_log_of(directory), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)


def _end_of(case: Callable[[], object]) -> dict[str, Any]:
    """Run a case; returns whether it was refused, its failure or None, seconds, and growth."""
    before, started = _peak_bytes(), time.perf_counter()
    refused, failure = False, None
    try:
        case()
    except UserError as error:
        refused = True
        said = str(error)
        if not said or len(said) > MAX_SENTENCE or "Traceback" in said:
            failure = f"no sentence: {said[:MAX_SENTENCE]!r}"
    except BaseException:
        failure = traceback.format_exc()[-2000:]
    seconds, grown = time.perf_counter() - started, _peak_bytes(reset=False) - before
    if failure is None and seconds > CASE_SECONDS:
        failure = f"took {seconds:.1f} s"
    if failure is None and grown > CASE_BYTES:
        failure = f"took {grown / 2**20:.0f} MiB"
    return {"refused": refused, "failure": failure, "seconds": seconds, "grown": grown}


def _peak_bytes(reset: bool = True) -> int:
    """The largest resident size of this process; since the last reset where Linux permits it."""
    if reset:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if "VmHWM" in line)
