"""What the data floor hands out: samples, packed batches, prompts."""

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

Message = dict[str, str]  # {"role": "user", "content": "2+3=?"}


@dataclass(frozen=True)
class Sample:
    """One sequence of tokens. Example: prompt [7, 8], response [9, 2] -> token_ids [7, 8, 9, 2], loss_mask [F, F, T, T].

    `loss_mask[j]` is True where token j is a trained target; token 0 never is. `token_inputs`
    hold one value per token, such as advantages, for the loss.
    """

    token_ids: np.ndarray  # int32 [n]
    loss_mask: np.ndarray  # bool [n]
    origin: str = ""  # file:line
    token_inputs: dict[str, np.ndarray] = field(default_factory=dict)  # each [n]

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class Batch:
    """Sequences packed one after another, without padding. T tokens, B sequences.

    Example: the sample above alone -> labels [0, 9, 2, 0], loss_mask [F, T, T, F], positions [0, 1, 2, 3],
    cu_seqlens [0, 4]. Labels are pre-shifted: `labels[t] = token_ids[t + 1]` where `loss_mask[t]`, else 0. An extra's
    value for token j stands at the place of its label, j - 1, and is 0 where nothing is trained.
    """

    token_ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T], restart at 0 in each sequence
    labels: Tensor  # int64 [T]
    loss_mask: Tensor  # bool [T]
    cu_seqlens: Tensor  # int32 [B+1], first token of each sequence, then T
    token_inputs: dict[str, Tensor] = field(default_factory=dict)  # each [T]
    sample_indices: tuple[
        int, ...
    ] = ()  # [B], places of the sequences in the list that was packed; () for a filler

    origins: tuple[str, ...] = ()  # [B], file:line of each sequence

    @property
    def num_trained_tokens(self) -> int:
        return int(self.loss_mask.sum())


@dataclass(frozen=True)
class Prompt:
    """A question with a reference answer. Example: `Prompt("0/rl1.jsonl:3", [{"role": "user", ...}], "16", 2, "d/rl1.jsonl:3")`.

    `id` does not depend on where the files lie, so that sampling seeded with it can be repeated elsewhere.
    """

    id: str
    messages: list[Message]
    answer: str
    difficulty: int | None
    origin: str
