"""Training data by optimizer steps: mixed, tokenised when needed, packed, and resumed in the middle of an epoch.

Every rank reads the same stream of rows and keeps its part of each step's batches, so that ranks never disagree on the
number of steps and a run can go on with another number of ranks. The next step is prepared in a thread.
"""

import copy
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from infir2.config.schema import DataSection, SourceSection
from infir2.data.chat import ChatTokenizer
from infir2.data.packing import pack, split_among_ranks
from infir2.data.rows import Quarantine, open_source, parse_prompt
from infir2.data.sources import RowError, Source
from infir2.data.streams import (
    DocumentWindows,
    Samples,
    SampleStream,
    SampleWindows,
    State,
    TrainingKind,
    slice_sample,
)
from infir2.data.types import Batch, Prompt, Sample
from infir2.errors import ConfigError, DataError


class Loader:
    """Steps of this rank's micro-batches, for ever.

    Example: `Loader(section, "messages", tokenizer, seed=1236).next_step()` -> [Batch, ...], each of at most
    `micro_batch_tokens`. The state is a small JSON object: the same steps follow it with any number of ranks.

    The section is one that `infir2.config.rules` lets pass. Raises ConfigError (tokenizer without what the kind needs),
    DataError (sources).
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
        self._units = self._make_units()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="infir2-data")
        self._pending: Future[tuple[list[Batch], State]] | None = None
        self._state = self._snapshot()

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimizer steps in a pass over the rows; None where it depends on the tokens (windows)."""
        if not self._section.batch_samples:
            return None
        return -(-self.num_rows // self._section.batch_samples)

    @property
    def num_rows(self) -> int:
        """Of all sources, usable or not."""
        return self._stream.mixture.num_rows

    @property
    def quarantined(self) -> dict[str, dict[str, int]]:
        """Unusable rows met so far: source -> reason -> count."""
        return copy.deepcopy(self._state["quarantined"])

    def next_step(self) -> list[Batch]:
        """The next step's micro-batches of this rank: at least one, as many as every other rank's. Raises DataError."""
        pending = self._pending or self._thread.submit(self._make_step)
        self._pending = None
        batches, self._state = pending.result()
        self._pending = self._thread.submit(self._make_step)
        return batches

    def state_dict(self) -> State:
        """Where the stream stands after the last step handed out; goes through JSON unchanged."""
        return copy.deepcopy(self._state)

    def load_state_dict(self, state: State) -> None:
        """Go on after the step that `state` was taken at. Raises DataError when the data is not the same any more."""
        if self._pending is not None:
            self._pending.exception()  # wait: the thread must not move the stream any more
            self._pending = None
        for name in ("kind", "seed", "rows"):
            if state[name] != self._state[name]:
                raise DataError(
                    f"the checkpoint's data position belongs to other data ({name} was {state[name]}, is {self._state[name]}): "
                    "restore data.sources and run.seed, or start a new run."
                )
        self._units.load_state_dict(state["place"])
        self._quarantine.load_state_dict(
            state["quarantined"]
        )  # last: going to the place may meet counted rows again
        self._state = copy.deepcopy(state)

    def _make_units(self) -> "Samples | DocumentWindows | SampleWindows":
        section = self._section
        if section.batch_samples:
            return Samples(self._stream)
        if self._kind == "documents":
            return DocumentWindows(self._stream, section.sequence_tokens)
        return SampleWindows(
            self._stream, section.sequence_tokens, section.pack_window_samples, self._seed
        )

    def _make_step(self) -> tuple[list[Batch], State]:
        units = [
            self._units.unit()
            for _ in range(self._section.batch_samples or self._section.batch_sequences)
        ]
        return split_among_ranks(
            units, self._section.micro_batch_tokens, self._rank, self._world_size
        ), self._snapshot()

    def _snapshot(self) -> State:
        return {
            "kind": self._kind,
            "seed": self._seed,
            "rows": [len(source) for source in self._stream.sources],
            "place": self._units.state_dict(),
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
    """This rank's part of at most `limit` micro-batches per rank of `validation_sources`, the same ones for every run.

    Every rank gets the same number; the last may train nothing. Empty without validation sources. Raises as Loader.
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
    for sample in _one_pass(stream, min(section.sequence_tokens, section.micro_batch_tokens)):
        if sample.num_tokens > room:
            if len(groups) == limit * world_size:
                break
            groups.append([])
            room = section.micro_batch_tokens
        groups[-1].append(sample)
        room -= sample.num_tokens
    groups += [[] for _ in range(-len(groups) % world_size)]
    return [pack(group or groups[0], range(len(group))) for group in groups[rank::world_size]]


def load_prompts(
    data: DataSection | Sequence[SourceSection], quarantine: Path | None = None
) -> list[Prompt]:
    """All prompts in file order: of a data section (with its system prompt and quarantine), or of sources alone.

    Sources alone are problems to be scored: there, any unusable row is an error. Raises DataError; ConfigError for
    weights, which mean nothing here.
    """
    section = (
        data
        if isinstance(data, DataSection)
        else DataSection(sources=tuple(data), max_quarantined_fraction=0.0)
    )
    if len({source.weight for source in section.sources}) > 1:
        raise ConfigError(
            "data.sources.weight: prompts are all used equally often; remove the weights, or repeat rows in the files."
        )
    counts = Quarantine(section.max_quarantined_fraction, quarantine)
    prompts: list[Prompt] = []
    for number, entry in enumerate(section.sources):
        source = open_source(entry, "prompts")
        for index in range(len(source)):
            try:
                messages, answer, difficulty = parse_prompt(
                    source.read(index), entry, section.system_prompt
                )
            except RowError as error:
                counts.add(source, index, error)
                continue
            prompts.append(
                Prompt(
                    f"{number}/{_name(source, index)}",
                    messages,
                    answer,
                    difficulty,
                    source.origin(index),
                )
            )
    if not prompts:
        raise DataError("data.sources holds no usable prompt: name a file with prompts.")
    return prompts


def _name(source: Source, index: int) -> str:
    path, line = source.place(index)
    return f"{path.relative_to(source.path) if source.path.is_dir() else path.name}:{line}"


def _one_pass(stream: SampleStream, length: int) -> Iterator[Sample]:
    """Samples of one epoch, the long ones in pieces."""
    while stream.position < stream.mixture.num_rows:
        sample = stream.take()
        for start in range(0, sample.num_tokens - 1, length - 1):
            yield slice_sample(sample, start, min(start + length, sample.num_tokens))


def _check_tokenizer(kind: TrainingKind, tokenizer: ChatTokenizer) -> None:
    if kind == "messages":
        tokenizer.require_chat_template()
    else:
        _ = tokenizer.eod_token_id
