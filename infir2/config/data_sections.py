"""Sections about data: where rows come from, how they become batches."""

from typing import Literal

from pydantic import Field

from infir2.config.section import Section

DocumentBos = Literal["tokenizer", "always", "never"]


class SourceSection(Section):
    """A file or directory of data, and the names of its fields."""

    path: str = Field(
        description="a .jsonl or .json file (also .gz or .zst), a .parquet or .txt file, the "
        "prefix of a Megatron indexed data set, or a directory of such files"
    )
    weight: float = Field(1.0, gt=0, description="share in the mixture, relative to other sources")
    text_field: str = Field("text", description="CPT: field with the text of a document")
    prompt_field: str = Field(
        "prompt",
        description="RL and evaluation, or SFT with solution_field: field with the question "
        "(text, or for RL and evaluation a list of messages)",
    )
    answer_field: str = Field("label", description="RL and evaluation: field with the answer")
    messages_field: str = Field("messages", description="SFT: field with the list of messages")
    solution_field: str = Field(
        "",
        description="SFT: field with the solution, for rows of question and solution (empty: rows "
        "have messages)",
    )
    reasoning_field: str = Field(
        "",
        description="SFT: field with the thought before the answer (empty: reasoning_content, "
        "reasoning or thinking, if a row has one)",
    )


class DataSection(Section):
    tokenizer: str = Field(
        "",
        description="directory with tokenizer.json and tokenizer_config.json (empty: the model's)",
    )
    sources: tuple[SourceSection, ...] = Field((), description="training data")
    validation_sources: tuple[SourceSection, ...] = Field(
        (), description="data for the validation loss"
    )
    sequence_tokens: int = Field(
        32768,
        gt=1,
        description="maximum sequence length; CPT packs documents into windows of this length",
    )
    batch_sequences: int = Field(
        0,
        ge=0,
        description="windows of sequence_tokens per optimizer step (CPT, or SFT in windows)",
    )
    batch_samples: int = Field(
        0,
        ge=0,
        description="samples per optimizer step (SFT); set one of the two batch keys",
    )
    micro_batch_tokens: int = Field(
        32768,
        gt=0,
        description="maximum tokens in one forward pass on one device (MAX_TOKENS_PER_GPU); in RL, "
        "a longer prompt and response is alone in its pass",
    )
    pack_window_samples: int = Field(
        1024,
        gt=0,
        description="SFT with packed windows: samples that are packed jointly; more fill the "
        "windows better",
    )
    on_too_long: Literal["drop", "truncate"] = Field(
        "drop",
        description="SFT: what to do with a sample longer than sequence_tokens; truncate keeps "
        "its end (documents are split instead)",
    )
    max_quarantined_fraction: float = Field(
        0.01,
        ge=0,
        le=1,
        description="stop when more than this fraction of a source's rows is unusable",
    )
    system_prompt: str = Field("", description="system message for rows without one")
    trained_turns: Literal["all", "last"] = Field(
        "all",
        description="SFT: assistant turns to train; all: each that the chat template writes as the "
        "model generated it, which leaves out earlier turns whose thought it drops",
    )
    document_bos: DocumentBos = Field(
        "tokenizer",
        description="CPT: BOS token before each document; tokenizer: if transformers writes it "
        "there (conversations have what the chat template writes)",
    )
