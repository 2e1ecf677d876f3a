"""`infir2 eval MODEL|URL --benchmarks ...`: evalscope's benchmarks against any engine.

The directory of a run, `run.dir`:

    settings.json       everything that decides the answers; a run goes on with the same ones only
    environment.json    software and machine
    answers.jsonl       every answer of an engine, synced one by one (journal.py)
    data/               the questions, in evalscope's layouts
    evalscope/          evalscope's own files and its output, evalscope.log
    result.json         scores with intervals and every question; result.html is for people
"""

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from infir2.checkpoint.environment import describe_environment
from infir2.checkpoint.lock import LOCK, RunLock
from infir2.engines.http_client import HttpClient
from infir2.errors import CheckFailedError, ConfigError, OutputExistsError
from infir2.evaluate import evalscope
from infir2.evaluate.benchmark_data import Copied, copy_benchmark
from infir2.evaluate.benchmark_options import BenchmarkOptions, identify_model
from infir2.evaluate.benchmark_page import result_page
from infir2.evaluate.benchmark_result import (
    BenchmarkResult,
    Question,
    gather_questions,
    score_benchmark,
)
from infir2.evaluate.benchmarks import Benchmark
from infir2.evaluate.engine_start import SERVED_NAME, StartedEngine
from infir2.evaluate.gateway import Gateway, Task
from infir2.evaluate.journal import ANSWERS, Journal, Row
from infir2.evaluate.judge import CodeJudge
from infir2.evaluate.nodes import NodeEngine, end_nodes, forget_nodes, serve_node, this_node
from infir2.evaluate.profiles import PROFILES, window_of
from infir2.evaluate.upstream import Engine, Restarts, Upstream
from infir2.files import disk_errors, encode_json_line, read_own, write_atomically
from infir2.terminal import StepProgress, begin_phase, log, log_text

SETTINGS, RESULT, PAGE = "settings.json", "result.json", "result.html"
# The questions with their answers, how many are beyond the context, evalscope's score.
Found = tuple[list[Question], int, float | None]
OWN_FILES = (SETTINGS, RESULT, PAGE, ANSWERS, "environment.json", "data", "evalscope", "engines")


def run_benchmarks(options: BenchmarkOptions) -> list[BenchmarkResult]:
    """Run the benchmarks and write result.json and result.html; what was answered is kept.

    Everything that can refuse the command does so before the first request for an answer. Raises
    DataError for the questions; ConfigError for evalscope, the engines and a directory with other
    settings; OutputExistsError for a directory of something else; CheckFailedError if evalscope
    fails. On several nodes only rank 0 has results; the others serve it.
    """
    if this_node().rank:
        serve_node(_engines(options), this_node(), options.run_dir)
        return []
    profile = PROFILES[options.profile]
    environment = evalscope.environment_directory(profile.release)
    evalscope.require(environment, profile.release)
    _check_directory(options.run_dir)
    model = identify_model(options)
    lock = RunLock.acquire(options.run_dir, log)
    try:
        begin_phase("reading the questions")
        copied = [_copy(options, profile.adapt(each)) for each in options.benchmarks]
        _settle(options, model, copied)
        log_file = _evalscope_log(options.run_dir)
        with (
            evalscope.Processes(environment, log_file, len(copied)) as processes,
            _open_gateway(options, model, copied) as gateway,
        ):
            seconds = _run_evalscope(processes, options, copied, gateway)
            _check_verdicts(gateway)
            found = [_gather(options, each, gateway) for each in copied]
        results = [_score(options, *each, seconds) for each in zip(copied, found, strict=True)]
        _write(options.run_dir, results, found, dict(gateway.upstream.faults))
    finally:
        lock.release()
    for result in results:
        log_text(result.describe())
        if not result.agrees:
            log(f"{result.name}: evalscope's own report says {result.evalscope_score}", "eval")
    return results


def _check_directory(directory: Path) -> None:
    """Raise OutputExistsError for a directory with anything but a run of benchmarks."""
    if not directory.exists():
        return
    names = {path.name for path in directory.iterdir()} if directory.is_dir() else {"no directory"}
    foreign = sorted(name for name in names if not name.startswith((LOCK, *OWN_FILES)))
    others = {name for name in names if not name.startswith(LOCK)}
    # A command that was refused for its questions, or killed while it read them, leaves a copy.
    has_questions_only = others == {"data"} and len(others) < len(names)
    if foreign or (others and SETTINGS not in names and not has_questions_only):
        raise OutputExistsError(
            f"--run.dir: {directory} exists and has no run of benchmarks "
            f"({', '.join(foreign or sorted(names))[:80]}); name another one, nothing was written."
        )


