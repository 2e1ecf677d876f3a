"""Speed of `infir2 tokenize` against the tokenizers library alone, in turns, on the same texts and number of processes.

    python bench/tokenizing.py SOURCE --tokenizer DIR [--processes 2] [--rounds 3] [--to docs/results/tokenize.md]

The library alone: each process holds its share of the texts in memory, calls `encode_batch_fast` (64 texts at a time) and counts
the tokens; loading the tokenizer is not timed. Ours: unpacking, JSON, checks, tokens, both files on the disk; start and loading of
the tokenizer are timed apart.
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


def library_alone(texts: list[str], tokenizer: Path, processes: int) -> tuple[float, float]:
    """Tokens per second of all processes together, from the first call to the end of the slowest; tokens per CPU second."""
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(processes), context.Queue()
    by_length = sorted(texts, key=len, reverse=True)  # equal shares: nobody waits for the other
    shares = [by_length[index::processes] for index in range(processes)]
    workers = [
        context.Process(
            target=_encode, args=(share, str(tokenizer / "tokenizer.json"), barrier, results)
        )
        for share in shares
    ]
    for worker in workers:
        worker.start()
    found = [results.get() for _ in workers]
    for worker in workers:
        worker.join()
    tokens, seconds, cpu_seconds = zip(*found, strict=True)
    return sum(tokens) / max(seconds), sum(tokens) / sum(cpu_seconds)


def ours(source: Path, tokenizer: Path, processes: int) -> tuple[float, float, float]:
    """Tokens per second without and with the loading of the tokenizer; tokens per CPU second without it."""
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
    """Of this process and of its children that have ended."""
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
    words = parser.parse_args()
    texts = read_texts(words.source)
    rows = []
    for _ in range(words.rounds):
        rows.append(
            (
                *library_alone(texts, words.tokenizer, words.processes),
                *ours(words.source, words.tokenizer, words.processes),
            )
        )
    single_process, alone_cpu, without, whole, without_cpu = (
        statistics.median(column) for column in zip(*rows, strict=True)
    )
    lines = [
        "# Tokenising, thousand tokens per second",
        "",
        f"{words.processes} processes, {len(texts):,} documents of {sum(map(len, texts)) / 1e6:.1f} M characters, "
        f"tokenizer {words.tokenizer.name}, median of {words.rounds} rounds, the two in turns; {os.cpu_count()} CPUs.",
        "",
        "| | k tokens/s | against the library alone | each round |",
        "|---|---|---|---|",
    ]
    for name, value, base, column in (
        (
            "tokenizers library alone, texts in memory, nothing written",
            single_process,
            single_process,
            0,
        ),
        (
            "`infir2 tokenize`, from the first byte read to the renamed files",
            without,
            single_process,
            2,
        ),
        ("the same with loading of the tokenizer", whole, single_process, 3),
        ("tokenizers library alone, per CPU second", alone_cpu, alone_cpu, 1),
        ("`infir2 tokenize`, per CPU second", without_cpu, alone_cpu, 4),
    ):
        lines.append(
            f"| {name} | {value / 1e3:,.0f} | {value / base:.2f} | {', '.join(f'{row[column] / 1e3:,.0f}' for row in rows)} |"
        )
    command = f"python bench/tokenizing.py SOURCE --tokenizer {words.tokenizer.name} --processes {words.processes} --rounds {words.rounds}"
    lines += ["", f"Measured with `{command}`."]
    print("\n".join(lines))
    if words.to:
        words.to.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
