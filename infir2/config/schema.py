"""Every section of a recipe as a typed, frozen pydantic class. Imports no torch.

A component receives its own section, never the full recipe. `infir2 VERB --help` prints each
field's description; the unit is in the field's name (`_tokens`, `_seconds`) or in the description.
"""

from typing import Literal

from pydantic import Field

from infir2.config.data_sections import DataSection, SourceSection
from infir2.config.rl_section import ANSWER_FORMAT, AnswerFormat
from infir2.config.rl_section import RewardSection as RewardSection
from infir2.config.rl_section import RlSection as RlSection
from infir2.config.section import Section

ScaleFormat = Literal["pow2", "fp32"]
ComputeDtype = Literal["bfloat16", "float32"]


class RunSection(Section):
    dir: str = Field(
        "",
        description="run directory for checkpoints, metrics and the report; running the same "
        "command again resumes from it",
    )
    seed: int = Field(1236, ge=0, description="seed of initial weights, data order and sampling")
    threads: int = Field(0, ge=0, le=4096, description="CPU threads for torch (0: torch's default)")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="device to run on; auto uses a GPU if there is one"
    )
    deterministic: bool = Field(
        False,
        description="on a GPU: training steps have the same bits each time, and after a resume, on "
        "the same kind of GPU with the same software; slower, needs FlashAttention 4. Rollouts "
        "repeat theirs with rollout.exact. A CPU repeats its bits without it",
    )


class ShapeSection(Section):
    """A randomly initialized model. Without this section, the model comes from `model.path`."""

    architecture: Literal["qwen2", "qwen3", "llama"] = Field(
        "qwen2", description="decoder block variant and Hugging Face architecture"
    )
    vocab_size: int = Field(0, ge=0, description="rows of the embedding (0: the tokenizer's size)")
    hidden_size: int = Field(gt=0, description="width D of the residual stream")
    num_layers: int = Field(gt=0, description="number of decoder blocks")
    num_heads: int = Field(gt=0, description="number of query heads N")
    num_kv_heads: int = Field(gt=0, description="number of key/value heads G; divides num_heads")
    head_dim: int = Field(0, ge=0, description="head dimension H (0: hidden_size / num_heads)")
    ffn_size: int = Field(gt=0, description="intermediate size F of the feed-forward network")
    tie_embeddings: bool = Field(True, description="share one matrix between embedding and lm_head")
    rope_theta: float = Field(1e6, gt=0, description="base of the rotary position embedding")
    rms_eps: float = Field(1e-6, gt=0, description="epsilon of RMSNorm")
    max_positions: int = Field(
        32768, gt=0, description="max_position_embeddings of the exported model, tokens"
    )
    init_std: float = Field(
        0.0, ge=0, description="standard deviation of initial weights (0: 1/sqrt(fan_in))"
    )


class ModelSection(Section):
    path: str = Field(
        "",
        description="initial weights: a Hugging Face directory, or a run (its newest checkpoint)",
    )
    shape: ShapeSection | None = Field(
        None, description="initialize a new model of this shape instead of loading one"
    )
    template_date: str = Field(
        "",
        description="date in a chat template that writes one (Llama 3.2), YYYY-MM-DD; empty: the "
        "date of the model's run, or of the day on which this run begins",
    )
    compute_dtype: ComputeDtype = Field(
        "bfloat16",
        description="dtype of activations; masters, reductions and logits are FP32",
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="activation recomputation in the backward; selective: norms and SwiGLU "
        "products (GPU only), full: entire decoder blocks",
    )
    pre_activation_dtype: Literal["bfloat16", "fp8"] = Field(
        "bfloat16",
        description="format in which the inputs of SwiGLU (gate and up) are saved for the "
        "backward; fp8 halves their memory, and gradients see rounded values",
    )


class Fp8Section(Section):
    enabled: bool = Field(
        True,
        description="linear layers of the decoder in FP8; false trains the same model in BF16",
    )
    scale_format: ScaleFormat = Field(
        "pow2", description="pow2: scales rounded up to powers of two; fp32: amax/448"
    )
    keep_transposed: bool = Field(
        True,
        description="cache FP8 weights in both layouts (GPU only); false, or model.recompute = "
        "'full', halves that memory and transposes each weight in the backward",
    )
    skip_modules: tuple[str, ...] = Field(
        (),
        description="glob patterns of exported module names to keep in BF16: '*.v_proj', or "
        "'model.layers.0' for all in it",
    )

    def caches_transposed(self, model: ModelSection) -> bool:
        """Whether transposed codes are kept: not by a model that recomputes to save memory."""
        return self.enabled and self.keep_transposed and model.recompute != "full"


