"""Verdicts about code for evalscope, from our jails."""

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from infir2.verify import Limits, run_code
from infir2.verify.code import Rules

MEMORY_BYTES = 4 << 30  # what LiveCodeBench's runner allows


class CodeJudge:
    """Runs programs against tests.

    A request has `program`, `seconds` for each test, and `tests` as `run_code` has them or `known`,
    the SHA-256 of evalscope's `evaluation_sample` of a problem of LiveCodeBench, which may have
    hundreds of megabytes of tests. `failures` says why programs have no verdict.
    """

    def __init__(self, live_code_bench: Path | None = None) -> None:
        """`live_code_bench` is the copied Parquet file, if there is one; it is read per problem."""
        self.failures: list[str] = []
        self._reading = threading.Lock()
        self._problems: pq.ParquetFile | None = None
        self._numbers: dict[str, int] = {}
        if live_code_bench is not None:
            self._problems = pq.ParquetFile(live_code_bench)
            for number in range(self._problems.num_row_groups):
                text = json.dumps(self._sample(number))
                self._numbers[hashlib.sha256(text.encode()).hexdigest()] = number

    def __call__(self, request: dict[str, Any]) -> bool:
        """Whether the program passes. Raises KeyError for unknown tests, JailError."""
        try:
            known = request.get("known")
            tests = request["tests"] if known is None else self._tests(self._numbers[known])
            seconds = float(request["seconds"])
            limits = Limits(seconds, (seconds + 1) * len(tests), MEMORY_BYTES)
            rules: Rules = "infir2" if known is None else "live_code_bench"
            verdict = run_code(request["program"], tests, limits, rules)
            if verdict.reason == "jail_error":
                raise OSError(verdict.detail)
            return verdict.correct
        except Exception as error:
            self.failures.append(f"{type(error).__name__}: {error}")
            raise

    def _sample(self, number: int) -> dict[str, Any]:
        """What evalscope makes of a problem, key by key."""
        assert self._problems is not None
        with self._reading:
            (row,) = self._problems.read_row_group(number).to_pylist()
        tests = json.loads(row["public_test_cases"]) + json.loads(row["private_test_cases"])
        return {
            "inputs": [test["input"] for test in tests],
            "outputs": [test["output"] for test in tests],
            "fn_name": json.loads(row["metadata"]).get("func_name"),
        }

    def _tests(self, number: int) -> list[dict[str, Any]]:
        sample = self._sample(number)
        pairs = zip(sample["inputs"], sample["outputs"], strict=True)
        if not sample["fn_name"]:
            return [{"input": given, "output": expected} for given, expected in pairs]
        return [
            {
                "fn_name": sample["fn_name"],
                "args": [json.loads(line) for line in given.split("\n")],
                "expected": json.loads(expected),
            }
            for given, expected in pairs
        ]
