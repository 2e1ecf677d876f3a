"""The rows of bench/step.py: shapes, what is saved or recomputed, operations of a step."""

from dataclasses import dataclass
from typing import Any, Literal

from infir2.config.schema import (
    DataSection,
    Fp8Section,
    ModelSection,
    OptimizerSection,
    ScheduleSection,
    TrainRecipe,
    TrainSection,
)
from infir2.numerics import SavedActivations

_KEYS = (
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "ffn_size",
    "vocab_size",
    "tie_embeddings",
)


SHAPES: dict[str, dict[str, Any]] = {
    "1.5B": dict(zip(_KEYS, (1536, 28, 12, 2, 8960, 151936, True), strict=True)),
    "0.5B": dict(zip(_KEYS, (896, 24, 14, 2, 4864, 151936, True), strict=True)),
    "7B": dict(zip(_KEYS, (3584, 28, 28, 4, 18944, 152064, False), strict=True)),
    "135M": dict(zip(_KEYS, (576, 30, 9, 3, 1536, 49152, True), strict=True)),
}


# "small" splits over 8 tensor-parallel ranks without cutting an FP8 block; "tiny" takes a second on
# a CPU.
SHAPES["small"] = SHAPES["1.5B"] | {
    "hidden_size": 1024,
    "num_heads": 8,
    "num_kv_heads": 4,
    "ffn_size": 4096,
    "vocab_size": 32768,
}
SHAPES["tiny"] = SHAPES["1.5B"] | {
    "hidden_size": 256,
    "num_heads": 2,
    "num_kv_heads": 2,
    "ffn_size": 256,
    "vocab_size": 256,
}
DEFAULT = SavedActivations()


FP8_PRE_ACTIVATIONS = SavedActivations(pre_activations="fp8")


SELECTIVE = SavedActivations(recompute="selective")


SELECTIVE_FP8 = SavedActivations(recompute="selective", pre_activations="fp8")


SMALLEST = SavedActivations(
    recompute="selective", pre_activations="fp8", keep_transposed_weights=False
)


SMALL_OPTIMIZER: dict[str, Any] = {
    "moment_dtype": "fp8",
    "grad_dtype": "bf16",
    "loss_chunk_tokens": 1024,
}


@dataclass(frozen=True)
class Case:
    """One row of the table. Example: `Case("7B", 1, 8192, fp8=True, layers=14)`."""

    model: str  # key of SHAPES
    sequences: int
    length: int  # of a sequence, in tokens
    fp8: bool
    saved: SavedActivations = DEFAULT
    recompute: Literal["none", "full"] = "none"
    layers: int = 28
    optimizer: bool = True
    scale_format: Literal["pow2", "fp32"] = "pow2"
    moment_dtype: Literal["fp32", "bf16", "fp8"] = "fp32"
    grad_dtype: Literal["fp32", "bf16"] = "fp32"
    loss_chunk_tokens: int = 2048
    graphs: bool = False

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    def recipe(self) -> TrainRecipe:
        """The keys that a user would set for this case."""
        saved = self.saved
        recompute = "full" if self.recompute == "full" else saved.recompute
        pre: Literal["bfloat16", "fp8"] = "fp8" if saved.pre_activations == "fp8" else "bfloat16"
        return TrainRecipe(
            model=ModelSection(recompute=recompute, pre_activation_dtype=pre),
            fp8=Fp8Section(
                enabled=self.fp8,
                scale_format=self.scale_format,
                keep_transposed=saved.keep_transposed_weights,
            ),
            data=DataSection(micro_batch_tokens=self.tokens),
            optimizer=OptimizerSection(moment_dtype=self.moment_dtype, grad_dtype=self.grad_dtype),
            schedule=ScheduleSection(learning_rate=1e-5),
            train=TrainSection(loss_chunk_tokens=self.loss_chunk_tokens, cuda_graphs=self.graphs),
        )


CASES: dict[str, dict[str, Case]] = {
    "1.5B-8k": {
        "BF16": Case("1.5B", 2, 8192, False),
        "FP8": Case("1.5B", 2, 8192, True),
        "FP8, gate/up in FP8": Case("1.5B", 2, 8192, True, FP8_PRE_ACTIVATIONS),
        "BF16, selective recompute": Case("1.5B", 2, 8192, False, SELECTIVE),
        "FP8, selective recompute": Case("1.5B", 2, 8192, True, SELECTIVE),
        "FP8, gate/up in FP8, selective recompute": Case("1.5B", 2, 8192, True, SELECTIVE_FP8),
        "FP8, least memory without full recompute": Case(
            "1.5B", 2, 8192, True, SMALLEST, **SMALL_OPTIMIZER
        ),
        "FP8, fp32 scales": Case("1.5B", 2, 8192, True, scale_format="fp32"),
    },
    "0.5B-8k": {
        "BF16": Case("0.5B", 1, 8192, False, layers=24),
        "FP8": Case("0.5B", 1, 8192, True, layers=24),
    },
    "135M-8k": {
        "BF16": Case("135M", 1, 8192, False, layers=30),
        "FP8": Case("135M", 1, 8192, True, layers=30),
    },
    "1.5B-32k": {
        "BF16": Case("1.5B", 1, 32768, False, recompute="full"),
        "FP8": Case("1.5B", 1, 32768, True, recompute="full"),
    },
    "7B-8k": {
        "BF16": Case("7B", 1, 8192, False, layers=14, optimizer=False),
        "FP8": Case("7B", 1, 8192, True, layers=14, optimizer=False),
    },
}


def flops(case: Case) -> float:
    """Floating-point operations of forward and backward."""
    s = SHAPES[case.model]
    d, f, n, g = s["hidden_size"], s["ffn_size"], s["num_heads"], s["num_kv_heads"]
    head = d // n
    layer = d * (n + 2 * g) * head + n * head * d + 3 * d * f
    parameters = case.layers * layer + s["vocab_size"] * d
    return 6.0 * parameters * case.tokens + 6.0 * case.layers * case.tokens * case.length * n * head
