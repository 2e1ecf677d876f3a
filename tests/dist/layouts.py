"""Run by torchrun: one training step of several layouts against the same step in one process. Writes what differs as JSON.

torchrun --nproc_per_node 2 layouts.py OUT.json fsdp=1,2,1,1 tp=1,1,1,2 ...      (dp_replicate, dp, cp, tp)

With TRITON_INTERPRET=1 the operations of a GPU do the work, in Triton's interpreter, instead of their definitions.
"""

import json
import math
import os
import sys
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from infir2.config.schema import Fp8Section, OptimizerSection, ShapeSection
from infir2.data import Batch
from infir2.model import Decoder
from infir2.model.hf import exported_fp8_weights, weights_digest
from infir2.numerics import Fp8Linear, convert_to_fp8, fused
from infir2.parallel.fsdp import local_tensor, shard_module, weights_changed
from infir2.parallel.mesh import Layout, Sizes
from infir2.parallel.sharded import Sharded
from infir2.parallel.team import Team, end_team, start_team
from infir2.train.losses import next_token_loss
from infir2.train.trainer import StepResult, Trainer

SHAPE = {"architecture": "qwen2", "hidden_size": 192, "num_layers": 2, "num_heads": 2, "head_dim": 128, "ffn_size": 256}
MICRO_BATCHES = [[200, 312], [512], [130, 250, 132], [300, 20, 192]]  # lengths of the documents; chunks of 128 cut some of them
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:  # a thousand times slower
    SHAPE["num_layers"], MICRO_BATCHES = 1, [[100, 28], [128]]
COLLECTIVES = ("all_reduce", "all_gather_single", "reduce_scatter_single", "all_gather_into_tensor", "reduce_scatter_tensor")


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


def make_model(kind: str, kv_heads: int) -> Decoder:
    shape = ShapeSection(**SHAPE, num_kv_heads=kv_heads)
    model = Decoder.from_shape(shape, vocab_size=61, seed=3, compute_dtype=torch.bfloat16 if kind else torch.float32)
    return convert_to_fp8(model, Fp8Section(enabled=kind == "-fp8"))


def one_step(model: Decoder, mine: list[Batch], sharded: Sharded | None) -> tuple[StepResult, dict[str, Tensor], Trainer]:
    trainer = Trainer(model, OptimizerSection(clip_norm=0), 256, sharded)
    gradients: dict[str, Tensor] = {}

    def keep(*_: object) -> None:
        gradients.update({name: local_tensor(p.grad).clone() for name, p in model.named_parameters()})

    trainer.optimizer.register_step_pre_hook(keep)
    return trainer.step(mine, next_token_loss, 1e-3), gradients, trainer


def decibels(found: Tensor, wanted: Tensor) -> float:
    error = (found - wanted).square().sum()
    return math.inf if error == 0 else 10 * math.log10(wanted.square().sum() / error)


def spy_on_codes(model: Decoder) -> dict[str, Tensor]:
    """name -> the codes that the forward reads, filled in as it runs."""
    seen: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Fp8Linear):

            def read(name: str = name, layer: Fp8Linear = layer) -> Any:
                codes = Fp8Linear.quantized_weight(layer)
                seen[name] = codes.codes.view(torch.uint8).clone()
                return codes

            layer.quantized_weight = read  # type: ignore[method-assign]
    return seen


