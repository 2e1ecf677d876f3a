"""Text to Megatron's indexed data sets, by several processes, so that an interrupted run loses no finished chunk.

A chunk is some megabytes of rows of one source. Each becomes one file in `PREFIX.parts/`, published by a rename; the same
command run again takes those that are there. At the end they are joined in the order of the rows and renamed to PREFIX.bin,
PREFIX.json and, last, PREFIX.idx.
"""

import itertools
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from infir2.config.schema import SourceSection
from infir2.data.chat import ChatTokenizer, load_tokenizer
from infir2.data.indexed import IndexedDocuments, token_dtype, write_index
from infir2.data.rows import Quarantine, open_source, parse_document
from infir2.data.sources import RowError, Source
from infir2.errors import ConfigError, DataError, OutputExistsError
from infir2.launch.ranks import die_with_parent
from infir2.terminal import byte_progress

CHUNK_BYTES = 1 << 22
_BATCH_ROWS = 64


@dataclass(frozen=True)
class _Chunk:
    """Rows `first` to `last` of a source, and the file their tokens go to."""

    source: int
    first: int
    last: int
    num_bytes: int
    part: Path


@dataclass(frozen=True)
class Tokenized:
    documents: int
    tokens: int
    quarantined: int
    chunks_kept: int  # of an earlier run


