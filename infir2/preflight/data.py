"""Checks of text: the tokenizer, and rows of every source of a recipe."""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from infir2.config.reward_rules import is_gym
from infir2.config.schema import (
    BenchmarksSection,
    EvalRecipe,
    RlRecipe,
    RlSection,
    SourceSection,
    TrainRecipe,
)
from infir2.data import ChatTokenizer
from infir2.data.chat import QUESTION
from infir2.data.labels import Labels, labels_of
from infir2.data.rendering import THINK_MARKERS
from infir2.data.rows import (
    RowKind,
    check_same_tokenizer,
    document_tokens,
    open_source,
    parse_conversation,
    parse_document,
    parse_question,
)
from infir2.data.sources import Source
from infir2.data.template_check import check_chat_template
from infir2.data.types import RowError
from infir2.errors import ConfigError, DataError, UserError
from infir2.evaluate.benchmark_data import find_files
from infir2.evaluate.benchmarks import find_benchmark
from infir2.preflight.finding import Finding
from infir2.train.plan import complete_schedule

NUM_ROWS = 200
_KINDS: dict[str, RowKind] = {"cpt": "documents", "sft": "messages"}
_HISTOGRAM = "▁▂▃▄▅▆▇█"


def first_row_is_conversation(recipe: TrainRecipe) -> bool:
    """Whether the first source holds conversations; False if its first row cannot be read."""
    section = recipe.data.sources[0]
    try:
        row = Source(section.path).read(0)
    except (UserError, RowError):
        return False  # the data check says what is wrong with it
    return bool(section.solution_field) or section.messages_field in row


def check_tokenizer(tokenizer: ChatTokenizer, verb: str) -> str:
    """The tokenizer's size and fingerprint.

    Raises ConfigError if SFT cannot train the answers of the chat template so that they end with a
    stop token, or RL and evaluation cannot render a question.
    """
    if verb == "sft":
        check_chat_template(tokenizer)
    elif verb != "cpt":
        try:
            tokenizer.apply_chat_template([QUESTION], add_generation_prompt=True)
        except RowError as error:
            raise ConfigError(
                f"data.tokenizer: {tokenizer.template.name} cannot be used ({error}): use another."
            ) from None
    return f"{tokenizer.vocab_size} tokens, fingerprint {tokenizer.fingerprint()[:12]}"


def check_sources(
    recipe: TrainRecipe | EvalRecipe, verb: str, tokenizer: ChatTokenizer
) -> tuple[Finding, dict[str, int]]:
    """Read rows of every source of the recipe, spread over its length.

    The finding is a warning if a text does not survive encoding and decoding, or if the sources
    hold less than one step. Raises DataError for a source that would stop the run.

    Returns:
        The finding, and tokens of the longest prompt by the key that limits the response to it.
    """
    kind = _KINDS.get(verb, "prompts")
    details: list[str] = []
    suspicious, longest = False, {}
    if isinstance(recipe, TrainRecipe):
        sampler = _RowSampler(
            tokenizer,
            kind,
            recipe.data.system_prompt,
            _max_row_tokens(recipe, kind),
            recipe.data.max_quarantined_fraction,
            labels_of(recipe.rl) if isinstance(recipe, RlRecipe) else Labels(),
        )
        details += [sampler.check(section) for section in recipe.data.sources]
        budget = _Budget.of(recipe, sampler)
        details.append(str(budget))
        details += [sampler.check(section) for section in recipe.data.validation_sources]
        suspicious = bool(sampler.num_lossy) or budget.is_short
        has_tasks = isinstance(recipe, RlRecipe) and _num_problems(recipe.rl)
        longest["rl.max_response_tokens"] = sampler.max_tokens if has_tasks else sampler.max_length
    if isinstance(recipe, EvalRecipe | RlRecipe):
        problems = _RowSampler(tokenizer, "prompts", recipe.evaluate.system_prompt)
        details += [problems.check(section) for section in recipe.evaluate.problems]
        if isinstance(recipe, EvalRecipe):
            details += _benchmark_files(recipe.benchmarks)
        longest["evaluate.max_response_tokens"] = problems.max_length
    return Finding("data", "warn" if suspicious else "ok", "; ".join(details)), longest