def count_collectives() -> Counter[str]:
    counts: Counter[str] = Counter()
    for name in COLLECTIVES:
        if original := getattr(dist, name, None):

            def counted(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
                counts[_name] += 1
                return _original(*args, **kwargs)

            setattr(dist, name, counted)
    return counts


def compare(team: Team, sizes: Sizes, kind: str, kv_heads: int) -> dict[str, Any]:
    reference = make_model(kind, kv_heads)
    exported = weights_digest(exported_fp8_weights(reference))
    expected, wanted, _ = team.first(lambda: (*one_step(reference, batches(), None)[:2], None))
    model = make_model(kind, kv_heads)
    codes = {
        name: layer.quantized_weight().codes.view(torch.uint8)
        for name, layer in make_model(kind, kv_heads).named_modules()
        if isinstance(layer, Fp8Linear)
    }
    layout = Layout(sizes, team, torch.device("cpu"))
    untrained = Sharded(make_model(kind, kv_heads), layout)
    with torch.inference_mode():  # as an engine that takes them
        same_export = weights_digest(untrained.exported()) == exported
    sharded = Sharded(model, layout)
    seen = spy_on_codes(model)
    counts = count_collectives()
    result, gradients, trainer = one_step(model, batches()[layout.data_rank :: sizes.num_data], sharded)
    first = dict(counts)
    quantised = {layer.quantizations for layer in model.modules() if isinstance(layer, Fp8Linear)}
    places = {
        name: tuple(slice(first, first + size) for first, size in zip(place.offset, place.size, strict=True))
        for name, place in sharded.places.items()
    }
    named = [name for name in gradients if gradients[name].numel()]
    parts = [(gradients[name], wanted[name][places[name]]) for name in named]
    same = []
    for name, got in seen.items():
        split = sharded.splits.get(f"{name}.weight")
        whole = codes[name] if split is None else codes[name].chunk(split.count, split.dim)[split.index]
        same.append(torch.equal(got, whole))
    return {
        "loss": abs(result.loss - expected.loss),
        "norm": abs(result.gradient_norm / expected.gradient_norm - 1),
        "tokens": result.trained_tokens == expected.trained_tokens and result.tokens == expected.tokens,
        "gradient": max(((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item() for a, b in parts),
        "decibels": decibels(torch.cat([a.flatten() for a, _ in parts]), torch.cat([b.flatten() for _, b in parts])),
        "worst": min(decibels(a, b) for a, b in parts),
        "exported": same_export,
        "codes": len(same) == len(codes) and all(same),
        "quantised": sorted(quantised),
        "collectives": first,
        "validation": trainer.mean_loss(batches()[layout.data_rank :: sizes.num_data]),
    }


def compare_transformers(team: Team) -> dict[str, Any]:
    """FSDP2 of a module of another library with FP8 layers: the same hidden states and gradients, in place."""
    from torch.distributed.device_mesh import init_device_mesh
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=192, intermediate_size=320, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=61
    )
    token_ids = torch.arange(50)[None] % 61
    models: list[Any] = []
    for _ in range(2):
        torch.manual_seed(1)
        models.append(convert_to_fp8(Qwen2ForCausalLM(config), Fp8Section()))
    plain, sharded = models
    shard_module(sharded, sharded.model.layers, init_device_mesh("cpu", (team.size,)))
    optimizer = torch.optim.AdamW(sharded.parameters(), lr=1e-2, fused=True)
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2, fused=True)
    losses = []
    for _ in range(2):
        for model, adam in ((sharded, optimizer), (plain, reference)):
            loss = model(token_ids, labels=token_ids).loss / (team.size if model is sharded else 1)
            loss.backward()
            adam.step()
            adam.zero_grad()
            weights_changed(model)
            losses.append(loss.item() * (team.size if model is sharded else 1))
    layers = [layer for layer in sharded.modules() if isinstance(layer, Fp8Linear)]
    return {"losses": losses, "quantised": sorted({layer.quantizations for layer in layers})}


def main() -> None:
    torch.set_num_threads(1)
    out, *words = sys.argv[1:]
    team = start_team(torch.device("cpu"), 60)
    if INTERPRETED:
        fused.serves = lambda x: x.dtype == torch.bfloat16
    found = {}
    for word in words:
        name, _, numbers = word.partition("=")
        sizes = Sizes(*(int(number) for number in numbers.split(",")))
        for kind in ("-fp8", "-bf16") if INTERPRETED else ("", "-fp8", *(("-bf16",) if name in ("fsdp", "tp", "cp") else ())):
            found[name + kind] = team.gather(compare(team, sizes, kind, kv_heads=1 if name.endswith("-repeated") else 2))
    if team.size == 2 and not INTERPRETED:
        found["transformers"] = team.gather(compare_transformers(team))
    if team.is_first:
        with open(out, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)
    end_team()


if __name__ == "__main__":
    main()
