"""Compare one training step of several layouts with the same step in a single process.

torchrun runs this script, which writes the differences as JSON. A layout is given as
name=dp_replicate,dp,cp,tp:

    torchrun --nproc_per_node 2 layouts.py OUT.json fsdp=1,2,1,1 tp=1,1,1,2 ...

With TRITON_INTERPRET=1 the kernels of a GPU run in Triton's interpreter, instead of the reference.
"""

import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

from read_codes import on_read

from infir2.config.schema import OptimizerSection, ShapeSection
from infir2.data import Batch
from infir2.model import Decoder
from infir2.model.hf_names import exported_fp8_weights, exported_weights, weights_digest
from infir2.numerics import Fp8Linear, convert_to_fp8, ops
from infir2.numerics.quantize import quantize_weight
from infir2.numerics.weight_cache import local_tensor
from infir2.parallel import fsdp
from infir2.parallel.fsdp import shard_module
from infir2.parallel.mesh import Layout, Sizes
from infir2.parallel.parallel_model import ParallelModel
from infir2.parallel.ranks import Ranks, init_ranks, shutdown_ranks
from infir2.train.losses import next_token_loss
from infir2.train.trainer import StepResult, Trainer

SHAPE: dict[str, Any] = {"architecture": "qwen2", "hidden_size": 192, "num_layers": 2}
SHAPE |= {"num_heads": 2, "num_kv_heads": 2, "head_dim": 128, "ffn_size": 256}
# Changes of the model's shape for layouts whose name contains the key.
VARIANTS: dict[str, dict[str, Any]] = {
    "recompute": {"recompute": "full", "blocks_per_gather": 2, "num_layers": 3},
    "gathered": {"reshard_after_forward": False, "blocks_per_gather": 2},
    "repeated": {"num_kv_heads": 1},
    "qwen3": {"architecture": "qwen3"},
    "pairs": {"num_heads": 4, "ffn_size": 512},
}
GATHERS = ("reshard_after_forward", "blocks_per_gather")  # arguments of ParallelModel
MICRO_BATCHES = [
    [200, 312],
    [512],
    [130, 250, 132],
    [300, 20, 192],
]  # lengths of the documents; chunks of 128 cut some of them
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:  # a thousand times slower
    SHAPE["num_layers"], MICRO_BATCHES = 1, [[100, 28], [128]]
COLLECTIVES = (
    "all_reduce",
    "all_reduce_coalesced",
    "all_gather_single",
    "reduce_scatter_single",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
)


def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(5)
    made = []
    for lengths in MICRO_BATCHES:
        token_ids = torch.randint(0, 61, (sum(lengths),), generator=generator)
        ends = torch.tensor(lengths).cumsum(0)
        mask = torch.rand(sum(lengths), generator=generator) < 0.8
        mask[ends - 1] = False
        positions = torch.cat([torch.arange(n) for n in lengths])
        cu = torch.cat([torch.zeros(1), ends]).int()
        made.append(Batch(token_ids, positions, torch.where(mask, token_ids.roll(-1), 0), mask, cu))
    return made


def make_model(kind: str, **other: Any) -> Decoder:
    recompute = other.pop("recompute", "none")
    other = {name: value for name, value in other.items() if name not in GATHERS}
    model = Decoder.from_shape(
        ShapeSection(**SHAPE | other),
        vocab_size=61,
        seed=3,
        compute_dtype=torch.bfloat16 if kind else torch.float32,
    )
    model.recompute = recompute
    return convert_to_fp8(model) if kind == "-fp8" else model


def one_step(
    model: Decoder, mine: list[Batch], parallel_model: ParallelModel | None
) -> tuple[StepResult, dict[str, Tensor], Trainer]:
    trainer = Trainer(model, OptimizerSection(clip_norm=0), 256, parallel_model)
    gradients: dict[str, Tensor] = {}

    def keep(*_: object) -> None:
        gradients.update(
            {name: local_tensor(p.grad).clone() for name, p in model.named_parameters()}
        )

    trainer.optimizer.register_step_pre_hook(keep)
    return trainer.step(mine, next_token_loss, 1e-3), gradients, trainer