def _num_problems(rl: RlSection) -> int:
    """New problems of reasoning-gym in an epoch."""
    return rl.gym_problems * sum(is_gym(each.name) for each in rl.reward)


def _benchmark_files(section: BenchmarksSection) -> list[str]:
    """What each benchmark will read. Raises ConfigError for a name, DataError for the data."""
    found = []
    for benchmark in map(find_benchmark, section.names):
        files = find_files(benchmark, Path(section.data), alone=len(section.names) == 1)
        found.append(f"{benchmark.name}: {len(files)} file{'s' * (len(files) > 1)}")
    return found


def _max_row_tokens(recipe: TrainRecipe, kind: RowKind) -> int:
    """The longest row that is trained, in tokens; 0 for no limit."""
    if isinstance(recipe, RlRecipe):
        return recipe.rl.max_prompt_tokens
    return recipe.data.sequence_tokens if kind == "messages" else 0


@dataclass
class _RowSampler:
    """Reads rows of sources of one kind, and counts over all sources that it has checked.

    `max_tokens`: rows that are longer are not trained (0: no limit). `max_unusable`: the allowed
    fraction of unusable rows. `num_tokens` is an estimate from the rows that were read.
    """

    tokenizer: ChatTokenizer
    kind: RowKind
    system_prompt: str
    max_tokens: int = 0
    max_unusable: float = 0.0
    labels: Labels = field(default_factory=Labels)
    num_rows: int = 0
    num_tokens: int = 0
    num_lossy: int = 0
    max_length: int = 0  # tokens of the longest row that is trained

    def check(self, section: SourceSection) -> str:
        """Lengths in tokens, unusable rows and lossy texts of one source.

        Raises DataError for more unusable rows than allowed, or if every row is too long.
        """
        source = open_source(section, self.kind, self.labels)
        check_same_tokenizer(source, self.tokenizer)
        sample = self._sample(source, section)
        if not sample.lengths or sample.num_unusable > self.max_unusable * sample.num_rows:
            raise DataError(
                f"{section.path}: {sample.unusable()}; "
                "fix the rows, or raise data.max_quarantined_fraction."
            )
        num_long = sum(length > self.max_tokens for length in sample.lengths if self.max_tokens)
        if num_long == len(sample.lengths):
            raise DataError(
                f"{section.path}: every row tried is longer than {self.max_tokens} tokens; "
                "raise the limit or name other data."
            )
        lengths = [each for each in sample.lengths if each <= (self.max_tokens or each)]
        self.max_length = max(self.max_length, *lengths)
        self.num_lossy += sample.num_lossy
        self.num_rows += len(source)
        self.num_tokens += round(len(source) * sum(sample.lengths) / sample.num_rows)
        text = f"{section.path}: {len(source)} rows of {sample.spread()}"
        text += f", {num_long} longer than {self.max_tokens}" if num_long else ""
        if sample.num_lossy:
            text += f", {sample.num_lossy} whose text changes in encoding and decoding"
        return text + (f", {sample.unusable()}" if sample.num_unusable else "")

    def _sample(self, source: Source, section: SourceSection) -> "_Sample":
        size = min(NUM_ROWS, len(source))
        rows = np.unique(np.linspace(0, len(source) - 1, size).astype(int)).tolist()
        sample = _Sample(len(rows))
        for row in rows:
            try:
                texts, length = self._measure(source.read(row), section)
            except RowError as error:
                sample.reasons[error.reason] += 1
                sample.example = sample.example or f"{source.origin(row)}: {error}"
                continue
            sample.lengths.append(length)
            sample.num_lossy += any(self._is_lossy(text) for text in texts)
        return sample

    def _measure(self, row: dict[str, Any], section: SourceSection) -> tuple[list[str], int]:
        """The texts of a row and its number of tokens. Raises RowError for an unusable row."""
        if self.kind == "documents":
            texts = [] if "token_ids" in row else [parse_document(row, section)]
            return texts, len(document_tokens(row, section, self.tokenizer))
        if self.kind == "prompts":
            turns = parse_question(row, section, self.system_prompt)
            self.labels.read(row, section.answer_field)
            token_ids = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True)
            return [turn["content"] for turn in turns], len(token_ids)
        turns = parse_conversation(row, section, self.system_prompt)
        content = " ".join(turn.get("reasoning_content", "") + turn["content"] for turn in turns)
        num_tokens = self.tokenizer.encode_conversation(turns).num_tokens
        return re.split("|".join(THINK_MARKERS), content), num_tokens

    def _is_lossy(self, text: str) -> bool:
        return self.tokenizer.decode(self.tokenizer.encode_text(text)) != text


