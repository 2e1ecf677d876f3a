"""Verb eval with --benchmarks: evalscope's benchmarks against engines."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infir2.cli.arguments import JSON, Parser
from infir2.cli.engine_options import (
    add_engine_options,
    fraction,
    positive_integer,
    take_engine_options,
    temperature,
)
from infir2.config.schema import EvalRecipe
from infir2.errors import CheckFailedError, ConfigError
from infir2.terminal import begin_phase, print_json, print_result

if TYPE_CHECKING:
    from infir2.evaluate.benchmark_options import BenchmarkOptions

KEY_VARIABLE = "INFIR2_ENGINE_KEY"


def run_benchmarks(arguments: Sequence[str]) -> None:
    """infir2 eval MODEL|URL[,URL...] --benchmarks NAMES --data DIR --run.dir DIR | --setup"""
    options = _parser().parse_args(arguments)
    from infir2.evaluate import evalscope
    from infir2.evaluate.profiles import PROFILES

    if options.setup:
        begin_phase("installing evalscope")
        release = PROFILES[options.profile].release
        print_result(evalscope.set_up(evalscope.environment_directory(release), release))
        return
    for name in ("target", "benchmarks", "data", "run_dir"):
        if not getattr(options, name):
            word = {"target": "a MODEL or URL", "run_dir": "--run.dir"}.get(name, f"--{name}")
            raise ConfigError(
                f"infir2 eval --benchmarks needs {word}; see `infir2 eval --benchmarks --help`."
            )
    _run(_options(vars(options)), options.json)


def run_recipe(recipe: EvalRecipe, as_json: bool) -> None:
    """Run the benchmarks of a recipe: [benchmarks] names them, [evaluate] has their settings."""
    from infir2.engines.engine_options import EngineOptions
    from infir2.evaluate.benchmark_options import BenchmarkOptions
    from infir2.evaluate.benchmarks import find_benchmark

    evaluate, rollout = recipe.evaluate, recipe.rollout
    options = BenchmarkOptions(
        urls=(),
        benchmarks=tuple(map(find_benchmark, recipe.benchmarks.names)),
        data=Path(recipe.benchmarks.data),
        run_dir=Path(recipe.run.dir),
        samples=evaluate.samples,
        max_tokens=evaluate.max_response_tokens,
        temperature=evaluate.temperature,
        top_p=evaluate.top_p,
        parallel=rollout.max_running_requests,
        seed=recipe.run.seed,
        model_directory=Path(recipe.model.path),
        engine=EngineOptions(
            engine=rollout.engine,
            python=rollout.python,
            server_option=rollout.server_options,
            tensor_parallel=rollout.tensor_parallel,
            memory_fraction=rollout.memory_fraction,
        ),
    )
    _run(options, as_json)


def _run(options: "BenchmarkOptions", as_json: bool) -> None:
    from infir2.evaluate.benchmark_run import run_benchmarks as run

    results = run(options)
    if as_json and results:
        print_json([result.as_json() for result in results])
    if missing := sum(result.missing for result in results if not result.is_complete):
        raise CheckFailedError(
            f"{missing} answers are missing; the same command asks for them again, and only them."
        )


def _options(values: dict[str, Any]) -> "BenchmarkOptions":
    from infir2.evaluate.benchmark_options import BenchmarkOptions
    from infir2.evaluate.benchmarks import find_benchmark

    target = values["target"]
    is_url = "://" in target
    names = dict.fromkeys(name.strip() for name in values["benchmarks"].split(","))
    same = (
        *("data", "run_dir", "model", "engines", "parallel", "port", "profile"),
        *("samples", "max_tokens", "seed", "temperature", "top_p"),
    )
    return BenchmarkOptions(
        urls=tuple(map(_base_url, target.split(","))) if is_url else (),
        model_directory=None if is_url else Path(target),
        benchmarks=tuple(map(find_benchmark, names)),
        api_key=os.environ.get(KEY_VARIABLE, ""),
        engine=take_engine_options(values),
        **{name: values[name] for name in same},
    )


def _base_url(url: str) -> str:
    """The address that OpenAI's clients call base URL."""
    url = url.strip().rstrip("/")
    return url if url.endswith("/v1") else f"{url}/v1"


def _parser() -> Parser:
    parser = Parser(
        prog="infir2 eval",
        description="Runs evalscope's benchmarks against servers of OpenAI's API, or against "
        "engines that it starts for a model. Every answer is kept: the same command, run again, "
        "asks only for what is missing. Exit code 0: complete, 1: answers are missing. The key of "
        f"servers is read from {KEY_VARIABLE}.",
    )
    parser.add_argument(
        "target", nargs="?", metavar="MODEL|URL[,URL...]", help="directory to serve, or servers"
    )
    parser.add_argument("--setup", action="store_true", help="install evalscope, and nothing else")
    parser.add_argument(
        "--benchmarks", metavar="NAMES", nargs="?", help="such as aime24,gpqa_diamond"
    )
    parser.add_argument(
        "--profile",
        choices=("current", "reference"),
        default="current",
        help="reference: what the reference's scripts ask, by evalscope 0.17.1 (default current)",
    )
    parser.add_argument("--data", type=Path, help="file or directory with their questions")
    parser.add_argument(
        "--run.dir", dest="run_dir", type=Path, metavar="DIR", help="of the results"
    )
    parser.add_argument("--model", default="", metavar="NAME", help="its name at the servers")
    for name, meaning in (
        ("--samples", "answers per question (default: docs/recipe.md, section 3)"),
        ("--max-tokens", "of a response (default: docs/recipe.md, section 3)"),
        ("--seed", "of all samples (default 0)"),
        ("--port", "of loopback, of the first engine (default: a free one)"),
    ):
        parser.add_argument(name, type=whole_number, default=0, metavar="N", help=meaning)
    parser.add_argument("--temperature", type=temperature, default=0.65, help="(default 0.65)")
    parser.add_argument("--top-p", type=fraction, default=0.95, help="(default 0.95)")
    parser.add_argument(
        "--parallel",
        type=positive_integer,
        default=64,
        metavar="N",
        help="requests at one time (default 64)",
    )
    engines_help = "servers to start for a MODEL (default 1)"
    parser.add_argument(
        "--engines", type=positive_integer, default=1, metavar="N", help=engines_help
    )
    add_engine_options(parser)
    parser.add_argument(JSON, action="store_true", help="print the scores as JSON")
    return parser


def whole_number(text: str) -> int:
    if not text.isdecimal():
        raise ValueError
    return int(text)
