"""The part of `infir2 check` that looks at text: tokenizer and rows."""

import re
from collections import Counter
from typing import Any

import numpy as np

from infir2.config.schema import EvalRecipe, RlRecipe, SourceSection, TrainRecipe
from infir2.data import ChatTokenizer
from infir2.data.chat import PROBE_CONVERSATION, THINK_MARKERS
from infir2.data.rows import (
    RowKind,
    check_same_tokenizer,
    document_tokens,
    open_source,
    parse_conversation,
    parse_document,
    parse_prompt,
)
from infir2.data.sources import RowError
from infir2.errors import ConfigError, DataError
from infir2.train.loop import complete_schedule

NUM_ROWS = 200
_FEW = ": fewer than one step takes"


def check_tokenizer(tokenizer: ChatTokenizer, chat: bool) -> str:
    """With `chat`: a prompt's tokens begin the conversation's, and an end token is trained last. Raises ConfigError."""
    if chat:
        tokenizer.require_chat_template()
        sample, prompt = (
            tokenizer.encode_conversation(PROBE_CONVERSATION),
            tokenizer.apply_chat_template(PROBE_CONVERSATION[:1], add_generation_prompt=True),
        )
        if sample.token_ids[: len(prompt)].tolist() != prompt:
            raise ConfigError(
                "the chat template renders a prompt differently once the answer follows; responses could not be aligned."
            )
        if int(sample.token_ids[-1]) not in tokenizer.eos_token_ids or not sample.loss_mask[-1]:
            raise ConfigError(
                "the chat template does not end an answer with a stop token; a model trained so would never stop."
            )
    return f"{tokenizer.vocab_size} tokens, fingerprint {tokenizer.fingerprint()[:12]}"


def check_sources(recipe: TrainRecipe | EvalRecipe, verb: str, tokenizer: ChatTokenizer) -> str:
    """Rows of every source of the recipe, spread over its length. Raises DataError for a source that would stop the run."""
    kind: RowKind = "documents" if verb == "cpt" else "messages" if verb == "sft" else "prompts"
    system = (
        recipe.evaluate.system_prompt
        if isinstance(recipe, EvalRecipe)
        else recipe.data.system_prompt
    )
    trained = _Rows(tokenizer, kind, system)
    found: list[str] = []
    if isinstance(recipe, TrainRecipe):
        limit = (
            recipe.rl.max_prompt_tokens
            if isinstance(recipe, RlRecipe)
            else recipe.data.sequence_tokens
            if kind == "messages"
            else 0
        )
        most = recipe.data.max_quarantined_fraction
        found += [trained.check(section, limit, most) for section in recipe.data.sources]
        found.append(_budget(recipe, trained))
        found += [trained.check(section, limit, most) for section in recipe.data.validation_sources]
    if isinstance(recipe, EvalRecipe | RlRecipe):
        problems = _Rows(tokenizer, "prompts", recipe.evaluate.system_prompt)
        found += [problems.check(section) for section in recipe.evaluate.problems]
    return (
        "warn: " if trained.num_lossy or any(text.endswith(_FEW) for text in found) else ""
    ) + "; ".join(found)


def _budget(recipe: TrainRecipe, rows: "_Rows") -> str:
    """What the schedule takes of what the sources hold."""
    per_step, unit, there = (
        recipe.data.batch_sequences * recipe.data.sequence_tokens,
        "tokens",
        rows.num_tokens,
    )
    if isinstance(recipe, RlRecipe) or recipe.data.batch_samples:
        per_step = (
            recipe.rl.prompts_per_step
            if isinstance(recipe, RlRecipe)
            else recipe.data.batch_samples
        )
        unit, there = "rows", rows.num_rows
    steps = complete_schedule(recipe, -(-there // per_step) if unit == "rows" else None).total_steps
    passes = steps * per_step / there
    return f"{steps} steps of {per_step:,} {unit}, {passes:.2g} passes over {there:,}" + _FEW * (
        per_step > there
    )


class _Rows:
    """Tries rows of sources of one kind."""

    def __init__(self, tokenizer: ChatTokenizer, kind: RowKind, system_prompt: str) -> None:
        self._tokenizer, self._kind, self._system_prompt = tokenizer, kind, system_prompt
        self.num_lossy = self.num_rows = self.num_tokens = (
            0  # of the sources seen; tokens are an estimate
        )

    def _measure(self, row: dict[str, Any], section: SourceSection) -> tuple[list[str], int]:
        """The texts of a row and its number of tokens. Raises RowError for an unusable row."""
        if self._kind == "documents":
            texts = [] if "token_ids" in row else [parse_document(row, section)]
            return texts, len(document_tokens(row, section, self._tokenizer))
        if self._kind == "prompts":
            turns = parse_prompt(row, section, self._system_prompt)[0]
            return [turn["content"] for turn in turns], len(
                self._tokenizer.apply_chat_template(turns, add_generation_prompt=True)
            )
        turns = parse_conversation(row, section, self._system_prompt)
        spoken = re.split("|".join(THINK_MARKERS), " ".join(turn["content"] for turn in turns))
        return spoken, self._tokenizer.encode_conversation(turns).num_tokens

    def check(self, section: SourceSection, limit: int = 0, max_unusable: float = 0.0) -> str:
        """Rows spread over the source: lengths in tokens, unusable rows, texts that do not survive encoding and decoding.

        Raises DataError for more unusable rows than the share allowed, or no row within `limit` tokens (0: no limit).
        """
        source = open_source(section, self._kind)
        check_same_tokenizer(source, self._tokenizer)
        rows = np.unique(
            np.linspace(0, len(source) - 1, min(NUM_ROWS, len(source))).astype(int)
        ).tolist()
        lengths: list[int] = []
        reasons: Counter[str] = Counter()
        example, num_lossy = "", 0
        for row in rows:
            try:
                texts, length = self._measure(source.read(row), section)
            except RowError as error:
                reasons[error.reason] += 1
                example = example or f"{source.origin(row)}: {error}"
                continue
            lengths.append(length)
            num_lossy += any(
                self._tokenizer.decode(self._tokenizer.encode_text(text)) != text for text in texts
            )
        counts = ", ".join(f"{number} {reason}" for reason, number in reasons.most_common())
        unusable = (
            f"{reasons.total()} of {len(rows)} rows tried are unusable ({counts}; {example})"
            if reasons
            else ""
        )
        if not lengths or reasons.total() > max_unusable * len(rows):
            raise DataError(
                f"{section.path}: {unusable}; mend the rows, or raise data.max_quarantined_fraction."
            )
        num_long = sum(length > limit for length in lengths) if limit else 0
        if num_long == len(lengths):
            raise DataError(
                f"{section.path}: every row tried is longer than {limit} tokens; raise the limit or name other data."
            )
        self.num_lossy += num_lossy
        self.num_rows += len(source)
        self.num_tokens += round(len(source) * sum(lengths) / len(rows))
        bars = np.histogram(lengths, bins=8)[0]
        histogram = "".join("▁▂▃▄▅▆▇█"[bar * 7 // bars.max()] for bar in bars)
        spread = "/".join(str(int(length)) for length in np.percentile(lengths, [0, 50, 99, 100]))
        text = f"{section.path}: {len(source)} rows of {spread} tokens (min/median/99 %/max of {len(rows)} tried) {histogram}"
        text += f", {num_long} longer than {limit}" if num_long else ""
        text += f", {num_lossy} whose text changes in encoding and decoding" if num_lossy else ""
        return text + (f", {unusable}" if reasons else "")