def decibels(found: Tensor, wanted: Tensor) -> float:
    error = (found - wanted).square().sum()
    return math.inf if error == 0 else 10 * math.log10(wanted.square().sum() / error)


def spy_on_codes(model: Decoder) -> dict[str, Tensor]:
    """name -> the codes that the forward reads, filled in as it runs."""
    seen: dict[str, Tensor] = {}
    on_read(model, lambda name, fp8: seen.update({name: fp8.codes.view(torch.uint8).clone()}))
    return seen


def count_collectives() -> Counter[str]:
    counts: Counter[str] = Counter()
    for name in COLLECTIVES:
        if original := getattr(dist, name, None):

            def counted(
                *args: Any, _name: str = name, _original: Any = original, **kwargs: Any
            ) -> Any:
                counts[_name] += 1
                return _original(*args, **kwargs)

            setattr(dist, name, counted)
    return counts


def compare(ranks: Ranks, sizes: Sizes, kind: str, **other: Any) -> dict[str, Any]:
    reference = make_model(kind, **other)
    exported = weights_digest(exported_fp8_weights(reference))
    masters = weights_digest(exported_weights(reference))
    expected, wanted, _ = ranks.broadcast_from_rank0(
        lambda: (*one_step(reference, batches(), None)[:2], None)
    )
    model = make_model(kind, **other)
    codes = {
        name: layer.quantized_weight().codes.view(torch.uint8)
        for name, layer in make_model(kind, **other).named_modules()
        if isinstance(layer, Fp8Linear)
    }
    layout = Layout(sizes, ranks, torch.device("cpu"))
    gathers = {name: value for name, value in other.items() if name in GATHERS}
    untrained = ParallelModel(make_model(kind, **other), layout, **gathers)
    with torch.inference_mode():  # as an engine receives them
        same_export = weights_digest(untrained.exported()) == exported
        same_export &= weights_digest(untrained.exported(masters=True)) == masters
    parallel_model = ParallelModel(model, layout, **gathers)
    seen = spy_on_codes(model)
    counts = count_collectives()
    result, gradients, trainer = one_step(
        model, batches()[layout.data_rank :: sizes.num_data], parallel_model
    )
    first = dict(counts)
    quantized = {layer.quantizations for layer in model.modules() if isinstance(layer, Fp8Linear)}
    shard_specs = {
        name: tuple(
            slice(first, first + size)
            for first, size in zip(spec.offset, spec.local_shape, strict=True)
        )
        for name, spec in parallel_model.shard_specs.items()
    }
    named = [name for name in gradients if gradients[name].numel()]
    parts = [(gradients[name], wanted[name][shard_specs[name]]) for name in named]
    same = []
    for name, got in seen.items():
        split = parallel_model.tensor_shards.get(f"{name}.weight")
        whole = (
            codes[name] if split is None else codes[name].chunk(split.count, split.dim)[split.index]
        )
        same.append(torch.equal(got, whole))
    return {
        "loss": abs(result.loss - expected.loss),
        "norm": abs(result.gradient_norm / expected.gradient_norm - 1),
        "tokens": result.trained_tokens == expected.trained_tokens
        and result.tokens == expected.tokens,
        "gradient": max(
            ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item() for a, b in parts
        ),
        "decibels": decibels(
            torch.cat([a.flatten() for a, _ in parts]), torch.cat([b.flatten() for _, b in parts])
        ),
        "worst": min(decibels(a, b) for a, b in parts),
        "exported": same_export,
        "codes": len(same) == len(codes) and all(same),
        "quantized": sorted(quantized),
        "collectives": first,
        "validation": trainer.mean_loss(batches()[layout.data_rank :: sizes.num_data]),
    }