@dataclass
class _Sample:
    """What was found in `num_rows` rows of a source. `lengths`: tokens of each usable row."""

    num_rows: int
    lengths: list[int] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    example: str = ""
    num_lossy: int = 0

    @property
    def num_unusable(self) -> int:
        return self.reasons.total()

    def unusable(self) -> str:
        counts = ", ".join(f"{number} {reason}" for reason, number in self.reasons.most_common())
        total = f"{self.num_unusable} of {self.num_rows} rows tried are unusable"
        return f"{total} ({counts}; {self.example})" if self.reasons else ""

    def spread(self) -> str:
        """Example: 13/21/40/45 tokens (min/median/99 %/max of 200 tried) ▁▃█▅▂▁▁▁"""
        bars = np.histogram(self.lengths, bins=len(_HISTOGRAM))[0]
        histogram = "".join(_HISTOGRAM[bar * (len(_HISTOGRAM) - 1) // bars.max()] for bar in bars)
        quantiles = np.percentile(self.lengths, [0, 50, 99, 100])
        lengths = "/".join(str(int(length)) for length in quantiles)
        return f"{lengths} tokens (min/median/99 %/max of {self.num_rows} tried) {histogram}"


@dataclass(frozen=True)
class _Budget:
    """What the schedule consumes of what the sources hold; `unit` is rows or tokens."""

    steps: int
    per_step: int
    available: int
    unit: str

    @classmethod
    def of(cls, recipe: TrainRecipe, rows: _RowSampler) -> "_Budget":
        samples = recipe.data.batch_samples
        num_rows = rows.num_rows
        if isinstance(recipe, RlRecipe):
            samples = recipe.rl.prompts_per_step
            num_rows += _num_problems(recipe.rl)
        if not samples:
            per_step = recipe.data.batch_sequences * recipe.data.sequence_tokens
            steps = complete_schedule(recipe, None).total_steps
            return cls(steps, per_step, rows.num_tokens, "tokens")
        steps_per_epoch = -(-num_rows // samples)
        steps = complete_schedule(recipe, steps_per_epoch).total_steps
        return cls(steps, samples, num_rows, "rows")

    @property
    def is_short(self) -> bool:
        return self.per_step > self.available

    def __str__(self) -> str:
        passes = self.steps * self.per_step / self.available
        return (
            f"{self.steps} steps of {self.per_step:,} {self.unit}, "
            f"{passes:.2g} passes over {self.available:,}"
            + ": fewer than one step needs"
            * self.is_short
        )


def mean_row_tokens(recipe: TrainRecipe, tokenizer: ChatTokenizer) -> float:
    """Mean tokens of the rows of a recipe's sources, from a sample. Raises UserError."""
    kind: RowKind = "messages" if recipe.data.batch_samples else "documents"
    sampler = _RowSampler(tokenizer, kind, recipe.data.system_prompt, max_unusable=1.0)
    for section in recipe.data.sources:
        sampler.check(section)
    return sampler.num_tokens / sampler.num_rows
