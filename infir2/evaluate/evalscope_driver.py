"""Runs evalscope, in its own environment: `python evalscope_driver.py` with a job on stdin.

A job is one line of JSON: `tasks`, keyword arguments of evalscope's TaskConfig, and for each `url`
and `key` of the gateway. So the key is in no command line. This file imports nothing of infir2,
which is not installed there. Code that a model wrote never runs here: the gateway has jails.
"""

import contextlib
import ctypes
import hashlib
import importlib
import json
import multiprocessing
import os
import queue
import signal
import sys
import urllib.request
import warnings
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

_PR_SET_PDEATHSIG = 1
_PARSER = "evalscope.metrics.math.parser"
_IMPORTED_LATER = ("openai", "sympy.physics.units", "math_verify", "plotly.express")


def main() -> None:
    """Run the tasks of the job on stdin, one after the other."""
    _die_with_parent()  # without the gateway it has nothing to do, and nobody would end it
    # The seconds of its imports pass before there is a job, also of what it imports later.
    from evalscope import TaskConfig, run_task

    scorers = Scorers()
    scorers.replace_forks()
    for name in _IMPORTED_LATER:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for task in json.loads(sys.stdin.readline())["tasks"]:
        judge = Judge(task["judge_url"], task["key"])
        judge.replace_execution()
        run_task(TaskConfig(api_url=task["url"], api_key=task["key"], **task["config"]))


class Judge:
    """Asks the gateway for the verdict of a program."""

    def __init__(self, url: str, key: str) -> None:
        self._url, self._key = url, key

    def __call__(self, **request: Any) -> bool:
        """Whether a program passes; raises OSError if there is no verdict."""
        headers = {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"}
        data = json.dumps(request).encode()
        asked = urllib.request.Request(self._url, data, headers)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(asked) as response:
            return bool(json.loads(response.read())["passes"])

    def replace_execution(self) -> None:
        """Put this judge in the place of everything in evalscope that runs code."""
        from evalscope.benchmarks.live_code_bench import evaluate_utils

        evaluate_utils.codegen_metrics = self.codegen_metrics
        try:
            from evalscope.api.mixin import CodeExecutionSandboxMixin
        except ImportError:  # 0.17.1, which is asked for no other benchmark with code
            return
        from evalscope.benchmarks.humaneval import utils

        utils.check_correctness = self.check_correctness
        CodeExecutionSandboxMixin.execute_code_in_sandbox = self.execute_code
        CodeExecutionSandboxMixin.use_sandbox = property(_is_mbpp)

    def codegen_metrics(
        self, samples_list: list, generations_list: list, *_: Any, **options: Any
    ) -> tuple[dict, dict, list]:
        """LiveCodeBench's: one problem, one program."""
        tests = samples_list[0]["input_output"]
        known = hashlib.sha256(tests.encode()).hexdigest()
        passes = self(
            program=generations_list[0][0], known=known, seconds=options.get("timeout", 6)
        )
        return {"pass@1": 100.0 * passes}, {0: [[passes]]}, [["{}"]]

    def check_correctness(self, problem: dict, completion: str, timeout: float, **_: Any) -> dict:
        """HumanEval's."""
        test = {
            "code": problem["test"],
            "entry_point": problem["entry_point"],
            "setup": problem["prompt"],
        }
        program = problem["prompt"] + completion
        passes = self(program=program, tests=[test], seconds=timeout)
        return {"task_id": problem["task_id"], "passed": passes, "result": str(passes)}

    def execute_code(self, code: str, timeout: float = 60, **_: Any) -> dict:
        """MBPP's: a program that ends with its asserts."""
        lines = code.rstrip().split("\n")
        first = len(lines)
        while first and (lines[first - 1].startswith("assert ") or not lines[first - 1].strip()):
            first -= 1
        program, test = "\n".join(lines[:first]), "\n".join(lines[first:])
        passes = self(program=program, tests=[{"code": test}], seconds=timeout)
        return {"status": "success" if passes else "error"}


class Scorers:
    """Processes that compare mathematical answers, as many as there are cores.

    evalscope forks its whole self for every comparison, one at a time and for up to 0.1 s, so that
    it can kill one that does not end. These are forked once, from a small process; one that misses
    evalscope's deadline is killed and replaced.
    """

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        # The most recently used one first, so that no more start than work at one time.
        self._idle: queue.LifoQueue[tuple[Any, Connection] | None] = queue.LifoQueue()

    def replace_forks(self) -> None:
        """Put these in the place of evalscope's forks, if this release has them."""
        try:
            parser: Any = importlib.import_module(_PARSER)
        except ImportError:
            return
        parser.run_isolated = self.run
        self._context.set_forkserver_preload([_PARSER, *_IMPORTED_LATER[1:3]])
        forkserver.ensure_running()
        for _ in os.sched_getaffinity(0):
            self._idle.put(None)

    def run(
        self,
        _: Callable[..., Any],
        args: tuple[Any, ...],
        deadline: float,
        label: str,
        *,
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """As evalscope's `run_isolated`: the result of its function `label`."""
        from evalscope.metrics.math.contracts import MathEvaluationError

        scorer = self._idle.get()
        try:
            scorer = scorer or self._start()
            connection = scorer[1]
            connection.send((label, args, kwargs or {}))
            if not connection.poll(deadline):
                raise MathEvaluationError(f"{label}: missed the deadline of {deadline} s")
            is_result, found, issued = connection.recv()
        except BaseException as error:  # also what cannot be pickled: its place must not be lost
            if scorer is not None:
                scorer[0].kill()
            self._idle.put(None)
            if not isinstance(error, Exception):
                raise
            raise MathEvaluationError(str(error) or f"{label}: its process ended") from error
        self._idle.put(scorer)
        for text, category in issued:
            warnings.warn(text, category, stacklevel=3)
        if not is_result:
            raise found
        return found

    def _start(self) -> tuple[Any, Connection]:
        ours, its = self._context.Pipe()
        process = self._context.Process(target=_score, args=(its,), daemon=True)
        process.start()
        its.close()
        return process, ours


def _score(connection: Connection) -> None:
    """Call functions of evalscope's parser until the connection is closed."""
    _die_with_parent()
    parser = importlib.import_module(_PARSER)
    with contextlib.suppress(EOFError):
        while True:
            label, args, kwargs = connection.recv()
            with warnings.catch_warnings(record=True) as caught:
                answer = _call(getattr(parser, label).__wrapped__, args, kwargs)
            issued = [(str(each.message), each.category) for each in caught]
            try:
                connection.send((*answer, issued))
            except (TypeError, ValueError, AttributeError) as error:  # it cannot be pickled
                connection.send((False, RuntimeError(str(error)), issued))


def _call(function: Callable[..., Any], args: Sequence[Any], kwargs: Any) -> tuple[bool, Any]:
    try:
        return True, function(*args, **kwargs)
    except Exception as error:
        return False, error


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _is_mbpp(adapter: Any) -> bool:
    """MBPP runs only in a sandbox, which the jail is; the others ask the functions above."""
    return adapter.name == "mbpp"


if __name__ == "__main__":
    main()