def _copy(options: BenchmarkOptions, benchmark: Benchmark) -> Copied:
    to = options.run_dir / "data" / benchmark.name
    shutil.rmtree(to, ignore_errors=True)
    alone = len(options.benchmarks) == 1
    return copy_benchmark(benchmark, options.data, to, window_of(benchmark), alone)


def _settings(options: BenchmarkOptions, model: str, copied: Sequence[Copied]) -> dict[str, Any]:
    """What decides the answers, one key each."""
    profile = PROFILES[options.profile]
    settings: dict[str, Any] = {
        "model": model,
        "engine": "url" if options.model_directory is None else options.engine.engine,
        "profile": profile.name,
        "evalscope": profile.release.version,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "seed": options.seed,
        "benchmarks": [each.benchmark.name for each in copied],
    }
    for each in copied:
        name, window = each.benchmark.name, window_of(each.benchmark)
        settings |= {
            f"{name}.samples": options.samples_of(each.benchmark),
            f"{name}.max_tokens": profile.limit(options, each.benchmark),
            f"{name}.questions": len(each.questions),
            f"{name}.data_sha256": each.fingerprint,
            f"{name}.prompts": profile.prompts(each.benchmark),
        }
        if window:
            settings[f"{name}.window"] = [moment.isoformat() for moment in window]
    return settings


def _settle(options: BenchmarkOptions, model: str, copied: Sequence[Copied]) -> None:
    """Write the settings, or compare them with those of the run that is there."""
    settings = _settings(options, model, copied)
    path = options.run_dir / SETTINGS
    with disk_errors(f"{options.run_dir}: cannot be written"):
        if not path.exists():
            environment = json.dumps(describe_environment(), indent=1).encode() + b"\n"
            write_atomically(options.run_dir / "environment.json", environment)
            write_atomically(path, json.dumps(settings, indent=1).encode() + b"\n")
            return
        old = json.loads(read_own(path))
    for key in sorted(old.keys() | settings.keys()):
        if old.get(key) != settings.get(key):
            raise ConfigError(
                f"--run.dir: {options.run_dir} has a run with {key} = {old.get(key)!r}, and now it "
                f"is {settings.get(key)!r}; restore the value, or name another directory."
            )


@contextmanager
def _open_gateway(
    options: BenchmarkOptions, model: str, copied: Sequence[Copied]
) -> Iterator[Gateway]:
    profile = PROFILES[options.profile]
    tasks = {
        each.benchmark.name: Task(
            options.samples_of(each.benchmark),
            options.seed,
            profile.prompts(each.benchmark).get("begin", ""),
        )
        for each in copied
    }
    total = sum(tasks[each.benchmark.name].samples * len(each.questions) for each in copied)
    problems = [e.directory / e.benchmark.file for e in copied if e.benchmark.file.endswith("quet")]
    journal = Journal(options.run_dir)
    progress = _Progress(total, journal)
    judge = CodeJudge(*problems)
    upstream = Upstream([], options.patience, parallel=options.parallel)
    directory, own = options.run_dir / "engines", _engines(options)
    forget_nodes(directory)
    others = (NodeEngine(directory, *each) for each in _engines_elsewhere(options))
    started: list[Restarts] = [*own, *others]
    try:
        with Gateway(tasks, journal, upstream, progress.add, judge) as gateway:
            begin_phase("starting the engines")
            gateway.open_engines(
                [Engine(url, model, HttpClient(url, options.api_key)) for url in options.urls],
                started,
                options.model or SERVED_NAME,
            )
            yield gateway
    finally:
        for engine in own:
            engine.kill()
        end_nodes(directory)
        progress.close()
        journal.close()


def _engines(options: BenchmarkOptions) -> list[StartedEngine]:
    """Those of this node."""
    if options.model_directory is None:
        return []
    node = this_node().rank
    return [
        StartedEngine(
            options.model_directory,
            options.engine,
            index,
            options.engines,
            options.parallel,
            options.run_dir / "engines",
            served_name=options.model or SERVED_NAME,
            port=0 if node or index else options.port,
            node=node,
        )
        for index in range(options.engines)
    ]


