"""Tokenize text into Megatron's indexed data sets, in several processes, resumable by chunk.

A chunk is a few megabytes of rows of one source. A worker tokenizes it into one file in
`PREFIX.parts/`, published by a rename; when the same command runs again, it reuses these files. At
the end they are joined in the order of the rows, and renamed to PREFIX.bin, PREFIX.json and, last,
PREFIX.idx.
"""

import io
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

from infir2.config.data_sections import DocumentBos
from infir2.config.schema import SourceSection
from infir2.data.chat import ChatTokenizer, load_tokenizer
from infir2.data.indexed import IndexedDocuments, token_dtype, write_index
from infir2.data.rows import Quarantine, open_source, parse_document
from infir2.data.sources import Source
from infir2.data.types import RowError
from infir2.errors import ConfigError, DataError, OutputExistsError
from infir2.files import write_atomically
from infir2.launch.ranks import die_with_parent
from infir2.terminal import begin_phase, byte_progress

CHUNK_BYTES = 1 << 22
_BATCH_ROWS = 64


@dataclass(frozen=True)
class _Chunk:
    """Rows [first, last) of a source, and the file for their tokens."""

    source: int
    first: int
    last: int
    num_bytes: int
    part: Path


@dataclass(frozen=True)
class Tokenized:
    """Counts of a finished `tokenize`."""

    documents: int
    tokens: int
    quarantined: int
    chunks_kept: int  # chunks that an earlier, interrupted run had finished