class Mark(torch.autograd.Function):
    """Identity; calls `note` when the backward reaches it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, note: Callable[[], None]) -> Tensor:
        ctx.note = note
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.note()
        return grad, None


def record(block: Any, number: int, events: list[str]) -> None:
    """Record when the block's weights are gathered, and when its forward and backward start."""
    local, attention, feed_forward = (
        local_tensor(block.self_attn.q_proj.weight),
        block.self_attn.forward,
        block.mlp.forward,
    )
    gather: Any = local.fsdp_pre_all_gather  # type: ignore[attr-defined]

    @wraps(gather)  # FSDP2 counts its arguments
    def gathering(*args: Any) -> Any:
        events.append(f"gather {number}")
        return gather(*args)

    def attending(*args: Any) -> Tensor:
        events.append(f"compute {number}")
        return attention(*args)

    local.fsdp_pre_all_gather = gathering  # type: ignore[attr-defined]
    block.self_attn.forward = attending
    block.mlp.forward = lambda *args: Mark.apply(
        feed_forward(*args), lambda: events.append(f"backward {number}")
    )


def order_of_gathers(ranks: Ranks, recompute: Any) -> list[str]:
    """Events of this rank in the second of two steps of three blocks, in their order."""
    model = make_model("-fp8", num_layers=3)
    model.recompute = recompute
    parallel_model = ParallelModel(model, Layout(Sizes(dp=ranks.size), ranks, torch.device("cpu")))
    events: list[str] = []
    for number, block in enumerate(model.model.layers):
        record(block, number, events)
    trainer = Trainer(model, OptimizerSection(), 256, parallel_model)
    for batch in batches()[:2]:
        events.clear()
        trainer.step([batch], next_token_loss, 1e-3)
    return events


class CountLaunches(TorchDispatchMode):
    """Counts the operations that would be kernels on a GPU."""

    num = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        self.num += not any(
            argument.alias_info and not argument.alias_info.is_write
            for argument in function._schema.arguments
        )
        return out


def launches_of_codes(ranks: Ranks) -> list[int]:
    """Number of operations that quantize 7, then 21 weights.

    Magnitudes and codes, each of which is one kernel for all weights on a GPU, are left out.
    """
    kernels, found = (fsdp.largest_magnitudes, fsdp.encode_weights), []
    fsdp.largest_magnitudes = fsdp.encode_weights = lambda *_: None
    for num_layers in (1, 3):
        model = make_model("-fp8", hidden_size=256, num_layers=num_layers)  # no padding of groups
        ParallelModel(model, Layout(Sizes(dp=ranks.size), ranks, torch.device("cpu")))
        local: Any = local_tensor(model.model.layers[0].mlp.up_proj.weight)
        with CountLaunches() as count:
            local.fsdp_pre_all_gather.payload()
        found.append(count.num)
    fsdp.largest_magnitudes, fsdp.encode_weights = kernels
    return found


def transformers_model(dtype: torch.dtype) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=192,
        intermediate_size=320,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=61,
    )
    torch.manual_seed(1)
    return convert_to_fp8(Qwen2ForCausalLM(config).to(dtype))


def shard_with_torch(root: Any, blocks: Any, mesh: Any) -> None:
    """torch's own FSDP2, which gathers FP32 masters."""
    from torch.distributed.fsdp import fully_shard

    for module in (*blocks, root):
        fully_shard(module, mesh=mesh)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone()


