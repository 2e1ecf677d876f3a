"""The types that the data room returns: rows, samples, packed batches, prompts."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

Message = dict[str, str]  # {"role": "user", "content": "2+3=?"}
MAX_ROW_BYTES = 1 << 26
MAX_ROW_VALUES = 1 << 22  # each becomes an object of Python


class RowError(Exception):
    """A row that cannot be used, with the reason to count, such as "bad_json", and a detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class Rows(Protocol):
    """The rows of one file."""

    path: Path
    num_bytes: int  # of the uncompressed rows
    fields: frozenset[str]  # field names in the first rows or in the schema; empty if unknown

    def __len__(self) -> int: ...

    def read(self, index: int) -> dict[str, Any]:
        """Return one row as {field: value}. Raises RowError for an unusable row."""
        ...

    def number(self, index: int) -> int:
        """Return the line of a row, or its number in a file without lines, counted from 1."""
        ...


@dataclass(frozen=True)
class Sample:
    """One tokenized sequence of n tokens.

    `loss_mask[j]` is True where token j is a target of the loss; token 0 never is. `token_inputs`
    are values per token for the loss, such as advantages.

    Example: prompt [7, 8] and response [9, 2], a conversation whose answer is trained:

    >>> mask = np.array([False, False, True, True])
    >>> sample = Sample(np.array([7, 8, 9, 2], dtype=np.int32), mask, origin="sft.jsonl:17")
    >>> sample.num_tokens
    4
    """

    token_ids: np.ndarray  # int32 [n]
    loss_mask: np.ndarray  # bool [n]
    origin: str = ""  # file:line of the row
    token_inputs: dict[str, np.ndarray] = field(default_factory=dict)  # each [n]

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class Batch:
    """A micro-batch: B sequences concatenated into T tokens, without padding.

    Labels are shifted already: `labels[t] = token_ids[t + 1]` where `loss_mask[t]`, otherwise 0.
    `token_inputs` are shifted in the same way: the value that belongs to token j is at index j - 1,
    where its label is, and it is 0 where `loss_mask` is False.

    Example: a batch of the sample above (token_ids [7, 8, 9, 2], response [9, 2]) has

        token_ids  [7, 8, 9, 2]
        positions  [0, 1, 2, 3]
        labels     [0, 9, 2, 0]
        loss_mask  [F, T, T, F]
        cu_seqlens [0, 4]
    """

    token_ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T], each sequence starts at 0
    labels: Tensor  # int64 [T]
    loss_mask: Tensor  # bool [T]
    cu_seqlens: Tensor  # int32 [B+1], offset of each sequence's first token, then T
    token_inputs: dict[str, Tensor] = field(default_factory=dict)  # each [T]
    # [B], index of each sequence in the list of samples that was packed; () for an empty batch
    sample_indices: tuple[int, ...] = ()
    origins: tuple[str, ...] = ()  # [B], file:line of each sequence

    @property
    def num_trained_tokens(self) -> int:
        return int(self.loss_mask.sum())


@dataclass(frozen=True)
class Prompt:
    """A problem with its reference answer, for RL and evaluation.

    `id` does not depend on the directory of the files, so that sampling that is seeded with it is
    reproducible on another machine.

    Example: row 3 of the first source, `data/rl1.jsonl`, is

        Prompt(
            id="0/rl1.jsonl:3",
            messages=[{"role": "user", "content": "12+4=?"}],
            answer="16",
            difficulty=2,
            origin="data/rl1.jsonl:3",
        )
    """

    id: str  # source index / file:line
    messages: list[Message]
    answer: str
    difficulty: int | None
    origin: str  # file:line of the row
    fields: dict[str, Any] = field(default_factory=dict)  # of the row, as far as a reward needs it