class OptimizerSection(Section):
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's decay of the first moment")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW's decay of the second moment")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    weight_decay: float = Field(
        0.1, ge=0, description="decoupled weight decay of matrices (norms and biases have none)"
    )
    clip_norm: float = Field(1.0, ge=0, description="maximum global gradient norm (0: no clipping)")
    moment_dtype: Literal["fp32", "bf16", "fp8"] = Field(
        "fp32", description="dtype of AdamW's moments; fp8: 8 bits and one scale per 128 values"
    )
    offload: bool = Field(False, description="keep AdamW's moments in host memory")
    grad_dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="dtype of gradient buffers; master weights and clipping stay FP32"
    )


class ScheduleSection(Section):
    kind: Literal["wsd", "cosine", "constant"] = Field(
        "constant", description="learning-rate schedule; wsd: warm-up, stable, decay"
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
        description="linear warm-up as a fraction of total_steps, instead of warmup_steps",
    )
    total_steps: int = Field(
        0, ge=0, description="optimizer steps of the run (0: from train.epochs)"
    )
    decay_steps: int = Field(0, ge=0, description="wsd: length of the final decay, steps")
    decay_from_step: int = Field(
        -1,
        ge=-1,
        description="wsd: step at which the decay starts, to branch from a stable checkpoint "
        "(-1: total_steps - decay_steps)",
    )
    decay_shape: Literal["cosine", "linear"] = Field(
        "cosine", description="wsd: shape of the decay"
    )


class TrainSection(Section):
    epochs: float = Field(
        0.0, ge=0, description="passes over the data; used when schedule.total_steps is 0"
    )
    stop_after_step: int = Field(
        0,
        ge=0,
        description="stop after this step, with the schedule unchanged (0: at the end)",
    )
    validate_every: int = Field(100, ge=0, description="steps between validation losses (0: never)")
    validation_batches: int = Field(10, gt=0, description="micro-batches per rank per validation")
    max_nonfinite_steps: int = Field(
        3,
        ge=1,
        description="stop (exit code 17) after this many consecutive steps with a non-finite loss "
        "or gradient; each such step skips its update",
    )
    on_spike: Literal["continue", "stop"] = Field(
        "continue",
        description="CPT and SFT: what to do after 4 consecutive steps whose loss is above twice "
        "the mean of the last 100",
    )
    loss_chunk_tokens: int = Field(
        2048, gt=0, description="tokens per chunk of the loss; bounds the memory of the logits"
    )
    log_every: int = Field(1, gt=0, description="steps between lines of metrics.jsonl")
    tracker: Literal["tensorboard", "wandb", "trackio"] = Field(
        "tensorboard",
        description="where metrics are shown, beside metrics.jsonl: TensorBoard events in the run "
        "directory, and with wandb (WANDB_MODE=offline without a network) or trackio there too, "
        "under the same names (docs/metrics.md)",
    )
    cuda_graphs: bool | Literal["auto"] = Field(
        "auto",
        description="CPT and SFT where a GPU holds the whole model: launch a micro-batch's blocks "
        "as CUDA graphs, so that a small model does not wait for the host; not for micro-batches "
        "under 3/4 of data.micro_batch_tokens. auto: on a Hopper GPU with FlashAttention 4, for "
        "models below 1.2 billion parameters; larger ones gain little and would keep their "
        "gradients' memory",
    )
    observe_every: int = Field(
        0,
        ge=0,
        description="CPT and SFT in one process: steps between lines of operands.jsonl, the error "
        "of each layer's FP8 operands (0: never)",
    )


class CheckpointSection(Section):
    save_every: int = Field(
        1000,
        gt=0,
        description="steps between checkpoints; the last step is always saved",
    )
    keep: int = Field(2, ge=1, description="number of newest checkpoints to keep")
    background: bool = Field(
        True,
        description="save while training continues, from a copy of the state in host memory",
    )
    on_save_error: Literal["stop", "warn"] = Field(
        "stop", description="what to do after a failed save; warn: continue and retry later"
    )
    branch_from: str = Field(
        "",
        description="checkpoint (RUN/checkpoints/step-300) from which a new run takes weights, "
        "optimizer state and data position (other data starts from its beginning)",
    )


