"""`infir2` commands as processes that share one import of torch and transformers.

To import them takes most of a short command's time. On Linux the commands are forked from a process
that has imported them and does nothing else; elsewhere, where forking is unsafe, each starts anew.
"""

import atexit
import multiprocessing
import os
import runpy
import sys
from collections.abc import Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from infir2.terminal import pulse

IMPORTED = (  # what the demo's commands need, once for all of them
    "infir2.train.loop",
    "infir2.rl.loop",
    "infir2.evaluate.run",
    "infir2.convert.selfcheck",
    "torch._dynamo",  # torch's optimizers import it
    "torch.utils.tensorboard",
    "transformers.models.auto.modeling_auto",
    "transformers.models.qwen2.modeling_qwen2",
)
_SECONDS_TO_STOP = 10.0  # after Ctrl-C, which the command receives too and saves its run
_ANEW = multiprocessing.get_context("spawn")
_CONTEXT: ForkServerContext | SpawnContext = (
    multiprocessing.get_context("forkserver") if sys.platform == "linux" else _ANEW
)


def begin_imports() -> None:
    """Let the process that later commands are forked from import what they need."""
    _CONTEXT.set_forkserver_preload(list(IMPORTED))
    if _CONTEXT is not _ANEW:
        forkserver.ensure_running()


def start_command(
    arguments: Sequence[str],
    stdout: int | None = None,
    log_file: Path | None = None,
    niceness: int = 0,
    needs_torch: bool = True,
) -> BaseProcess:
    """Start `infir2 ARGUMENTS`, without waiting for the imports unless it needs them.

    Its stdout is that of this process, the open file `stdout` or, with its stderr, `log_file`.
    `niceness` is added to that of this process.
    """
    context = _CONTEXT if needs_torch else _ANEW
    # Not a daemon: a command may have processes of its own.
    process = context.Process(target=_run, args=(arguments, stdout, log_file, niceness))
    with pulse("importing torch"):
        process.start()
    return process


def run_command(arguments: Sequence[str], stdout: int | None, needs_torch: bool = True) -> int:
    """Run `infir2 ARGUMENTS` to its end. Returns the exit code, negative for a signal's number."""
    process = start_command(arguments, stdout, needs_torch=needs_torch)
    try:
        process.join()
    except KeyboardInterrupt:
        process.join(_SECONDS_TO_STOP)
        raise
    finally:
        process.terminate()
        process.join()
    return process.exitcode or 0


def _run(
    arguments: Sequence[str], stdout: int | None, log_file: Path | None, niceness: int
) -> None:
    """In the new process: what `python -m infir2 ARGUMENTS` does."""
    os.nice(niceness)
    if stdout is not None:
        os.dup2(stdout, 1)
    if log_file is not None:
        with log_file.open("wb") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
    sys.argv[1:] = arguments
    try:
        runpy.run_module("infir2", run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out