class _Work:
    """What the forked processes inherit."""

    def __init__(self, sections: Sequence[SourceSection], tokenizer: ChatTokenizer) -> None:
        self.sections, self.tokenizer = sections, tokenizer
        self.sources: list[Source] = [open_source(section, "documents") for section in sections]
        self.dtype = token_dtype(tokenizer.vocab_size)
        for source in self.sources:
            for file in source.files:
                if isinstance(file, IndexedDocuments):
                    raise DataError(
                        f"{file.path} holds tokens already: take it out of the sources."
                    )

    def chunks(self, parts: Path) -> list[_Chunk]:
        found: list[_Chunk] = []
        for number, source in enumerate(self.sources):
            count = min(len(source), -(-source.num_bytes // CHUNK_BYTES))
            edges = [len(source) * index // count for index in range(count + 1)]
            for first, last in itertools.pairwise(edges):
                found.append(
                    _Chunk(
                        number,
                        first,
                        last,
                        source.num_bytes // count,
                        parts / f"{len(found):08d}.npz",
                    )
                )
        return found

    def plan(self) -> str:
        """All that decides the parts, as text."""
        files = [
            (str(file.path), file.path.stat().st_size, file.path.stat().st_mtime_ns)
            for s in self.sources
            for file in s.files
        ]
        fields = [section.text_field for section in self.sections]
        return json.dumps([files, fields, CHUNK_BYTES, self.tokenizer.document_fingerprint])

    def tokenize(self, chunk: _Chunk) -> None:
        """Write the part of a chunk: tokens, lengths [documents], and unusable rows as JSON."""
        source, section = self.sources[chunk.source], self.sections[chunk.source]
        tokens: list[np.ndarray] = []
        errors: list[tuple[int, str, str]] = []
        for start in range(chunk.first, chunk.last, _BATCH_ROWS):
            texts = []
            for row in range(start, min(start + _BATCH_ROWS, chunk.last)):
                try:
                    texts.append(parse_document(source.read(row), section))
                except RowError as error:
                    errors.append((row, error.reason, str(error)))
            tokens += [
                np.asarray(ids, dtype=self.dtype) for ids in self.tokenizer.encode_documents(texts)
            ]
        temporary = chunk.part.with_suffix(f".{os.getpid()}")
        with temporary.open("wb") as file:
            joined = np.concatenate(tokens) if tokens else np.zeros(0, self.dtype)
            np.savez(
                file,
                tokens=joined,
                lengths=np.asarray([len(ids) for ids in tokens], np.int64),
                errors=np.asarray(json.dumps(errors)),
            )
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(chunk.part)


_work: _Work  # set before the fork


def _begin() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    die_with_parent()


def _tokenize(chunk: _Chunk) -> None:
    if not chunk.part.exists():
        _work.tokenize(chunk)


def tokenize(
    sources: Sequence[Path],
    tokenizer_dir: Path,
    prefix: Path,
    workers: int = 0,
    text_field: str = "text",
    max_quarantined_fraction: float = 0.01,
) -> Tokenized:
    """Write the documents of `sources` (.jsonl, .jsonl.gz, .parquet, .txt, or directories of them) as PREFIX.bin and PREFIX.idx.

    Each document ends with the tokenizer's document end. workers: processes (0: one per CPU). Unusable rows are listed in
    PREFIX.quarantine.jsonl and left out. Raises OutputExistsError, ConfigError (tokenizer, parts of another job), DataError
    (sources, more unusable rows than the share allowed, a full disk); finished chunks stay for the next run.
    """
    outputs = {
        suffix: prefix.with_name(f"{prefix.name}.{suffix}")
        for suffix in ("idx", "bin", "json", "parts", "quarantine.jsonl")
    }
    parts = outputs["parts"]
    if outputs["idx"].exists() or (outputs["bin"].exists() and not parts.exists()):
        raise OutputExistsError(
            f"{outputs['idx']} or its .bin exists already; name another prefix, nothing was written."
        )
    global _work
    _work = _Work(
        [SourceSection(path=str(path), text_field=text_field) for path in sources],
        load_tokenizer(tokenizer_dir),
    )
    try:
        _claim(parts, _work.plan())
        chunks = _work.chunks(parts)
        kept = sum(chunk.part.exists() for chunk in chunks)
        quarantine = Quarantine(max_quarantined_fraction, outputs["quarantine.jsonl"])
        _run(chunks, workers or len(os.sched_getaffinity(0)), quarantine)
        lengths = _join(chunks, parts)
        num_tokens = int(lengths.sum())
        about = {
            "tokenizer": _work.tokenizer.document_fingerprint,
            "documents": len(lengths),
            "tokens": num_tokens,
        }
        about["source_bytes"] = sum(source.num_bytes for source in _work.sources)
        (parts / "json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        for suffix in ("bin", "json", "idx"):
            (parts / suffix).rename(outputs[suffix])
        shutil.rmtree(parts)
    except OSError as error:
        raise DataError(
            f"{prefix} cannot be written ({error.strerror or error}): make room or name another place."
        ) from error
    num_unusable = sum(counts.total() for counts in quarantine.counts.values())
    return Tokenized(len(lengths), num_tokens, num_unusable, kept)


def _claim(parts: Path, plan: str) -> None:
    """Make the directory of the parts, or check that it is this job's."""
    parts.mkdir(parents=True, exist_ok=True)
    stamp = parts / "plan"
    if stamp.exists() and stamp.read_text() != plan:
        raise ConfigError(
            f"{parts} is of another job (other sources, fields or tokenizer): remove it, or name another prefix."
        )
    stamp.write_text(plan)


def _run(chunks: Sequence[_Chunk], workers: int, quarantine: Quarantine) -> None:
    context = multiprocessing.get_context(
        "fork"
    )  # the tokenizer and the opened sources are inherited, not loaded again
    with (
        ProcessPoolExecutor(workers, context, _begin) as pool,
        byte_progress("tokenising", sum(chunk.num_bytes for chunk in chunks)) as on_bytes,
    ):
        try:
            for chunk, _ in zip(chunks, pool.map(_tokenize, chunks), strict=True):
                on_bytes(chunk.num_bytes)
                for row, reason, detail in json.loads(str(_read(chunk.part)["errors"])):
                    quarantine.add(_work.sources[chunk.source], row, RowError(reason, detail))
        except BrokenProcessPool:
            raise DataError(
                "a process was killed, probably for lack of memory: run the same command again with fewer --workers."
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _join(chunks: Sequence[_Chunk], parts: Path) -> np.ndarray:
    """Write bin and idx into the directory of the parts; returns the documents' lengths."""
    lengths = []
    (parts / "idx").unlink(missing_ok=True)
    with (parts / "bin").open("wb") as file:
        for chunk in chunks:
            part = _read(chunk.part)
            part["tokens"].tofile(file)
            lengths.append(part["lengths"])
        file.flush()
        os.fsync(file.fileno())
    joined = np.concatenate(lengths)
    if not len(joined):
        raise DataError(
            f"{_work.sources[0].path}: no row can be used; the quarantine file names the reasons."
        )
    write_index(parts / "idx", _work.dtype, joined)
    return joined


def _read(part: Path) -> Any:
    return np.load(part, allow_pickle=False)