def _engines_elsewhere(options: BenchmarkOptions) -> list[tuple[int, int]]:
    """Rank and number of each engine of another node. Raises ConfigError for URLs."""
    nodes = this_node().number
    if options.model_directory is None and nodes > 1:
        raise ConfigError("URL: several nodes are for a MODEL; launch with --nodes 1.")
    return [(rank, index) for rank in range(1, nodes) for index in range(options.engines)]


class _Progress:
    """How many answers there are, how fast they come, and the time left."""

    def __init__(self, total: int, journal: Journal) -> None:
        self._known, self._tokens, self._start = len(journal), 0, time.monotonic()
        self._bar = StepProgress("eval", total, self._known, unit="answer")
        if self._known:
            self._bar.log(f"resumed after {self._known} of {total} answers")

    def add(self, row: Row) -> None:
        usage = (row.get("response") or {}).get("usage") or {}
        self._known += 1
        self._tokens += usage.get("completion_tokens") or 0
        rate = self._tokens / max(1e-3, time.monotonic() - self._start)
        self._bar.update(self._known, f"{rate:,.0f} tokens/s")

    def close(self) -> None:
        self._bar.close()


def _evalscope_log(run_dir: Path) -> Path:
    (run_dir / "evalscope").mkdir(exist_ok=True)
    return run_dir / "evalscope/evalscope.log"


def _run_evalscope(
    processes: evalscope.Processes,
    options: BenchmarkOptions,
    copied: Sequence[Copied],
    gateway: Gateway,
) -> dict[str, float]:
    """Seconds of each benchmark."""
    folder, seconds = options.run_dir / "evalscope", {}
    for each in copied:
        name, start = each.benchmark.name, time.monotonic()
        begin_phase(f"evalscope runs {name}")
        shutil.rmtree(folder / name, ignore_errors=True)
        task = {"url": gateway.url(name), "judge_url": gateway.judge_url(name), "key": gateway.key}
        config = PROFILES[options.profile].task_config(options, each, folder / name)
        processes.run([task | {"config": config}])
        if gateway.failure is not None:
            raise gateway.failure
        seconds[name] = time.monotonic() - start
    return seconds


def _check_verdicts(gateway: Gateway) -> None:
    """Raise CheckFailedError if a jail failed: evalscope counts such a program as wrong."""
    assert isinstance(gateway.judge, CodeJudge)
    if failures := gateway.judge.failures:
        raise CheckFailedError(
            f"{len(failures)} programs have no verdict (the last: {failures[-1]}); repair this "
            "machine's jails and run the same command again, the answers are kept."
        )


def _gather(options: BenchmarkOptions, each: Copied, gateway: Gateway) -> Found:
    work_dir = options.run_dir / "evalscope" / each.benchmark.name
    profile = PROFILES[options.profile]
    samples = profile.read_samples(work_dir, options.samples_of(each.benchmark))
    own = (row for row in gateway.journal.rows() if row["benchmark"] == each.benchmark.name)
    beyond = sum("refused" in row for row in own)
    return gather_questions(each.questions, samples), beyond, profile.reported_score(work_dir)


def _score(
    options: BenchmarkOptions,
    each: Copied,
    found: Found,
    seconds: Mapping[str, float],
) -> BenchmarkResult:
    questions, beyond, score = found
    k = options.samples_of(each.benchmark)
    taken = seconds[each.benchmark.name]
    return score_benchmark(each.benchmark, questions, k, beyond, taken, score)


def _write(
    directory: Path,
    results: Sequence[BenchmarkResult],
    found: Sequence[Found],
    faults: Mapping[str, int],
) -> None:
    settings = json.loads(read_own(directory / SETTINGS))
    result = {
        "settings": settings,
        "complete": all(each.is_complete for each in results),
        "retried": faults,
        "benchmarks": {each.name: each.as_json() for each in results},
        "questions": {
            each.name: [asdict(question) for question in questions]
            for each, (questions, *_) in zip(results, found, strict=True)
        },
    }
    page = result_page(settings, results, [questions for questions, *_ in found])
    with disk_errors(f"{directory}: the results cannot be written"):
        write_atomically(directory / RESULT, encode_json_line(result))
        write_atomically(directory / PAGE, page.encode("utf-8", "backslashreplace"))
    log(f"results are in {directory / RESULT} and {directory / PAGE}", "eval")
