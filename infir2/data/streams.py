"""Streams of tokenised samples and windows, each with a state of two integers from which it goes on exactly."""

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
from infir2.data.sources import RowError
from infir2.data.types import Sample
from infir2.errors import DataError

TrainingKind = Literal["documents", "messages"]
State = dict[str, Any]


def slice_sample(sample: Sample, start: int, end: int) -> Sample:
    """Tokens start..end of a sample; the first of them is context only."""
    mask = sample.loss_mask[start:end].copy()
    mask[0] = False
    return Sample(sample.token_ids[start:end], mask, sample.origin)


class SampleStream:
    """An endless stream of usable samples in the mixture's order.

    `position` is the place in the mixture after the last sample taken. Shares are of bytes for documents, of rows for
    conversations.
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
        self._sections, self._section, self._kind, self._tokenizer = (
            sources,
            section,
            kind,
            tokenizer,
        )
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

    def take(self) -> Sample:
        """The next usable sample. Raises DataError when too many rows, or all, are unusable."""
        for _ in range(2 * self.mixture.num_rows + 1024):
            place = self.mixture.place(self.position)
            self.position += 1
            try:
                return self.read(place.source, place.row)
            except RowError as error:
                if place.epoch == 0:  # later passes meet the same rows again
                    self.quarantine.add(self.sources[place.source], place.row, error)
        raise DataError(
            f"{self.sources[0].path}: no row of data.sources can be used; quarantine.jsonl names the reasons."
        )

    def read(self, source: int, row: int) -> Sample:
        """One row as tokens. Raises RowError."""
        section, origin = self._sections[source], self.sources[source].origin(row)
        content = self.sources[source].read(row)
        if self._kind == "documents":
            token_ids = document_tokens(content, section, self._tokenizer)
            if len(token_ids) < 2:
                raise RowError("empty", "the text has no token")
            return Sample(token_ids, np.arange(len(token_ids)) > 0, origin)
        messages = parse_conversation(content, section, self._section.system_prompt)
        return self._fitted(self._tokenizer.encode_conversation(messages, origin))

    def _fitted(self, sample: Sample) -> Sample:
        limit = self._section.sequence_tokens
        if sample.num_tokens <= limit:
            return sample
        if self._section.on_too_long == "drop":
            raise RowError(
                "too_long", f"{sample.num_tokens} tokens, more than data.sequence_tokens"
            )
        end = slice_sample(sample, sample.num_tokens - limit, sample.num_tokens)
        if not end.loss_mask.any():
            raise RowError("no_trained_tokens", "no trained token is left after truncation")
        return end


class Samples:
    """Samples, each a unit of its own."""

    def __init__(self, stream: SampleStream) -> None:
        self._stream = stream

    def unit(self) -> list[Sample]:
        return [self._stream.take()]

    def state_dict(self) -> State:
        return {"position": self._stream.position}

    def load_state_dict(self, state: State) -> None:
        self._stream.position = state["position"]


class DocumentWindows:
    """Windows of `sequence_tokens` filled with documents, one after another; a document that does not fit is cut.

    The rest of a cut document begins the next window with its last token repeated, as context, so that every token but
    the first of a document is a target exactly once.
    """

    def __init__(self, stream: SampleStream, sequence_tokens: int) -> None:
        self._stream, self._length = stream, sequence_tokens
        self._rest: Sample | None = None
        self._document, self._offset = (
            0,
            0,
        )  # of the rest: its place in the mixture, and its first token

    def unit(self) -> list[Sample]:
        """Pieces of at most `sequence_tokens` together; a last place that could hold no target stays free."""
        pieces, room = [], self._length
        while room > 1:
            if self._rest is None:
                self._rest, self._offset = self._stream.take(), 0
                self._document = self._stream.position - 1
            whole, start = self._rest, self._offset
            end = min(start + room, whole.num_tokens)
            pieces.append(slice_sample(whole, start, end))
            room -= end - start
            self._offset = end - 1
            if end == whole.num_tokens:
                self._rest = None
        return pieces

    def state_dict(self) -> State:
        if self._rest is None:
            return {"position": self._stream.position, "offset": 0}
        return {"position": self._document, "offset": self._offset}

    def load_state_dict(self, state: State) -> None:
        self._stream.position, self._rest = state["position"], None
        if state["offset"]:
            self._rest, self._offset = self._stream.take(), state["offset"]
            self._document = self._stream.position - 1


class SampleWindows:
    """Windows of at most `sequence_tokens` made of whole samples, packed over `pack_window_samples` of them."""

    def __init__(
        self, stream: SampleStream, sequence_tokens: int, pack_samples: int, seed: int
    ) -> None:
        self._stream, self._length = stream, sequence_tokens
        self._pack_samples, self._seed = pack_samples, seed
        self._start, self._done = (
            stream.position,
            0,
        )  # where the present pack begins, and its windows taken
        self._windows: list[list[Sample]] = []

    def unit(self) -> list[Sample]:
        if self._done == len(self._windows):
            self._fill()
        self._done += 1
        return self._windows[self._done - 1]

    def state_dict(self) -> State:
        return {"position": self._start, "windows": self._done}

    def load_state_dict(self, state: State) -> None:
        self._stream.position = self._start = state["position"]
        self._windows = []
        if state["windows"]:
            self._fill()
        self._done = state["windows"]

    def _fill(self) -> None:
        self._start, self._done = self._stream.position, 0
        samples = [self._stream.take() for _ in range(self._pack_samples)]
        bins = best_fit_decreasing([sample.num_tokens for sample in samples], self._length)
        order = [
            permute_index(place, len(bins), (self._seed, self._start, 1))
            for place in range(len(bins))
        ]  # not by length
        self._windows = [[samples[place] for place in sorted(bins[number])] for number in order]
