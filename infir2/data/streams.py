"""Endless streams of tokenized samples and of packs, each resumable from a state of two integers.

A pack is a list of samples that stay in one micro-batch: one sample (`SinglePacks`), a window of
documents (`DocumentWindows`), or a window of conversations (`SampleWindows`).
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from infir2.config.schema import DataSection, SourceSection
from infir2.data.chat import ChatTokenizer
from infir2.data.mixture import Mixture, permute_index
from infir2.data.packing import best_fit_decreasing
from infir2.data.rows import (
    Quarantine,
    check_same_tokenizer,
    document_tokens,
    open_source,
    parse_conversation,
)
from infir2.data.types import RowError, Sample
from infir2.errors import DataError

TrainingKind = Literal["documents", "messages"]
State = dict[str, Any]


def slice_sample(sample: Sample, start: int, end: int) -> Sample:
    """Return tokens [start, end) of a sample; the first one is context only."""
    mask = sample.loss_mask[start:end].copy()
    mask[0] = False
    return Sample(sample.token_ids[start:end], mask, sample.origin)


class SampleStream:
    """An endless stream of usable samples in the order of the mixture.

    The weights of the sources are shares of bytes for documents, and of rows for conversations.
    `position` is the index in the mixture of the next row.
    """

    def __init__(
        self,
        sources: Sequence[SourceSection],
        section: DataSection,
        kind: TrainingKind,
        tokenizer: ChatTokenizer,
        seed: int,
        quarantine: Quarantine,
    ) -> None:
        self._source_sections, self._section = sources, section
        self._kind, self._tokenizer = kind, tokenizer
        self.sources = [open_source(source, kind) for source in sources]
        for opened in self.sources:
            check_same_tokenizer(opened, tokenizer)
        shares = [source.weight for source in sources]
        if kind == "documents":
            shares = [
                share * len(source) / source.num_bytes
                for share, source in zip(shares, self.sources, strict=True)
            ]
        self.mixture = Mixture([len(source) for source in self.sources], shares, seed)
        self.position, self.quarantine = 0, quarantine

    def next_sample(self) -> Sample:
        """Return the next usable sample.

        Raises:
            DataError: more rows than allowed are unusable, or all of them.
        """
        for _ in range(2 * self.mixture.num_rows + 1024):
            position = self.mixture.row_at(self.position)
            self.position += 1
            try:
                return self.read(position.source, position.row)
            except RowError as error:
                if position.epoch == 0:  # later epochs read the same rows again
                    self.quarantine.add(self.sources[position.source], position.row, error)
        raise DataError(
            f"{self.sources[0].path}: no row of data.sources can be used; "
            "quarantine.jsonl lists the reasons."
        )

    def read(self, source: int, row: int) -> Sample:
        """Return one row, tokenized.

        Raises:
            RowError: the row is unusable.
        """
        section, origin = self._source_sections[source], self.sources[source].origin(row)
        content = self.sources[source].read(row)
        if self._kind == "documents":
            token_ids = document_tokens(content, section, self._tokenizer)
            if len(token_ids) < 2:
                raise RowError("empty", "the text has no token")
            return Sample(token_ids, np.arange(len(token_ids)) > 0, origin)
        messages = parse_conversation(content, section, self._section.system_prompt)
        last_only = self._section.trained_turns == "last"
        sample = self._tokenizer.encode_conversation(messages, origin, last_only)
        return self._limit_length(sample)

    def _limit_length(self, sample: Sample) -> Sample:
        limit = self._section.sequence_tokens
        if sample.num_tokens <= limit:
            return sample
        if self._section.on_too_long == "drop":
            raise RowError(
                "too_long", f"{sample.num_tokens} tokens, more than data.sequence_tokens"
            )
        end = slice_sample(sample, sample.num_tokens - limit, sample.num_tokens)
        if not end.loss_mask.any():
            raise RowError("no_trained_tokens", "truncation leaves no trained token")
        return end


class SinglePacks:
    """Packs of one sample each."""

    def __init__(self, stream: SampleStream) -> None:
        self._stream = stream

    def next_pack(self) -> list[Sample]:
        return [self._stream.next_sample()]

    def state_dict(self) -> State:
        return {"position": self._stream.position}

    def load_state_dict(self, state: State) -> None:
        self._stream.position = state["position"]


class DocumentWindows:
    """Windows of `sequence_tokens` filled with consecutive documents.

    A document that does not fit is split. The next window starts with its remainder, preceded by
    the last token of this window as context, so that each token of a document except its first is
    a target exactly once.
    """

    def __init__(self, stream: SampleStream, sequence_tokens: int) -> None:
        self._stream, self._sequence_tokens = stream, sequence_tokens
        self._document: Sample | None = None  # a document with tokens left for the next window
        self._document_position = 0  # its index in the mixture
        self._offset = 0  # its first token in the next window

    def next_pack(self) -> list[Sample]:
        """Return pieces of documents with `sequence_tokens` tokens in total.

        One token of a window stays free where it could hold no target.
        """
        pieces, room = [], self._sequence_tokens
        while room > 1:
            if self._document is None:
                self._start_document(0)
            document, start = self._document, self._offset
            assert document is not None
            end = min(start + room, document.num_tokens)
            pieces.append(slice_sample(document, start, end))
            room -= end - start
            self._offset = end - 1
            if end == document.num_tokens:
                self._document = None
        return pieces

    def state_dict(self) -> State:
        if self._document is None:
            return {"position": self._stream.position, "offset": 0}
        return {"position": self._document_position, "offset": self._offset}

    def load_state_dict(self, state: State) -> None:
        self._stream.position, self._document = state["position"], None
        if state["offset"]:
            self._start_document(state["offset"])

    def _start_document(self, offset: int) -> None:
        self._document, self._offset = self._stream.next_sample(), offset
        self._document_position = self._stream.position - 1


class SampleWindows:
    """Windows of at most `sequence_tokens`, packed from `pack_samples` samples at a time.

    Samples are never split. The windows of one packing come in a pseudo-random order, because
    best-fit decreasing sorts them by length.
    """

    def __init__(
        self, stream: SampleStream, sequence_tokens: int, pack_samples: int, seed: int
    ) -> None:
        self._stream, self._sequence_tokens = stream, sequence_tokens
        self._pack_samples, self._seed = pack_samples, seed
        self._start = stream.position  # index in the mixture of the current packing's first row
        self._windows: list[list[Sample]] = []  # of the current packing
        self._num_returned = 0  # windows of the current packing that were returned

    def next_pack(self) -> list[Sample]:
        if self._num_returned == len(self._windows):
            self._pack_next()
        self._num_returned += 1
        return self._windows[self._num_returned - 1]

    def state_dict(self) -> State:
        return {"position": self._start, "windows": self._num_returned}

    def load_state_dict(self, state: State) -> None:
        self._stream.position = self._start = state["position"]
        self._windows = []
        if state["windows"]:
            self._pack_next()
        self._num_returned = state["windows"]

    def _pack_next(self) -> None:
        self._start, self._num_returned = self._stream.position, 0
        samples = [self._stream.next_sample() for _ in range(self._pack_samples)]
        bins = best_fit_decreasing([sample.num_tokens for sample in samples], self._sequence_tokens)
        key = (self._seed, self._start, 1)
        order = [permute_index(index, len(bins), key) for index in range(len(bins))]
        self._windows = [[samples[index] for index in sorted(bins[number])] for number in order]
