"""Training data by optimizer step: mixed, tokenized on demand, packed, resumable within an epoch.

Every rank reads the same stream of rows and keeps its share of each step's micro-batches, so that
ranks always agree on the number of steps and a run can resume with another number of ranks. A
thread prepares the next step.
"""

import copy
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from infir2.config.schema import DataSection, SourceSection
from infir2.data.chat import ChatTokenizer
from infir2.data.labels import Labels
from infir2.data.packing import concatenate, split_among_ranks
from infir2.data.rows import Quarantine, open_source, parse_difficulty, parse_question
from infir2.data.sources import Source
from infir2.data.streams import (
    DocumentWindows,
    SampleStream,
    SampleWindows,
    SinglePacks,
    State,
    TrainingKind,
    slice_sample,
)
from infir2.data.template_check import check_chat_template
from infir2.data.types import Batch, Prompt, RowError, Sample
from infir2.errors import ConfigError, DataError


class Loader:
    """An endless stream of optimizer steps: this rank's micro-batches of each step.

    Its state is a small JSON object that does not depend on the number of ranks.

    Example: `Loader(section, "messages", tokenizer, seed=1236).next_step()` returns a list of
    `Batch`, each of at most `section.micro_batch_tokens` tokens.

    Args:
        section: a section that `infir2.config.rules` accepts.
        kind: "documents" trains every token, "messages" the assistant turns.
        seed: seed of the order of rows.
        rank: data-parallel rank, of `world_size`.
        quarantine: file in which rank 0 lists unusable rows; None lists none.

    Raises:
        ConfigError: the tokenizer lacks a chat template or an end-of-document token.
        DataError: a source cannot be used.
    """

    def __init__(
        self,
        section: DataSection,
        kind: TrainingKind,
        tokenizer: ChatTokenizer,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        quarantine: Path | None = None,
    ) -> None:
        _check_tokenizer(kind, tokenizer)
        self._section, self._kind, self._seed = section, kind, seed
        self._rank, self._world_size = rank, world_size
        self._quarantine = Quarantine(
            section.max_quarantined_fraction, quarantine if rank == 0 else None
        )
        self._stream = SampleStream(
            section.sources, section, kind, tokenizer, seed, self._quarantine
        )
        self._packs = self._make_packs()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="infir2-data")
        self._pending: Future[tuple[list[Batch], State]] | None = None
        self._state = self._snapshot()

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimizer steps per pass over the rows; None for windows, which depend on tokens."""
        if not self._section.batch_samples:
            return None
        return -(-self.num_rows // self._section.batch_samples)

    @property
    def num_rows(self) -> int:
        """Rows of all sources, usable or not."""
        return self._stream.mixture.num_rows

    @property
    def quarantined(self) -> dict[str, dict[str, int]]:
        """Unusable rows so far: {source: {reason: count}}."""
        return copy.deepcopy(self._state["quarantined"])

    def next_step(self) -> list[Batch]:
        """Return this rank's micro-batches of the next step, at least one; every rank gets as many.

        Raises:
            DataError: more rows than allowed are unusable, or a sample exceeds a micro-batch.
        """
        pending = self._pending or self._thread.submit(self._make_step)
        self._pending = None
        batches, self._state = pending.result()
        self._pending = self._thread.submit(self._make_step)
        return batches

    def state_dict(self) -> State:
        """Return the position after the last returned step, as an object that JSON preserves."""
        return copy.deepcopy(self._state)

    def load_state_dict(self, state: State) -> None:
        """Continue after the step at which `state` was taken.

        Raises:
            DataError: the kind of data, the seed, or the number of rows has changed.
        """
        if self._pending is not None:
            self._pending.exception()  # wait: the thread must not advance the stream any further
            self._pending = None
        for name in ("kind", "seed", "rows"):
            if state[name] != self._state[name]:
                raise DataError(
                    f"the checkpoint's data position belongs to other data "
                    f"({name} was {state[name]}, is {self._state[name]}): "
                    "restore data.sources and run.seed, or start a new run."
                )
        self._packs.load_state_dict(state["place"])
        # Last, because restoring the position may read unusable rows that are already counted.
        self._quarantine.load_state_dict(state["quarantined"])
        self._state = copy.deepcopy(state)

    def _make_packs(self) -> SinglePacks | DocumentWindows | SampleWindows:
        section = self._section
        if section.batch_samples:
            return SinglePacks(self._stream)
        if self._kind == "documents":
            return DocumentWindows(self._stream, section.sequence_tokens)
        return SampleWindows(
            self._stream, section.sequence_tokens, section.pack_window_samples, self._seed
        )

    def _make_step(self) -> tuple[list[Batch], State]:
        section = self._section
        num_packs = section.batch_samples or section.batch_sequences
        packs = [self._packs.next_pack() for _ in range(num_packs)]
        batches = split_among_ranks(packs, section.micro_batch_tokens, self._rank, self._world_size)
        return batches, self._snapshot()

    def _snapshot(self) -> State:
        # These keys are in saved checkpoints: do not rename them.
        return {
            "kind": self._kind,
            "seed": self._seed,
            "rows": [len(source) for source in self._stream.sources],
            "place": self._packs.state_dict(),
            "quarantined": self._quarantine.state_dict(),
        }


def validation_batches(
    section: DataSection,
    kind: TrainingKind,
    tokenizer: ChatTokenizer,
    limit: int,
    rank: int = 0,
    world_size: int = 1,
) -> list[Batch]:
    """Return this rank's micro-batches of `validation_sources`, the same in every run.

    Every rank gets the same number, at most `limit`; the last ones may train nothing. The list is
    empty without validation sources.

    Raises:
        ConfigError, DataError: as `Loader`.
    """
    if not section.validation_sources:
        return []
    _check_tokenizer(kind, tokenizer)
    quarantine = Quarantine(section.max_quarantined_fraction)
    stream = SampleStream(
        section.validation_sources, section, kind, tokenizer, seed=0, quarantine=quarantine
    )
    groups: list[list[Sample]] = [[]]
    room = section.micro_batch_tokens
    for sample in _one_epoch(stream, min(section.sequence_tokens, section.micro_batch_tokens)):
        if sample.num_tokens > room:
            if len(groups) == limit * world_size:
                break
            groups.append([])
            room = section.micro_batch_tokens
        groups[-1].append(sample)
        room -= sample.num_tokens
    groups += [[] for _ in range(-len(groups) % world_size)]
    return [
        concatenate(group or groups[0], range(len(group))) for group in groups[rank::world_size]
    ]


def load_prompts(
    data: DataSection | Sequence[SourceSection],
    quarantine: Path | None = None,
    tokenizer: ChatTokenizer | None = None,
    labels: Labels | None = None,
) -> list[Prompt]:
    """Return all prompts in the order of the files.

    Args:
        data: a data section with its system prompt and quarantine limit, or the sources of an
            evaluation, in which any unusable row is an error.
        quarantine: file in which unusable rows are listed.
        tokenizer: makes rows unusable that its chat template rejects; None renders no row.
        labels: what the rewards need of a row; None: an answer.

    Raises:
        ConfigError: sources of an evaluation have different weights, which it does not use.
        DataError: a source cannot be used, or too many of its rows, or all.
    """
    section = (
        data
        if isinstance(data, DataSection)
        else DataSection(sources=tuple(data), max_quarantined_fraction=0.0)
    )
    if section is not data and len({source.weight for source in section.sources}) > 1:
        raise ConfigError(
            "evaluate.problems.weight: all problems are used equally often; remove the weights."
        )
    counts = Quarantine(section.max_quarantined_fraction, quarantine)
    prompts = [
        prompt
        for number, entry in enumerate(section.sources)
        for prompt in _read_prompts(
            number, entry, section.system_prompt, counts, tokenizer, labels or Labels()
        )
    ]
    if not prompts:
        raise DataError("data.sources has no usable prompt: name a file with prompts.")
    return prompts


def _read_prompts(
    number: int,
    entry: SourceSection,
    system_prompt: str,
    counts: Quarantine,
    tokenizer: ChatTokenizer | None,
    labels: Labels,
) -> Iterator[Prompt]:
    """Yield the usable prompts of source `number`, and count the other rows."""
    source = open_source(entry, "prompts", labels)
    for index in range(len(source)):
        try:
            row = source.read(index)
            messages = parse_question(row, entry, system_prompt)
            answer, fields = labels.read(row, entry.answer_field)
            if tokenizer is not None:
                tokenizer.encode_prompt(messages)
        except RowError as error:
            counts.add(source, index, error)
            continue
        yield Prompt(
            id=f"{number}/{_relative_origin(source, index)}",
            messages=messages,
            answer=answer,
            difficulty=parse_difficulty(row),
            origin=source.origin(index),
            fields=fields,
        )


def _relative_origin(source: Source, index: int) -> str:
    path, line = source.location(index)
    return f"{path.relative_to(source.path) if source.path.is_dir() else path.name}:{line}"


def _one_epoch(stream: SampleStream, length: int) -> Iterator[Sample]:
    """Yield the samples of one epoch, split into overlapping pieces of at most `length` tokens."""
    while stream.position < stream.mixture.num_rows:
        sample = stream.next_sample()
        for start in range(0, sample.num_tokens - 1, length - 1):
            yield slice_sample(sample, start, min(start + length, sample.num_tokens))


def _check_tokenizer(kind: TrainingKind, tokenizer: ChatTokenizer) -> None:
    if kind == "messages":
        check_chat_template(tokenizer)
    else:
        _ = tokenizer.eod_token_id  # raises ConfigError without an end-of-document token
