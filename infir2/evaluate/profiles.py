"""How evalscope is told what to ask: by our settings, or as the reference's scripts tell it.

A profile belongs to one release of evalscope: its options, the layouts of its data, its files.
`reference` asks what the reference's scripts really ask, with what is odd about it: ChatML inside
the messages, an instruction with doubled braces, "<think>" in the user's turn, GPQA with five
examples, and for LiveCodeBench a limit under a name that no server reads, so none. One request asks
for all samples of a prompt.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from infir2.errors import CheckFailedError, ConfigError, disk_reason
from infir2.evaluate import evalscope
from infir2.evaluate.benchmark_data import Copied, Window
from infir2.evaluate.benchmark_options import BenchmarkOptions
from infir2.evaluate.benchmarks import Benchmark, Row
from infir2.evaluate.evalscope import Release, Sample
from infir2.files import read_json_lines, read_regular

SYSTEM_PROMPT = "Please reason step by step, and put your final answer within \\boxed{}."
THINK = "<think>\n"
LIVE_CODE_BENCH_WINDOW = (datetime(2024, 8, 1), datetime(2025, 2, 1))  # v5; its last moment too
_AHEAD = 2  # an asking thread of evalscope scores its answer; meanwhile others wait at the gateway
_FILTERS = {"filters": {"remove_until": "</think>"}}
_REFERENCE_AIME = {
    "system_prompt": (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within "
        "\\boxed{{}}.<|im_end|>\n"
    ),
    "prompt_template": (
        "<|im_start|>user\n{query}<|im_end|>\n<|im_start|>assistant\n<think>\n"
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Profile:
    """One way to ask.

    Attributes:
        release: of evalscope.
        adapt: a benchmark in the layout of that release; raises ConfigError if it has none.
        prompts: what replaces evalscope's own prompts; "begin" is the assistant's turn.
        limit: most tokens of a response; None: as many as the model has positions.
        task_config: keyword arguments of evalscope's TaskConfig.
        read_samples: scored answers of evalscope's files, from its directory and k.
        reported_score: of evalscope's own report; None without one.
    """

    name: str
    release: Release
    adapt: Callable[[Benchmark], Benchmark]
    prompts: Callable[[Benchmark], dict[str, Any]]
    limit: Callable[[BenchmarkOptions, Benchmark], int | None]
    task_config: Callable[[BenchmarkOptions, Copied, Path], dict[str, Any]]
    read_samples: Callable[[Path, int], list[Sample]]
    reported_score: Callable[[Path], float | None]


def window_of(benchmark: Benchmark) -> Window | None:
    """First and last moment of a benchmark's contests."""
    return LIVE_CODE_BENCH_WINDOW if benchmark.name == "live_code_bench" else None


def _dataset_arguments(each: Copied, prompts: Mapping[str, Any]) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "local_path": str(each.directory.resolve()),
        **_FILTERS,
        **each.benchmark.arguments,
        **{key: text for key, text in prompts.items() if key != "begin"},
    }
    if window := window_of(each.benchmark):
        start, end = (f"{moment:%Y-%m-%d}" for moment in window)
        arguments["extra_params"] = {"start_date": start, "end_date": end}
    return arguments


def _prompts(benchmark: Benchmark) -> dict[str, Any]:
    """AIME's own template would repeat the system prompt."""
    if not benchmark.name.startswith("aime"):
        return {}
    return {"system_prompt": SYSTEM_PROMPT, "prompt_template": "{question}", "begin": THINK}


def _task_config(options: BenchmarkOptions, each: Copied, work_dir: Path) -> dict[str, Any]:
    benchmark = each.benchmark
    return {
        "model": "model",
        "eval_type": "openai_api",
        "datasets": [benchmark.name],
        "dataset_args": {benchmark.name: _dataset_arguments(each, _prompts(benchmark))},
        "repeats": options.samples_of(benchmark),
        "eval_batch_size": _AHEAD * options.parallel,
        "work_dir": str(work_dir.resolve()),
        "no_timestamp": True,
        "ignore_errors": True,  # of missing answers, which the result counts
        "judge": {"strategy": "rule"},
        "generation_config": {
            "max_tokens": options.max_tokens_of(benchmark),
            "temperature": options.temperature,
            "top_p": options.top_p,
            "retries": 1,
            "timeout": 10_000_000,  # the gateway has its own limits
        },
    }


