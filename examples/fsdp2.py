"""FP8 with FSDP2: convert, then shard, then build the optimizer.

torchrun --nproc-per-node 2 examples/fsdp2.py                                 # CPUs, gloo
torchrun --nproc-per-node 8 examples/fsdp2.py --size 1.5b --batch 8 --length 2048  # GPUs, NCCL

A layer's codes are those of its BF16-rounded master, so a gather in BF16 loses nothing.
--gather fp8 gathers codes, half the bytes, by infir2's extension of FSDP2 instead.
"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from material import DEVICE, Report, build_model, options, random_windows, read_text
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from infir2 import convert_to_fp8
from infir2.parallel.fsdp import shard_module


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--gather", choices=("bf16", "fp8"), default="bf16")
    args = parser.parse_args()
    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(DEVICE, (size,))

    model = build_model(args.model, args.size).to(DEVICE)  # the same FP32 masters on every rank
    if not args.bf16:
        convert_to_fp8(model)
    if args.gather == "fp8":  # its gradients are sums over the ranks
        shard_module(model, model.model.layers, mesh)
    else:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, fused=DEVICE == "cuda")

    generator = torch.Generator().manual_seed(rank)  # every rank has its own batches
    report = Report(args.steps, size * args.batch * args.length, quiet=rank != 0)
    text = read_text(args.text)
    for _ in range(args.steps):
        ids = random_windows(text, args.batch, args.length + 1, generator)
        with torch.autocast(DEVICE, torch.bfloat16):
            logits = model(ids[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        (loss / size if args.gather == "fp8" else loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        report.step(loss.item())  # of this rank's batch
    report.end(model)
    if args.save:
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(model, options=whole)
        if rank == 0:
            torch.save(state, args.save)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
