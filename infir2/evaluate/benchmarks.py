"""The benchmarks that `infir2 eval` runs with evalscope, and their questions in its layouts.

evalscope loads a directory without network if it has the layout below. It deletes files in that
directory and asks a hub for a path that is missing, so it never gets the user's own.
"""

import difflib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from infir2.data.types import RowError
from infir2.errors import ConfigError
from infir2.evaluate.benchmark_tests import decode_tests

Row = dict[str, Any]

PROBLEM = ("problem", "question", "prompt")
ANSWER = ("answer", "expected answer", "final answer")


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: evalscope's.
        words: how files and directories of its data are called, without case and punctuation.
        convert: a row in evalscope's columns; raises RowError.
        key: the column that tells questions apart.
        file: where evalscope looks in its directory.
        prefer: words of paths to choose among several configurations of one data set.
        arguments: more of evalscope's dataset_args.
        card: README.md of the directory, which names splits that no file name can.
        max_tokens, samples: of docs/recipe.md, section 3.
    """

    name: str
    words: tuple[str, ...]
    convert: Callable[[Row], Row]
    key: str
    file: str = "test.jsonl"
    prefer: tuple[str, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    card: str = ""
    max_tokens: int = 31_000
    samples: int = 1


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of that name. Raises ConfigError with the nearest name."""
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    word = plain_word(name)
    same = [each.name for each in BENCHMARKS.values() if word in each.words]
    near = same or difflib.get_close_matches(name.lower(), BENCHMARKS, 1, 0.5)
    advice = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(
        f"--benchmarks: {name!r} is not a benchmark; {advice}there are {', '.join(BENCHMARKS)}."
    )


def plain_word(name: str) -> str:
    """Letters and digits of a name, in lower case: "AIME_2024" -> "aime2024"."""
    return "".join(letter for letter in name.lower() if letter.isalnum())