class _Job:
    """Sources, field names and tokenizer, which the forked workers inherit."""

    def __init__(self, sections: Sequence[SourceSection], tokenizer: ChatTokenizer) -> None:
        self.sections, self.tokenizer = sections, tokenizer
        self.sources: list[Source] = [open_source(section, "documents") for section in sections]
        self.dtype = token_dtype(tokenizer.vocab_size)
        for source in self.sources:
            for file in source.files:
                if isinstance(file, IndexedDocuments):
                    raise DataError(
                        f"{file.path} is tokenized already: remove it from the sources."
                    )

    def chunks(self, parts: Path) -> list[_Chunk]:
        """Split the sources into chunks of about CHUNK_BYTES; `parts` is the directory of files."""
        chunks: list[_Chunk] = []
        for number, source in enumerate(self.sources):
            count = min(len(source), -(-source.num_bytes // CHUNK_BYTES))
            edges = [len(source) * index // count for index in range(count + 1)]
            for first, last in itertools.pairwise(edges):
                part = parts / f"{len(chunks):08d}.npz"
                chunks.append(_Chunk(number, first, last, source.num_bytes // count, part))
        return chunks

    def plan(self) -> str:
        """Return everything that determines the content of the parts, as text."""
        paths = [file.path for source in self.sources for file in source.files]
        files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        fields = [section.text_field for section in self.sections]
        return json.dumps([files, fields, CHUNK_BYTES, self.tokenizer.document_fingerprint])

    def tokenize(self, chunk: _Chunk) -> None:
        """Write a chunk's file: tokens, lengths of the documents, and unusable rows as JSON."""
        source, section = self.sources[chunk.source], self.sections[chunk.source]
        tokens: list[np.ndarray] = []
        errors: list[tuple[int, str, str]] = []
        for start in range(chunk.first, chunk.last, _BATCH_ROWS):
            texts: dict[int, str] = {}
            for row in range(start, min(start + _BATCH_ROWS, chunk.last)):
                try:
                    texts[row] = parse_document(source.read(row), section)
                except RowError as error:
                    errors.append((row, error.reason, str(error)))
            tokens += [np.asarray(ids, dtype=self.dtype) for ids in self._encode(texts, errors)]
        file = io.BytesIO()
        np.savez(
            file,
            tokens=np.concatenate(tokens) if tokens else np.zeros(0, self.dtype),
            lengths=np.asarray([len(ids) for ids in tokens], np.int64),
            errors=np.asarray(json.dumps(errors)),
        )
        write_atomically(chunk.part, file.getvalue())

    def _encode(self, texts: dict[int, str], errors: list[tuple[int, str, str]]) -> list[list[int]]:
        """The tokens of texts by row; appends to `errors` rows on which the library fails."""
        try:
            return self.tokenizer.encode_documents(list(texts.values()))
        except RowError:
            tokens = []
            for row, text in texts.items():  # which of them it is
                try:
                    tokens.append(self.tokenizer.encode_document(text))
                except RowError as error:
                    errors.append((row, error.reason, str(error)))
            return tokens


_job: _Job  # set before the workers are forked


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    die_with_parent()


def _tokenize(chunk: _Chunk) -> None:
    if not chunk.part.exists():
        _job.tokenize(chunk)


def tokenize(
    sources: Sequence[Path],
    tokenizer_dir: Path,
    prefix: Path,
    workers: int = 0,
    text_field: str = "text",
    max_quarantined_fraction: float = 0.01,
    document_bos: DocumentBos = "tokenizer",
) -> Tokenized:
    """Tokenize the documents of `sources` into PREFIX.bin, PREFIX.idx and PREFIX.json.

    Each document ends with the tokenizer's end-of-document token. Unusable rows are left out and
    listed in PREFIX.quarantine.jsonl. After an error, finished chunks stay for the next run.

    Args:
        sources: files of text that `Source` reads, or directories of them.
        tokenizer_dir: directory with tokenizer.json and tokenizer_config.json.
        prefix: path of the outputs without their suffix.
        workers: number of processes (0: one per CPU).
        text_field: field with the text.
        max_quarantined_fraction: largest allowed fraction of unusable rows in a source.
        document_bos: whether each document begins with the BOS token, as `data.document_bos`.

    Raises:
        OutputExistsError: PREFIX.idx or PREFIX.bin exists already.
        ConfigError: the prefix names no file, the tokenizer cannot be loaded, or PREFIX.parts/
            belongs to another job.
        DataError: a source cannot be used, too many rows are unusable, or the disk is full.
    """
    outputs = _outputs(prefix)
    global _job
    _job = _Job(
        [SourceSection(path=str(path), text_field=text_field) for path in sources],
        load_tokenizer(tokenizer_dir, document_bos),
    )
    try:
        return _write(outputs, workers, max_quarantined_fraction)
    except OSError as error:
        raise DataError(
            f"{prefix} cannot be written ({error.strerror or error}): "
            "free disk space, or name another prefix."
        ) from error


def _outputs(prefix: Path) -> dict[str, Path]:
    """Return {suffix: path} of the outputs; raise OutputExistsError if they exist already."""
    if not prefix.name:
        raise ConfigError(f"--out {prefix}: name the files to write, such as {prefix / 'tokens'}.")
    outputs = {
        suffix: prefix.with_name(f"{prefix.name}.{suffix}")
        for suffix in ("idx", "bin", "json", "parts", "quarantine.jsonl")
    }
    # A .bin next to the directory of parts is an interrupted last phase, which can be resumed.
    if outputs["idx"].exists() or (outputs["bin"].exists() and not outputs["parts"].exists()):
        raise OutputExistsError(
            f"{outputs['idx']} or its .bin exists already; name another prefix. "
            "Nothing was written."
        )
    return outputs


def _write(outputs: dict[str, Path], workers: int, max_quarantined_fraction: float) -> Tokenized:
    """Tokenize all chunks, join them and rename the outputs."""
    parts = outputs["parts"]
    _claim(parts, _job.plan())
    chunks = _job.chunks(parts)
    chunks_kept = sum(chunk.part.exists() for chunk in chunks)
    quarantine = Quarantine(max_quarantined_fraction, outputs["quarantine.jsonl"])
    _run(chunks, workers or len(os.sched_getaffinity(0)), quarantine)
    lengths = _join(chunks, parts)
    _write_about(parts / "json", lengths)
    for suffix in ("bin", "json", "idx"):
        (parts / suffix).rename(outputs[suffix])
    shutil.rmtree(parts)
    num_unusable = sum(counts.total() for counts in quarantine.counts.values())
    return Tokenized(len(lengths), int(lengths.sum()), num_unusable, chunks_kept)


def _write_about(path: Path, lengths: np.ndarray) -> None:
    """Write PREFIX.json: fingerprint of the tokenizer, and counts."""
    about = {
        "tokenizer": _job.tokenizer.document_fingerprint,
        "documents": len(lengths),
        "tokens": int(lengths.sum()),
        "source_bytes": sum(source.num_bytes for source in _job.sources),
    }
    write_atomically(path, json.dumps(about, indent=1).encode() + b"\n")


def _claim(parts: Path, plan: str) -> None:
    """Create the directory of the parts, or check that it belongs to this job."""
    parts.mkdir(parents=True, exist_ok=True)
    stamp = parts / "plan"
    if stamp.exists() and stamp.read_text() != plan:
        raise ConfigError(
            f"{parts} belongs to another job (other sources, fields or tokenizer): "
            "remove it, or name another prefix."
        )
    write_atomically(stamp, plan.encode())


def _run(chunks: Sequence[_Chunk], workers: int, quarantine: Quarantine) -> None:
    # Forked workers inherit the tokenizer and the opened sources instead of loading them again.
    context = multiprocessing.get_context("fork")
    with (
        ProcessPoolExecutor(workers, context, _start_worker) as pool,
        byte_progress("tokenizing", sum(chunk.num_bytes for chunk in chunks)) as on_bytes,
    ):
        try:
            for chunk, _ in zip(chunks, pool.map(_tokenize, chunks), strict=True):
                on_bytes(chunk.num_bytes)
                for row, reason, detail in json.loads(str(_read(chunk.part)["errors"])):
                    quarantine.add(_job.sources[chunk.source], row, RowError(reason, detail))
        except BrokenProcessPool:
            raise DataError(
                "a worker process was killed, probably for lack of memory: "
                "run the same command again with fewer --workers."
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _join(chunks: Sequence[_Chunk], parts: Path) -> np.ndarray:
    """Write bin and idx into the directory of the parts; return the lengths of the documents."""
    begin_phase("joining the parts")
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
            f"{_job.sources[0].path}: no row can be used; the quarantine file lists the reasons."
        )
    write_index(parts / "idx", _job.dtype, joined)
    return joined


def _read(part: Path) -> Any:
    return np.load(part, allow_pickle=False)