def transformers_steps(
    model: Any, adam: torch.optim.Optimizer, share: int, steps: int
) -> list[dict[str, Any]]:
    """Loss, hidden states and global gradient of each step.

    Also `stale`: layers whose forward read other codes than those of their master, and `read`: the
    number of FP8 layers.
    """
    token_ids = torch.arange(50)[None] % 61
    found = []
    for _ in range(steps):
        masters = {name: whole(parameter) for name, parameter in model.named_parameters()}
        seen = spy_on_codes(model)
        out = model(token_ids, labels=token_ids, output_hidden_states=True)
        stale = [
            name
            for name, codes in seen.items()
            if not torch.equal(
                codes, quantize_weight(masters[f"{name}.weight"], "pow2").codes.view(torch.uint8)
            )
        ]
        (out.loss / share).backward()
        gradient = torch.cat([whole(parameter.grad).flatten() for parameter in model.parameters()])
        adam.step()
        adam.zero_grad()
        found.append(
            {
                "loss": out.loss.item(),
                "hidden": out.hidden_states[-1].detach(),
                "gradient": gradient,
                "stale": stale,
                "read": len(seen),
            }
        )
    return found


def compare_transformers(
    ranks: Ranks, shard: Any, dtype: torch.dtype = torch.float32, **adam: bool
) -> dict[str, Any]:
    """Compare three steps of a sharded transformers model with FP8 layers to the unsharded one."""
    from torch.distributed.device_mesh import init_device_mesh

    plain, parallel_model = transformers_model(dtype).float(), transformers_model(dtype)
    shard(parallel_model, parallel_model.model.layers, init_device_mesh("cpu", (ranks.size,)))
    results = []
    for model, share in ((plain, 1), (parallel_model, ranks.size)):
        results.append(
            transformers_steps(
                model, torch.optim.AdamW(model.parameters(), lr=1e-2, **adam), share, steps=3
            )
        )
    return {
        "losses": [row["loss"] for row in results[0]],
        "loss": [abs(one["loss"] - two["loss"]) for one, two in zip(*results, strict=True)],
        "hidden": [
            decibels(two["hidden"], one["hidden"]) for one, two in zip(*results, strict=True)
        ],
        "gradient": [
            decibels(two["gradient"], one["gradient"]) for one, two in zip(*results, strict=True)
        ],
        "stale": [row["stale"] for rows in results for row in rows],
        "read": {row["read"] for rows in results for row in rows} == {14},
        "quantized": sorted(
            {
                layer.quantizations
                for layer in parallel_model.modules()
                if isinstance(layer, Fp8Linear)
            }
        ),
    }


def main() -> None:
    torch.set_num_threads(1)
    out, *words = sys.argv[1:]
    ranks = init_ranks(torch.device("cpu"), 60)
    if INTERPRETED:
        ops.runs_on_kernels = lambda x, dtype=None: (dtype or x.dtype) == torch.bfloat16
    found = {}
    for word in words:
        name, _, numbers = word.partition("=")
        sizes = Sizes(*(int(number) for number in numbers.split(",")))
        other: dict[str, Any] = next(
            (shape for part, shape in VARIANTS.items() if part in name), {}
        )
        kinds = ["", "-fp8", "-bf16"] if name in ("fsdp", "tp", "cp") else ["", "-fp8"]
        if INTERPRETED:
            kinds = ["-fp8"] if name == "tp" else ["-fp8", "-bf16"]
        for kind in kinds:
            found[name + kind] = ranks.all_gather(compare(ranks, sizes, kind, **other))
    if ranks.size == 2 and not INTERPRETED:
        found["order"] = ranks.all_gather(
            {recompute: order_of_gathers(ranks, recompute) for recompute in ("none", "full")}
        )
        found["launches"] = ranks.all_gather(launches_of_codes(ranks))
        found["transformers"] = ranks.all_gather(
            compare_transformers(ranks, shard_module, fused=True)
        )
        found["transformers-bf16"] = ranks.all_gather(
            compare_transformers(ranks, shard_module, torch.bfloat16)
        )
        found["transformers-fully_shard"] = ranks.all_gather(
            compare_transformers(ranks, shard_with_torch, foreach=True)
        )
    if ranks.is_rank0:
        with open(out, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)
    shutdown_ranks()


if __name__ == "__main__":
    main()