class RolloutSection(Section):
    model: str = Field(
        "", description="exported FP8 Hugging Face directory that the engine loads (HF_CHECKPOINT)"
    )
    max_running_requests: int = Field(
        128, gt=0, description="maximum concurrent requests of one engine"
    )
    cache_gib: float = Field(
        0.0,
        ge=0,
        description="most memory of an engine's KV cache, GiB (0: half of what is free at start); "
        "of SGLang and vLLM see rollout.memory_fraction",
    )
    engine: Literal["native", "infir2", "sglang", "vllm"] = Field(
        "native",
        description="what generates. native: this process, or the engines of infir2 launch ray; "
        "infir2 (infir2 serve), sglang, vllm: servers; see docs/engines.md",
    )
    precision: Literal["trainer", "fp8", "bf16"] = Field(
        "trainer",
        description="of the engine's linear layers and of rollout.model: the trainer's, FP8 with "
        "fp8.scale_format, or BF16; another one than the trainer's samples from another policy",
    )
    exact: bool = Field(
        False,
        description="stop the run if one sampled token has other bits than the trainer's "
        "log-probability (rollout.engine = native or infir2; on a GPU: FP8 models)",
    )
    urls: tuple[str, ...] = Field(
        (),
        description="servers that run already, such as http://127.0.0.1:30000 (INFIR2_ENGINE_KEY "
        "is their key); empty: start rollout.engines of them",
    )
    engines: int = Field(1, ge=1, description="servers to start")
    tensor_parallel: int = Field(1, ge=1, description="GPUs of one server (SGLang, vLLM)")
    python: str = Field(
        "",
        description="Python interpreter of the servers' environment, such as "
        "sglang-env/bin/python (empty: this one)",
    )
    memory_fraction: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="fraction of a GPU's memory that a server may take (0: its own default); "
        "with the trainer on the same GPU both must fit",
    )
    server_options: tuple[str, ...] = Field(
        (), description="further command-line options of the servers: ['--attention-backend=fa3']"
    )
    kv_cache_dtype: Literal["auto", "fp8_e4m3"] = Field(
        "auto", description="dtype of the servers' KV cache; auto is that of the activations"
    )
    weight_transfer: Literal["directory", "nccl"] = Field(
        "directory",
        description="how servers get new weights. directory: files in shared memory; nccl: "
        "broadcast from the trainer's GPU to servers on other GPUs (SGLang)",
    )
    sleep: bool = Field(
        False,
        description="servers give their GPU memory to the trainer while it trains, and wake up for "
        "new weights (SGLang, vLLM on the trainer's GPUs)",
    )
    max_restarts: int = Field(
        3, ge=0, description="how often a server that died or hangs is started again"
    )


class EvaluateSection(Section):
    problems: tuple[SourceSection, ...] = Field((), description="held-out problems")
    max_problems: int = Field(
        0, ge=0, description="use only the first max_problems problems (0: all)"
    )
    samples: int = Field(4, gt=0, description="responses per problem, the k of avg@k and pass@k")
    temperature: float = Field(1.0, ge=0, description="sampling temperature (0: greedy)")
    top_p: float = Field(1.0, gt=0, le=1, description="probability mass of nucleus sampling")
    max_response_tokens: int = Field(8192, gt=0, description="maximum response length, tokens")
    system_prompt: str = Field("", description="system message of every problem")
    response_prefix: str = Field(
        "", description="text with which every response starts, such as '<think>\\n'"
    )
    answer_format: AnswerFormat = Field("boxed", description=ANSWER_FORMAT)


class BenchmarksSection(Section):
    names: tuple[str, ...] = Field(
        (),
        description="benchmarks to run with evalscope instead of evaluate.problems, such as "
        "gpqa_diamond (see docs/evaluation.md)",
    )
    data: str = Field("", description="file or directory with their questions")


class ParallelSection(Section):
    """Axes of the device mesh; their product is the number of processes. See docs/parallel.md."""

    dp: int = Field(
        -1,
        ge=-1,
        description="data-parallel ranks, which shard the weights (FSDP); -1: all remaining ranks",
    )
    dp_replicate: int = Field(
        1,
        ge=1,
        description="replicas of the sharded model, such as one per node (HSDP); with dp = 1 of "
        "the whole model, which are the fastest where it fits",
    )
    tp: int = Field(1, ge=1, description="tensor- and sequence-parallel ranks")
    cp: int = Field(
        1, ge=1, description="context-parallel ranks, which split the tokens of a micro-batch"
    )
    reshard_after_forward: bool = Field(
        True,
        description="free a block's gathered weights after its forward and gather them again for "
        "its backward; false gathers half as often and keeps the weights of all blocks (one byte "
        "per parameter in FP8, two in BF16)",
    )
    blocks_per_gather: int = Field(
        1,
        ge=1,
        description="blocks whose weights are gathered, and gradients reduced, together: fewer and "
        "larger collectives, and as many blocks in memory",
    )
    timeout_seconds: float = Field(
        600.0,
        gt=0,
        description="end the run (exit code 71) when a rank sends no heartbeat for this long",
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
    benchmarks: BenchmarksSection = BenchmarksSection()