def _reference(benchmark: Benchmark) -> Benchmark:
    if benchmark.name not in ("aime24", "aime25", "gpqa_diamond", "live_code_bench"):
        raise ConfigError(
            f"--profile reference: the reference has no script for {benchmark.name}; leave it out."
        )
    if benchmark.name == "aime24":
        return replace(benchmark, file="train.jsonl")
    if benchmark.name == "aime25":  # its two subsets were two files of one data set
        subset = {"subset_list": ["default"]}
        return replace(benchmark, convert=_with_question(benchmark.convert), arguments=subset)
    if benchmark.name == "gpqa_diamond":
        subset = {"subset_list": ["gpqa_diamond"]}
        return replace(benchmark, card=_card("gpqa_diamond", "train"), arguments=subset)
    return replace(
        benchmark, card=_card("release_latest", "test", benchmark.file), arguments={}
    )  # fmt: skip


def _with_question(convert: Callable[[Row], Row]) -> Callable[[Row], Row]:
    def converted(row: Row) -> Row:
        found = convert(row)
        return found | {"question": found["problem"]}

    return converted


def _card(config: str, split: str, file: str = "train.jsonl") -> str:
    """README.md of a data set with one configuration."""
    return (
        f"---\nconfigs:\n- config_name: {config}\n  data_files:\n  - split: {split}\n"
        f"    path: {file}\n---\n"
    )


def _reference_prompts(benchmark: Benchmark) -> dict[str, Any]:
    """GPQA's five examples are that release's own."""
    if benchmark.name.startswith("aime"):
        return dict(_REFERENCE_AIME)
    return {"few_shot_num": 5} if benchmark.name == "gpqa_diamond" else {}


def _reference_limit(options: BenchmarkOptions, benchmark: Benchmark) -> int | None:
    return None if benchmark.name == "live_code_bench" else options.max_tokens_of(benchmark)


def _reference_config(options: BenchmarkOptions, each: Copied, work_dir: Path) -> dict[str, Any]:
    benchmark, k = each.benchmark, options.samples_of(each.benchmark)
    name = "gpqa" if benchmark.name == "gpqa_diamond" else benchmark.name
    limit = "max_new_tokens" if benchmark.name == "live_code_bench" else "max_tokens"
    return {
        "model": "model",
        "eval_type": "service",
        "datasets": [name],
        "dataset_args": {name: _dataset_arguments(each, _reference_prompts(benchmark))},
        "eval_batch_size": max(1, _AHEAD * options.parallel // k),
        "work_dir": str(work_dir.resolve()),
        "timeout": 10_000_000,
        "ignore_errors": True,
        "judge_strategy": "rule",
        "generation_config": {
            "do_sample": True,
            "temperature": options.temperature,
            "top_p": options.top_p,
            limit: options.max_tokens_of(benchmark),
            "n": k,
        },
    }


def _read_reference(work_dir: Path, _: int) -> list[Sample]:
    """A row of that release has all choices of a question."""
    rows = {
        row["index"]: row
        for path in sorted(work_dir.rglob("reviews/**/*.jsonl"))
        for row in read_json_lines(path)
        if isinstance(row.get("index"), int)
    }
    return [
        Sample(
            subset=str(row.get("subset_name")),
            question=index,
            score=float(choice["review"]["result"]),
            answer=str(choice["review"]["pred"] or ""),
            target="" if str(choice["review"]["gold"])[:1] == "*" else choice["review"]["gold"],
            prompt="",
            text=choice["message"].get("content") or "",
            tokens=int((choice.get("usage") or {}).get("completion_tokens") or 0),
            truncated=choice.get("finish_reason") == "length",
        )
        for index, row in sorted(rows.items())
        for choice in row.get("choices") or []
    ]


def _reference_score(work_dir: Path) -> float | None:
    for path in sorted(work_dir.rglob("reports/**/*.json")):
        try:
            return float(json.loads(read_regular(path, evalscope.MAX_REPORT_BYTES))["score"])
        except OSError as error:
            raise CheckFailedError(f"{path} cannot be read ({disk_reason(error)}).") from error
    return None


PROFILES = {
    each.name: each
    for each in (
        Profile(
            "current",
            evalscope.CURRENT,
            lambda benchmark: benchmark,
            _prompts,
            lambda options, benchmark: options.max_tokens_of(benchmark),
            _task_config,
            evalscope.read_samples,
            evalscope.reported_score,
        ),
        Profile(
            "reference",
            evalscope.REFERENCE,
            _reference,
            _reference_prompts,
            _reference_limit,
            _reference_config,
            _read_reference,
            _reference_score,
        ),
    )
}