def find_value(row: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """The value of the first of several columns, whose names may have any case; None without one.

    Raises RowError if the row has none of the columns.
    """
    by_word = {str(name).lower().replace("_", " ").strip(): name for name in row}
    for name in names:
        if name in by_word:
            return row[by_word[name]]
    fields = ", ".join(sorted(map(str, row)))
    raise RowError("no_field", f"has no field `{names[0]}` (it has {fields})")


def text_of(row: Mapping[str, Any], *names: str) -> str:
    """A text or a finite number as text, "84" for 84.0. Raises RowError."""
    value = find_value(row, names)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RowError("bad_field", f"has a `{names[0]}` that is neither text nor a number")
    if isinstance(value, float):
        if not math.isfinite(value):
            raise RowError("bad_field", f"has a `{names[0]}` that is {value}")
        value = int(value) if value.is_integer() else value
    if not str(value).strip():
        raise RowError("empty", f"has an empty `{names[0]}`")
    return str(value)


def _optional(row: Mapping[str, Any], name: str) -> str:
    try:
        return text_of(row, name)
    except RowError:
        return ""


def _problem(row: Row) -> Row:
    return {"problem": text_of(row, *PROBLEM), "answer": text_of(row, *ANSWER)}


def _math_500(row: Row) -> Row:
    level = text_of(row, "level").lower().removeprefix("level").strip()
    if level not in ("1", "2", "3", "4", "5"):
        raise RowError("bad_field", f"has a `level` that is not 1 to 5 but {level[:20]!r}")
    more = {"unique_id": _optional(row, "unique id"), "solution": _optional(row, "solution")}
    return _problem(row) | {"level": int(level)} | more


def _amc(row: Row) -> Row:
    more = {name: _optional(row, name) for name in ("year", "url", "solution")}
    return _problem(row) | more


def _gsm8k(row: Row) -> Row:
    return {"question": text_of(row, *PROBLEM), "answer": text_of(row, *ANSWER)}


def _gpqa(row: Row) -> Row:
    names = ("Question", "Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3)))
    found = {name: text_of(row, name.lower()) for name in names}
    choices = [found[name].strip() for name in names[1:]]
    if choices[0] in choices[1:]:
        raise RowError("bad_field", "has a wrong answer that equals the correct one")
    return found


def _humaneval(row: Row) -> Row:
    names = ("task_id", "prompt", "canonical_solution", "test", "entry_point")
    return {name: text_of(row, name.replace("_", " ")) for name in names}


def _mbpp(row: Row) -> Row:
    tests = find_value(row, ("test list",))
    if not isinstance(tests, list) or not tests or not all(isinstance(t, str) for t in tests):
        raise RowError("bad_field", "has a `test_list` that is no list of texts")
    imports = row.get("test_imports")  # of the sanitized configuration
    setup = "\n".join(imports) if isinstance(imports, list) else _optional(row, "test setup code")
    return {
        "task_id": int(text_of(row, "task id")),
        "text": text_of(row, "text", "prompt"),
        "code": text_of(row, "code"),
        "test_list": tests,
        "test_setup_code": setup,
    }


def _live_code_bench(row: Row) -> Row:
    """Columns of LiveCodeBench with its tests as JSON and the date as text."""
    tests = {name: _tests(row, name) for name in ("public test cases", "private test cases")}
    function = _function_name(row)
    kinds = {test["testtype"] for each in tests.values() for test in each}
    if not kinds:
        raise RowError("empty", "has no test")
    if ("functional" in kinds) != bool(function):
        raise RowError("bad_field", "has tests that do not fit the `func_name` of its `metadata`")
    optional = ("question title", "platform", "question id", "contest id", "difficulty")
    return {
        "question_content": text_of(row, "question content"),
        "contest_date": _date(row).isoformat(),
        "starter_code": _optional(row, "starter code"),
        "metadata": json.dumps({"func_name": function} if function else {}),
        **{name.replace(" ", "_"): json.dumps(found) for name, found in tests.items()},
        **{name.replace(" ", "_"): _optional(row, name) for name in optional},
    }


def _tests(row: Row, name: str) -> list[dict[str, str]]:
    try:
        return decode_tests(find_value(row, (name,)))
    except ValueError as error:
        column = name.replace(" ", "_")
        raise RowError("bad_field", f"has a `{column}` that {error}") from None


def _function_name(row: Row) -> str:
    data = row.get("metadata") or {}
    try:
        data = json.loads(data) if isinstance(data, str) else data
    except (ValueError, RecursionError):
        raise RowError("bad_field", "has `metadata` that is not JSON") from None
    name = data.get("func_name") if isinstance(data, dict) else None
    if name is not None and not (isinstance(name, str) and name.isidentifier()):
        raise RowError("bad_field", "has a `func_name` that is no name of a function")
    return name or ""


def _date(row: Row) -> datetime:
    value = find_value(row, ("contest date",))
    try:
        date = value if isinstance(value, datetime) else datetime.fromisoformat(str(value))
    except ValueError:
        raise RowError("bad_field", f"has a `contest_date` {str(value)[:40]!r}, no date") from None
    return date.replace(tzinfo=None)


_AMC_CARD = """\
---
configs:
- config_name: default
  data_files:
  - split: amc
    path: amc.jsonl
---
"""
_DEFAULT = {"subset_list": ["default"]}
_ZERO_SHOT = {"few_shot_num": 0}
BENCHMARKS = {
    each.name: each
    for each in (
        Benchmark("aime24", ("aime24", "aime2024"), _problem, "problem", samples=32),
        Benchmark("aime25", ("aime25", "aime2025"), _problem, "problem", samples=32),
        Benchmark(
            name="gpqa_diamond",
            words=("gpqadiamond", "gpqa"),
            convert=_gpqa,
            key="Question",
            file="train.jsonl",
            prefer=("gpqadiamond",),
            max_tokens=26_000,
            samples=8,
        ),
        Benchmark(
            name="live_code_bench",
            words=("livecodebench", "lcb", "codegenerationlite"),
            convert=_live_code_bench,
            key="question_content",
            file="test.parquet",
            arguments=_DEFAULT,
            max_tokens=27_000,
            samples=8,
        ),
        Benchmark("math_500", ("math500",), _math_500, "problem"),
        Benchmark(
            name="amc",
            words=("amc",),
            convert=_amc,
            key="problem",
            file="amc.jsonl",
            arguments={"subset_list": ["amc"]},
            card=_AMC_CARD,
        ),
        Benchmark(
            name="gsm8k",
            words=("gsm8k",),
            convert=_gsm8k,
            key="question",
            prefer=("main",),
            arguments=_DEFAULT | _ZERO_SHOT,
        ),
        Benchmark("humaneval", ("humaneval",), _humaneval, "prompt", arguments=_DEFAULT),
        Benchmark(
            name="mbpp",
            words=("mbpp",),
            convert=_mbpp,
            key="text",
            prefer=("full",),
            arguments=_DEFAULT | _ZERO_SHOT,
        ),
    )
}
