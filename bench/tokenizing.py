"""Speed of `infir2 tokenize` against the bare tokenizers library, alternating on the same texts.

    python bench/tokenizing.py SOURCE --tokenizer DIR [--processes 2] [--rounds 3] [--to
    docs/results/tokenize.md]

The bare library: each process holds its share of the texts in memory, calls `encode_batch_fast` on
64 texts at a time and counts tokens; loading the tokenizer is not timed. Ours: decompression, JSON,
checks, tokens, both files on disk; start-up and loading of the tokenizer are timed separately.
"""

import argparse
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from infir2.config.schema import SourceSection
from infir2.data import load_tokenizer
from infir2.data.rows import open_source, parse_document
from infir2.data.tokenize import tokenize

BATCH = 64


def read_texts(source: Path) -> list[str]:
    section = SourceSection(path=str(source))
    rows = open_source(section, "documents")
    return [parse_document(rows.read(index), section) for index in range(len(rows))]


def _encode(texts: list[str], tokenizer_file: str, barrier: Any, results: Any) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer.from_file(tokenizer_file)
    barrier.wait()
    started, cpu = time.perf_counter(), time.process_time()
    num_tokens = 0
    for first in range(0, len(texts), BATCH):
        encodings = tokenizer.encode_batch_fast(
            texts[first : first + BATCH], add_special_tokens=False
        )
        num_tokens += sum(len(encoding.ids) for encoding in encodings)
    results.put((num_tokens, time.perf_counter() - started, time.process_time() - cpu))


def bare_library(texts: list[str], tokenizer: Path, processes: int) -> tuple[float, float]:
    """(tokens per second of all processes until the slowest ends, tokens per CPU second)."""
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(processes), context.Queue()
    by_length = sorted(
        texts, key=len, reverse=True
    )  # equal shares, so processes end at the same time
    shares = [by_length[index::processes] for index in range(processes)]
    workers = [
        context.Process(
            target=_encode, args=(share, str(tokenizer / "tokenizer.json"), barrier, results)
        )
        for share in shares
    ]
    for worker in workers:
        worker.start()
    measured = [results.get() for _ in workers]
    for worker in workers:
        worker.join()
    tokens, seconds, cpu_seconds = zip(*measured, strict=True)
    return sum(tokens) / max(seconds), sum(tokens) / sum(cpu_seconds)


def ours(source: Path, tokenizer: Path, processes: int) -> tuple[float, float, float]:
    """Tokens per second without and with tokenizer loading; tokens per CPU second without it."""
    started, cpu = time.perf_counter(), cpu_seconds()
    load_tokenizer(tokenizer)
    loading, loading_cpu = time.perf_counter() - started, cpu_seconds() - cpu
    with tempfile.TemporaryDirectory() as directory:
        started, cpu = time.perf_counter(), cpu_seconds()
        done = tokenize([source], tokenizer, Path(directory) / "out", processes)
        seconds, used = time.perf_counter() - started, cpu_seconds() - cpu
    return (
        done.tokens / (seconds - loading),
        done.tokens / seconds,
        done.tokens / (used - loading_cpu),
    )


def cpu_seconds() -> float:
    """CPU seconds of this process and of its children that have ended."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--to", type=Path)
    options = parser.parse_args()
    texts = read_texts(options.source)
    rows = []
    for _ in range(options.rounds):
        rows.append(
            (
                *bare_library(texts, options.tokenizer, options.processes),
                *ours(options.source, options.tokenizer, options.processes),
            )
        )
    bare, bare_cpu, without_loading, with_loading, cpu = (
        statistics.median(column) for column in zip(*rows, strict=True)
    )
    lines = [
        "# Tokenizing, thousand tokens per second",
        "",
        f"{options.processes} processes, {len(texts):,} documents of"
        f" {sum(map(len, texts)) / 1e6:.1f} M characters, tokenizer {options.tokenizer.name},"
        f" median of {options.rounds} alternating rounds; {os.cpu_count()} CPUs.",
        "",
        "| | k tokens/s | against the bare library | each round |",
        "|---|---|---|---|",
    ]
    for name, value, base, column in (
        ("bare tokenizers library, texts in memory, nothing written", bare, bare, 0),
        ("`infir2 tokenize`, first byte read to files renamed", without_loading, bare, 2),
        ("the same with loading of the tokenizer", with_loading, bare, 3),
        ("bare tokenizers library, per CPU second", bare_cpu, bare_cpu, 1),
        ("`infir2 tokenize`, per CPU second", cpu, bare_cpu, 4),
    ):
        rounds = ", ".join(f"{row[column] / 1e3:,.0f}" for row in rows)
        lines.append(f"| {name} | {value / 1e3:,.0f} | {value / base:.2f} | {rounds} |")
    command = (
        f"python bench/tokenizing.py SOURCE --tokenizer {options.tokenizer.name}"
        f" --processes {options.processes} --rounds {options.rounds}"
    )
    lines += ["", f"Measured with `{command}`."]
    print("\n".join(lines))
    if options.to:
        options.to.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
