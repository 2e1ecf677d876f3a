"""Losses of a model sharded by FSDP2 over one NCCL rank and of the same model unsharded, as JSON.

    one_gpu.py OUT.json

test_gpu_parallel.py runs it.
"""

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from infir2.checkpoint import Store, open_checkpoint
from infir2.config.schema import OptimizerSection, ShapeSection
from infir2.data import Batch
from infir2.model import Decoder
from infir2.numerics import Fp8Linear, convert_to_fp8
from infir2.parallel.context import ContextParallel
from infir2.parallel.mesh import Layout, Sizes
from infir2.parallel.parallel_model import ParallelModel
from infir2.parallel.ranks import Ranks
from infir2.parallel.tensor import parallelize_blocks, shard_layers
from infir2.train.losses import next_token_loss
from infir2.train.optimizer import make_optimizer
from infir2.train.trainer import Trainer

SHAPE = {
    "hidden_size": 512,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 128,
    "ffn_size": 1280,
    "vocab_size": 512,
}
STEPS = 5


def batch(number: int) -> Batch:
    ids = torch.randint(0, 512, (640,), generator=torch.Generator().manual_seed(number))
    positions = torch.cat([torch.arange(400), torch.arange(240)])
    mask = torch.ones(640, dtype=torch.bool)
    mask[[399, 639]] = False
    return Batch(
        ids,
        positions,
        torch.where(mask, ids.roll(-1), 0),
        mask,
        torch.tensor([0, 400, 640], dtype=torch.int32),
    )


def make(fp8: bool, sharded: bool) -> Trainer:
    model = Decoder.from_shape(ShapeSection(**SHAPE), vocab_size=512, seed=3, device="cuda")
    model = convert_to_fp8(model) if fp8 else model
    layout = Layout(Sizes(), Ranks(), torch.device("cuda"))
    if sharded:
        layout.shard_mesh = init_device_mesh("cuda", (1,))
    return Trainer(model, OptimizerSection(), 256, ParallelModel(model, layout))


def steps(trainer: Trainer, first: int, last: int) -> list[float]:
    return [
        trainer.step([batch(2 * i), batch(2 * i + 1)], next_token_loss, 1e-3).loss
        for i in range(first, last)
    ]


def gathered_codes(trainer: Trainer) -> dict[str, Tensor]:
    """name -> FP8 codes that a forward reads."""
    codes: dict[str, Tensor] = {}
    for name, layer in trainer.model.named_modules():
        if isinstance(layer, Fp8Linear):

            def read(name: str = name, layer: Fp8Linear = layer) -> Any:
                fp8 = Fp8Linear.quantized_weight(layer)
                codes[name] = fp8.codes.view(torch.uint8).clone()
                return fp8

            layer.quantized_weight = read  # type: ignore[method-assign]
    trainer.mean_loss([batch(0)])
    return codes


def host_synchronizations(trainer: Trainer) -> int:
    """How often the host waits for the GPU during a step."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps(trainer, STEPS, STEPS + 1)
    torch.cuda.set_sync_debug_mode("default")
    return sum(
        "called a synchronizing CUDA operation" in str(warning.message) for warning in caught
    )


def make_split(fp8: bool, kind: str) -> Trainer:
    """A model whose tensor- or context-parallel group is this one rank."""
    trainer = make(fp8, False)
    parallel_model, layout = trainer.parallel_model, trainer.parallel_model.layout
    group, context = init_device_mesh("cuda", (1,)).get_group(), None
    if kind == "tp":
        layout.tp_group = group
        parallel_model.tensor_shards = shard_layers(trainer.model, layout)
    else:
        layout.cp_group = group
        context = parallel_model._context_parallel = ContextParallel(
            layout, trainer.model.plan_attention
        )
    parallelize_blocks(trainer.model, layout, parallel_model.tensor_shards, context)
    # Splitting replaced parameters, so the optimizer is built again.
    trainer.optimizer = make_optimizer(trainer.model, OptimizerSection())
    return trainer


def compare(fp8: bool) -> dict[str, Any]:
    unsharded, sharded = make(fp8, False), make(fp8, True)
    codes = [gathered_codes(trainer) for trainer in (unsharded, sharded)]
    result: dict[str, Any] = {
        "codes_equal": codes[0].keys() == codes[1].keys()
        and all(torch.equal(codes[0][k], codes[1][k]) for k in codes[0])
    }
    result["weights"] = len(codes[1])
    result["unsharded"], result["sharded"] = steps(unsharded, 0, STEPS), steps(sharded, 0, 3)
    resumed = make(fp8, True)
    with tempfile.TemporaryDirectory() as directory:
        store = Store(Path(directory), keep=1)
        store.save(3, sharded.tensors(), {"step": 3})
        resumed.load_tensors(open_checkpoint(directory).tensors())
        store.close()
    result["resumed"], continued = steps(resumed, 3, STEPS), steps(sharded, 3, STEPS)
    result["sharded"] += continued
    result["synchronizations"] = {"dp": host_synchronizations(sharded)}
    for kind in ("tp", "cp"):
        split = make_split(fp8, kind)
        result[kind] = steps(split, 0, STEPS)
        result["synchronizations"][kind] = host_synchronizations(split)
    return result


def main() -> None:
    torch.cuda.set_device(0)
    store = dist.HashStore()
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
    results = {name: compare(fp8) for name, fp8 in (("fp8", True), ("bf16", False))}
    Path(sys.argv[1]).write_text(json.dumps(results, indent=1), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
