"""Every section of a recipe as a typed, frozen class. Imports no torch.

A component receives its own section, never the whole recipe. `Field(description=...)` is what `infir2 VERB --help`
prints; a unit stands in the name (`_tokens`, `_seconds`) or in the description.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

ScaleFormat = Literal["pow2", "fp32"]
ComputeDtype = Literal["bfloat16", "float32"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class RunSection(Section):
    dir: str = Field(
        "",
        description="run directory: checkpoints, metrics, report; the same command run again resumes from it",
    )
    seed: int = Field(1236, ge=0, description="seed of weights, data order and sampling")
    threads: int = Field(0, ge=0, description="CPU threads for torch (0: leave torch's choice)")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where to run; auto takes a GPU if there is one"
    )


class ShapeSection(Section):
    """A model made from nothing. Without it, the model comes from `model.path`."""

    architecture: Literal["qwen2", "qwen3", "llama"] = Field(
        "qwen2", description="block variant and Hugging Face architecture"
    )
    vocab_size: int = Field(0, ge=0, description="rows of the embedding (0: the tokenizer's size)")
    hidden_size: int = Field(gt=0, description="width D of the residual stream")
    num_layers: int = Field(gt=0, description="decoder blocks")
    num_heads: int = Field(gt=0, description="query heads N")
    num_kv_heads: int = Field(gt=0, description="key/value heads G; divides num_heads")
    head_dim: int = Field(0, ge=0, description="H (0: hidden_size / num_heads)")
    ffn_size: int = Field(gt=0, description="F, the inner width of the feed-forward")
    tie_embeddings: bool = Field(True, description="one matrix for embedding and lm_head")
    rope_theta: float = Field(1e6, gt=0, description="rotary base")
    rms_eps: float = Field(1e-6, gt=0, description="epsilon of RMSNorm")
    max_positions: int = Field(
        32768, gt=0, description="longest sequence the exported model announces, tokens"
    )
    init_std: float = Field(
        0.0, ge=0, description="standard deviation of new weights (0: 1/sqrt(fan_in))"
    )


class ModelSection(Section):
    path: str = Field(
        "",
        description="start from this: a Hugging Face directory, or a run directory (newest checkpoint's weights)",
    )
    shape: ShapeSection | None = Field(
        None, description="make a new model of this shape instead of loading one"
    )
    compute_dtype: ComputeDtype = Field(
        "bfloat16", description="dtype of activations; masters, reductions and logits are FP32"
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="made again in the backward to save memory; selective: norms and SwiGLU products (GPU), full: whole blocks",
    )
    pre_activation_dtype: Literal["bfloat16", "fp8"] = Field(
        "bfloat16",
        description="kept of gate and up for the backward; fp8: half the bytes, gradients of rounded values",
    )


class Fp8Section(Section):
    enabled: bool = Field(
        True,
        description="FP8 in the Linears of the decoder blocks; false trains the same model in BF16",
    )
    scale_format: ScaleFormat = Field(
        "pow2", description="pow2: scales rounded up to powers of two; fp32: amax/448"
    )
    keep_transposed: bool = Field(
        True,
        description="FP8 weights in both layouts (GPU); false: half the bytes, a transpose per backward",
    )
    skip_modules: tuple[str, ...] = Field(
        (), description="glob patterns of exported modules kept in BF16, as 'model.layers.0.*'"
    )


class SourceSection(Section):
    path: str = Field(description="a .jsonl, .jsonl.gz or .parquet file, or a directory of them")
    weight: float = Field(
        1.0, gt=0, description="share in the mixture, relative to the other sources"
    )
    text_field: str = Field("text", description="documents: the field with the text")
    prompt_field: str = Field(
        "prompt", description="prompts: the field with the question (text, or messages)"
    )
    answer_field: str = Field("label", description="prompts: the field with the reference answer")
    solution_field: str = Field(
        "",
        description="messages from question and solution: the solution's field (empty: rows have `messages`)",
    )
    reasoning_field: str = Field(
        "",
        description="with solution_field: the field with the thought, put between <think> and </think>",
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
        32768, gt=1, description="longest sequence; CPT packs documents into windows of this length"
    )
    batch_sequences: int = Field(
        0,
        ge=0,
        description="windows of sequence_tokens in an optimizer step (CPT, or SFT packed over a window)",
    )
    batch_samples: int = Field(
        0,
        ge=0,
        description="samples in an optimizer step (SFT); exactly one of the two batch keys is set",
    )
    micro_batch_tokens: int = Field(
        32768,
        gt=0,
        description="most tokens in one forward pass on one device (MAX_TOKENS_PER_GPU)",
    )
    pack_window_samples: int = Field(
        1024, gt=0, description="samples considered together when packing windows of tokens"
    )
    on_too_long: Literal["drop", "truncate"] = Field(
        "drop", description="a sample longer than sequence_tokens (documents are split instead)"
    )
    max_quarantined_fraction: float = Field(
        0.01,
        ge=0,
        le=1,
        description="stop when more than this share of a source's rows is unusable",
    )
    system_prompt: str = Field("", description="system message put before rows that have none")


class OptimizerSection(Section):
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first-moment decay")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW's second-moment decay")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    weight_decay: float = Field(
        0.1, ge=0, description="decoupled decay of matrices (not of norms and biases)"
    )
    clip_norm: float = Field(1.0, ge=0, description="global gradient norm bound (0: no clipping)")
    moment_dtype: Literal["fp32", "bf16", "fp8"] = Field(
        "fp32", description="format of AdamW's moments; fp8: 8 bits, a scale per 128 values"
    )
    offload: bool = Field(False, description="keep AdamW's moments in the host's memory")
    grad_dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="dtype of gradient buffers; masters and clipping stay FP32"
    )


class ScheduleSection(Section):
    kind: Literal["wsd", "cosine", "constant"] = Field(
        "constant", description="learning-rate curve"
    )
    learning_rate: float = Field(gt=0, description="peak learning rate")
    final_learning_rate: float = Field(
        0.0, ge=0, description="learning rate at the last step (wsd, cosine)"
    )
    warmup_steps: int = Field(0, ge=0, description="linear warm-up, optimizer steps")
    warmup_fraction: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="linear warm-up as a share of total_steps (instead of warmup_steps)",
    )
    total_steps: int = Field(0, ge=0, description="optimizer steps in all (0: from train.epochs)")
    decay_steps: int = Field(0, ge=0, description="wsd: length of the final decay, steps")
    decay_from_step: int = Field(
        -1,
        ge=-1,
        description="wsd: start of the decay of a stable checkpoint (-1: total_steps - decay_steps)",
    )
    decay_shape: Literal["cosine", "linear"] = Field("cosine", description="wsd: form of the decay")


class TrainSection(Section):
    epochs: float = Field(
        0.0, ge=0, description="passes over the data (sets schedule.total_steps when that is 0)"
    )
    stop_after_step: int = Field(
        0, ge=0, description="end the run after this step, schedule unchanged (0: run to the end)"
    )
    validate_every: int = Field(100, ge=0, description="steps between validation losses (0: never)")
    validation_batches: int = Field(10, gt=0, description="micro-batches in a validation loss")
    max_nonfinite_steps: int = Field(
        3,
        ge=1,
        description="stop (exit 17) after this many steps in a row with a non-finite loss or gradient; each such step is skipped",
    )
    on_spike: Literal["continue", "stop"] = Field(
        "continue",
        description="after 4 steps in a row whose loss is twice the mean of the last 100 (cpt, sft): go on, or end the run",
    )
    loss_chunk_tokens: int = Field(2048, gt=0, description="tokens whose logits exist at one time")
    log_every: int = Field(1, gt=0, description="steps between lines of metrics.jsonl")


class CheckpointSection(Section):
    save_every: int = Field(
        1000, gt=0, description="steps between checkpoints; the last step is always saved"
    )
    keep: int = Field(2, ge=1, description="newest checkpoints kept")
    background: bool = Field(
        True,
        description="save while training goes on, from a copy of masters and moments in host memory",
    )
    on_save_error: Literal["stop", "warn"] = Field(
        "stop", description="after a failed save: end the run, or go on and try again"
    )
    branch_from: str = Field(
        "",
        description="checkpoint (RUN/checkpoints/step-300) that a new run goes on from, with optimizer and data",
    )


class RlSection(Section):
    prompts_per_step: int = Field(128, gt=0, description="groups trained in a step")
    group_size: int = Field(16, gt=1, description="responses per prompt")
    over_sample_prompts: int = Field(
        384,
        gt=0,
        description="prompts sampled at most in a step to find groups whose rewards differ",
    )
    mini_batches: int = Field(
        1, gt=0, description="optimizer updates made from one step's responses"
    )
    clip_low: float = Field(0.2, gt=0, lt=1, description="lower clip of the probability ratio")
    clip_high: float = Field(0.28, gt=0, description="upper clip of the probability ratio")
    tis_cap: float = Field(
        2.0, gt=0, description="upper bound of the truncated importance weight trainer/rollout"
    )
    temperature: float = Field(
        1.0, gt=0, description="sampling temperature; log-probabilities are taken at it too"
    )
    max_response_tokens: int = Field(
        8192, gt=0, description="longest response; a longer one is cut and counted as truncated"
    )
    max_prompt_tokens: int = Field(2048, gt=0, description="longer prompts are dropped and counted")
    overlong_buffer_tokens: int = Field(
        0, ge=0, description="soft overlong penalty: its ramp before max_response_tokens (0: off)"
    )
    overlong_penalty: float = Field(1.0, ge=0, description="largest soft overlong penalty")
    normalize_by_std: bool = Field(
        True, description="divide advantages by the group's standard deviation"
    )
    max_mismatch_kl: float = Field(
        0.05, gt=0, description="stop when the mean KL between rollout and trainer exceeds this"
    )
    asynchronous: bool = Field(
        False,
        description="sample step n + 1 while step n trains, from weights a version older; for engines apart",
    )
    evaluate_every: int = Field(
        20, ge=0, description="steps between in-loop evaluations (0: never)"
    )


class RolloutSection(Section):
    model: str = Field(
        "", description="exported FP8 Hugging Face directory that the engine loads (HF_CHECKPOINT)"
    )
    max_running_requests: int = Field(
        128, gt=0, description="sequences that generate at the same time in one engine"
    )


class EvaluateSection(Section):
    problems: tuple[SourceSection, ...] = Field((), description="held-out problems")
    max_problems: int = Field(0, ge=0, description="take the first so many problems (0: all)")
    samples: int = Field(4, gt=0, description="k of avg@k and pass@k")
    temperature: float = Field(1.0, ge=0, description="sampling temperature (0: greedy)")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling")
    max_response_tokens: int = Field(8192, gt=0, description="longest response")
    system_prompt: str = Field("", description="system message of every problem")
    response_prefix: str = Field(
        "", description="text that the assistant's turn starts with, such as '<think>\\n'"
    )


class ParallelSection(Section):
    """Sizes of the process mesh; their product is the number of processes. docs/parallel.md says how to choose."""

    dp: int = Field(
        -1,
        ge=-1,
        description="ranks that read different data and shard the weights (-1: all that are left)",
    )
    dp_replicate: int = Field(
        1, ge=1, description="copies of the sharded model, such as one per node (HSDP)"
    )
    tp: int = Field(
        1, ge=1, description="ranks that share every layer (tensor and sequence parallelism)"
    )
    cp: int = Field(
        1, ge=1, description="ranks that share the tokens of a micro-batch (context parallelism)"
    )
    pp: int = Field(1, ge=1, description="only 1: there is no pipeline parallelism")
    timeout_seconds: float = Field(
        600.0, gt=0, description="a rank without a sign of life for so long ends the run (exit 71)"
    )


class TrainRecipe(Section):
    """A recipe of `infir2 cpt` or `infir2 sft`."""

    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    fp8: Fp8Section = Fp8Section()
    data: DataSection = DataSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = Field()
    train: TrainSection = TrainSection()
    checkpoint: CheckpointSection = CheckpointSection()
    parallel: ParallelSection = ParallelSection()


class RlRecipe(TrainRecipe):
    """A recipe of `infir2 rl`."""

    rl: RlSection = RlSection()
    rollout: RolloutSection = RolloutSection()
    evaluate: EvaluateSection = EvaluateSection()


class EvalRecipe(Section):
    """A recipe of `infir2 eval`."""

    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    fp8: Fp8Section = Fp8Section()
    rollout: RolloutSection = RolloutSection()
    evaluate: EvaluateSection = EvaluateSection()
