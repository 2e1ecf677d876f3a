"""What is in a source: rows, lengths, duplicates, what packing does, as a run would read it."""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from infir2.config.schema import SourceSection
from infir2.data import ChatTokenizer
from infir2.data.packing import best_fit_decreasing
from infir2.data.rows import (
    RowKind,
    check_same_tokenizer,
    document_tokens,
    open_source,
    parse_conversation,
    parse_prompt,
)
from infir2.data.sources import Source
from infir2.data.types import RowError, Sample
from infir2.starter.fields import detect
from infir2.terminal import begin_phase

MAX_ROWS = 5000  # that are tokenized of one source, spread over it


@dataclass(frozen=True)
class Rendered:
    """A row as tokens, cut into runs of text that are trained or not."""

    origin: str
    runs: tuple[tuple[str, bool], ...]


@dataclass
class Inspection:
    """One source. Lengths are of the rows that were read, `num_rows` of all.

    `duplicates` counts rows that repeat an earlier one, of this or of a source before it.
    """

    section: SourceSection
    kind: RowKind
    num_rows: int
    num_bytes: int
    num_read: int
    lengths: list[int] = field(default_factory=list)
    trained_tokens: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    example: str = ""
    duplicates: int = 0
    first_duplicate: str = ""
    rendered: list[Rendered] = field(default_factory=list)

    @property
    def total_tokens(self) -> int:
        """Tokens of all rows, estimated from those that were read."""
        return round(sum(self.lengths) * self.num_rows / self.num_read)

    def percentiles(self) -> dict[str, int]:
        """min, median, p95, p99, max and mean of the lengths, in tokens."""
        names = {"min": 0, "median": 50, "p95": 95, "p99": 99, "max": 100}
        found = {name: int(np.percentile(self.lengths, share)) for name, share in names.items()}
        return found | {"mean": round(float(np.mean(self.lengths)))}

    def packing(self, sequence_tokens: int) -> dict[str, float]:
        """What windows of `sequence_tokens` hold of the rows that were read.

        "windows", "fill" (share of their tokens that is text), "rows_per_window", "too_long" rows,
        which SFT drops and CPT cuts.
        """
        long = sum(length > sequence_tokens for length in self.lengths)
        if self.kind == "documents":
            windows = max(1, sum(self.lengths) // sequence_tokens)
            fill = 1.0 if sum(self.lengths) >= sequence_tokens else 0.0
            per_window = len(self.lengths) / windows
        else:
            kept = [length for length in self.lengths if length <= sequence_tokens]
            windows = len(best_fit_decreasing(kept, sequence_tokens))
            fill = sum(kept) / max(1, windows * sequence_tokens)
            per_window = len(kept) / max(1, windows)
        return {
            "windows": windows,
            "fill": round(fill, 4),
            "rows_per_window": round(per_window, 2),
            "too_long": long,
        }


def inspect_sources(
    paths: Iterable[Path], tokenizer: ChatTokenizer, kind: RowKind | None, num_rendered: int
) -> list[Inspection]:
    """Inspect sources in order; duplicates are found across them too. Raises DataError."""
    seen: set[bytes] = set()
    return [_inspect(*detect(path, kind), tokenizer, num_rendered, seen) for path in paths]


def _inspect(
    kind: RowKind,
    section: SourceSection,
    tokenizer: ChatTokenizer,
    num_rendered: int,
    seen: set[bytes],
) -> Inspection:
    begin_phase(f"reading {section.path}")
    source = open_source(section, kind)
    check_same_tokenizer(source, tokenizer)
    rows = _chosen(len(source))
    found = Inspection(section, kind, len(source), source.num_bytes, len(rows))
    for index in rows:
        try:
            row = source.read(index)
            sample = encode(row, section, kind, tokenizer)
        except RowError as error:
            found.reasons[error.reason] += 1
            found.example = found.example or f"{source.origin(index)}: {error}"
            continue
        found.lengths.append(sample.num_tokens)
        found.trained_tokens += int(sample.loss_mask.sum())
        _note_duplicate(found, row, source, index, seen)
        if len(found.rendered) < num_rendered:
            origin = source.origin(index)
            found.rendered.append(Rendered(origin, tuple(runs_of(sample, tokenizer))))
    return found


def _chosen(num_rows: int) -> list[int]:
    """Rows to read: all, or the first few and a random sample of the others, in order."""
    if num_rows <= MAX_ROWS:
        return list(range(num_rows))
    drawn = random.Random(0).sample(range(num_rows), MAX_ROWS)
    return sorted({*range(10), *drawn[: MAX_ROWS - 10]})


def encode(
    row: dict[str, Any], section: SourceSection, kind: RowKind, tokenizer: ChatTokenizer
) -> Sample:
    """A row's tokens as training makes them, and which are trained. Raises RowError."""
    if kind == "messages":
        return tokenizer.encode_conversation(parse_conversation(row, section))
    if kind == "documents":
        token_ids = document_tokens(row, section, tokenizer)
        return Sample(token_ids, np.arange(len(token_ids)) > 0)
    messages = parse_prompt(row, section)[0]
    token_ids = np.asarray(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
    return Sample(token_ids.astype(np.int32), np.zeros(len(token_ids), dtype=np.bool_))


def _note_duplicate(
    found: Inspection, row: dict[str, Any], source: Source, index: int, seen: set[bytes]
) -> None:
    text = json.dumps(row, sort_keys=True, default=str).lower()
    digest = hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()
    if digest in seen:
        found.duplicates += 1
        found.first_duplicate = found.first_duplicate or source.origin(index)
    seen.add(digest)


def runs_of(sample: Sample, tokenizer: ChatTokenizer) -> list[tuple[str, bool]]:
    """The text of a sample in runs of tokens that are all trained or all not."""
    changes = np.flatnonzero(np.diff(sample.loss_mask.astype(np.int8))) + 1
    parts = np.split(sample.token_ids, changes)
    masks = np.split(sample.loss_mask, changes)
    return [
        (tokenizer.tokens_text(part.tolist()), bool(mask[0]))
        for part, mask in zip(parts, masks, strict=True)
        if len(part)
    ]
