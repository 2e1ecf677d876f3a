"""Verb eval with --benchmarks: evalscope's benchmarks against engines."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from infir2.cli.arguments import JSON, Parser
from infir2.errors import CheckFailedError, ConfigError
from infir2.terminal import print_json, print_result

KEY_VARIABLE = "INFIR2_ENGINE_KEY"


def run_benchmarks(arguments: Sequence[str]) -> None:
    """infir2 eval URL[,URL...] --benchmarks NAMES --data DIR --run.dir DIR | --setup"""
    options = _parser().parse_args(arguments)
    from infir2.evaluate import evalscope

    if options.setup:
        print_result(evalscope.set_up(evalscope.environment_directory()))
        return
    for name in ("urls", "benchmarks", "data", "run_dir"):
        if not getattr(options, name):
            word = {"urls": "a URL", "run_dir": "--run.dir"}.get(name, f"--{name}")
            raise ConfigError(f"infir2 eval --benchmarks needs {word}; see `... --help`.")
    from infir2.evaluate import benchmark_run
    from infir2.evaluate.benchmarks import find_benchmark

    values = vars(options)
    as_json = values.pop("json")
    del values["setup"]
    names = dict.fromkeys(name.strip() for name in values.pop("benchmarks").split(","))
    results = benchmark_run.run_benchmarks(
        benchmark_run.BenchmarkOptions(
            **values | {"urls": tuple(map(_base_url, options.urls.split(",")))},
            benchmarks=tuple(map(find_benchmark, names)),
            api_key=os.environ.get(KEY_VARIABLE, ""),
        )
    )
    if as_json:
        print_json([result.as_json() for result in results])
    if missing := sum(result.missing for result in results if not result.is_complete):
        raise CheckFailedError(
            f"{missing} answers are missing; the same command asks for them again, and only them."
        )


def _base_url(url: str) -> str:
    """The address that OpenAI's clients call base URL."""
    url = url.strip().rstrip("/")
    if "://" not in url:
        raise ConfigError(f"{url!r} is no URL of an engine: write http://HOST:PORT/v1.")
    return url if url.endswith("/v1") else f"{url}/v1"


def _parser() -> Parser:
    parser = Parser(
        prog="infir2 eval",
        description="Runs evalscope's benchmarks against servers of OpenAI's API. Every answer is "
        "kept: the same command, run again, asks only for what is missing. Exit code 0: complete, "
        f"1: answers are missing. The servers' key is read from {KEY_VARIABLE}.",
    )
    parser.add_argument("urls", nargs="?", metavar="URL[,URL...]", help="servers with one model")
    parser.add_argument("--setup", action="store_true", help="install evalscope, and nothing else")
    parser.add_argument(
        "--benchmarks", metavar="NAMES", nargs="?", help="such as aime24,gpqa_diamond"
    )
    parser.add_argument("--data", type=Path, help="file or directory with their questions")
    parser.add_argument(
        "--run.dir", dest="run_dir", type=Path, metavar="DIR", help="of the results"
    )
    parser.add_argument("--model", default="", help="its name at the servers, if they have several")
    for name, meaning in (
        ("--samples", "answers per question (default: docs/recipe.md, section 3)"),
        ("--max-tokens", "of a response (default: docs/recipe.md, section 3)"),
        ("--seed", "of all samples (default 0)"),
    ):
        parser.add_argument(name, type=_count, default=0, metavar="N", help=meaning)
    parser.add_argument("--temperature", type=float, default=0.65, help="(default 0.65)")
    parser.add_argument("--top-p", type=float, default=0.95, help="(default 0.95)")
    parser.add_argument(
        "--parallel", type=_count, default=64, metavar="N", help="requests at one time (default 64)"
    )
    parser.add_argument(JSON, action="store_true", help="print the scores as JSON")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 on")
    return int(text)
