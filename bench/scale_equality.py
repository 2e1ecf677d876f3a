"""Whether several GPUs compute what one does: losses, gradients and the bytes of FP8 codes."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from read_codes import on_read
from scale_bench import Bench, Report, batch_of, case_of, tokens
from step import build
from step_cases import Case
from torch import Tensor

from infir2.model import Decoder
from infir2.numerics import Fp8Linear, Fp8Tensor
from infir2.numerics.weight_cache import local_tensor
from infir2.parallel.mesh import Sizes
from infir2.parallel.parallel_model import ParallelModel
from infir2.train.losses import next_token_loss
from infir2.train.trainer import Trainer

GRADIENT = "decibels of the first gradient"


def digest(*tensors: Tensor) -> str:
    """SHA-256 of the tensors' bytes."""
    sha = hashlib.sha256()
    for x in tensors:  # a copy: numpy would pin memory that FSDP2 has to free
        sha.update(x.contiguous().view(torch.uint8).cpu().clone().numpy().tobytes())
    return sha.hexdigest()


def record_codes(model: Decoder) -> dict[str, str]:
    """name -> digest of the codes and scales that the first forward reads; filled as it runs."""
    seen: dict[str, str] = {}

    def note(name: str, fp8: Fp8Tensor) -> None:
        if name not in seen:
            seen[name] = digest(fp8.codes, fp8.scale)

    on_read(model, note)
    return seen


def expected_codes(bench: Bench, case: Case, parallel_model: ParallelModel) -> dict[str, str]:
    """The digests of a single process's weights, split as tensor parallelism splits them."""
    torch.manual_seed(0)
    digests = {}
    for name, layer in build(case, str(bench.device)).named_modules():
        if isinstance(layer, Fp8Linear):
            fp8, split = (
                layer.quantized_weight(),
                parallel_model.tensor_shards.get(f"{name}.weight"),
            )
            parts = (fp8.codes.view(torch.uint8), fp8.scale)
            digests[name] = digest(
                *(
                    parts
                    if split is None
                    else (x.chunk(split.count, split.dim)[split.index] for x in parts)
                )
            )
    return digests


def losses(trainer: Trainer, case: Case, job: Report, micro_batches: slice) -> list[float]:
    """Losses of `steps` steps; `micro_batches` selects those that this rank reads."""
    values = []
    for step in range(job["steps"]):
        numbers = range(step * job["micro_batches"], (step + 1) * job["micro_batches"])[
            micro_batches
        ]
        batches = [
            batch_of(tokens(case, number, job.get("text", "")), case.length) for number in numbers
        ]
        values.append(trainer.step(batches, next_token_loss, 1e-3).loss)
    return values


def first_gradients(trainer: Trainer) -> dict[str, Tensor]:
    """name -> this rank's shard of the first step's gradient; filled as it runs."""
    seen: dict[str, Tensor] = {}

    def keep(*_: object) -> None:
        if not seen:
            seen.update(
                {
                    name: local_tensor(p.grad).clone()
                    for name, p in trainer.model.named_parameters()
                    if p.grad is not None
                }
            )

    trainer.optimizer.register_step_pre_hook(keep)
    return seen


def decibels(
    pairs: Iterable[tuple[Tensor, Tensor]], gather: Callable[[Any], list[Any]] = lambda sums: [sums]
) -> float:
    """Signal-to-error ratio of (actual, expected) pairs of all ranks as one vector.

    Equal pairs give 300 dB.
    """
    error, total = 0.0, 0.0
    for actual, expected in pairs:
        error += float((actual - expected).double().square().sum())
        total += float(expected.double().square().sum())
    errors, totals = zip(*gather((error, total)), strict=True)
    return 10 * math.log10(sum(totals) / max(sum(errors), 1e-30 * sum(totals)))


def gradient_pairs(
    parallel_model: ParallelModel, shards: dict[str, Tensor], full: dict[str, Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """(this rank's shard, the same part of the full gradient) of every parameter."""
    for name, spec in parallel_model.shard_specs.items():
        ranges = tuple(
            slice(first, first + size)
            for first, size in zip(spec.offset, spec.local_shape, strict=True)
        )
        yield shards[name], full[name][ranges]


def equality(bench: Bench) -> None:
    """Compare every layout with a single process: losses, first gradient, gathered FP8 codes."""
    for fp8 in (True, False):
        case, job = case_of(bench.job, fp8), bench.job
        name = "FP8" if fp8 else "BF16"
        # Every rank trains the full model at the same time, so no rank waits into a timeout.
        trainer = bench.trainer(case, None)
        full = first_gradients(trainer)
        single_process = losses(trainer, case, job, slice(None))
        del trainer
        bench.record(f"{name} single process", single_process)
        # A repetition shows how far a GPU's summation order alone differs.
        trainer = bench.trainer(case, None)
        again = first_gradients(trainer)
        repeated = losses(trainer, case, job, slice(None))
        row = {
            "losses": repeated,
            "largest difference": max(
                abs(a - b) for a, b in zip(repeated, single_process, strict=True)
            ),
        }
        bench.record(
            f"{name} single process, repeated",
            row | {GRADIENT: decibels((again[key], full[key]) for key in full)},
        )
        del trainer, again
        for layout, numbers in job["layouts"].items():
            sizes = Sizes(*numbers)
            trainer = bench.trainer(case, sizes)
            expected = expected_codes(bench, case, trainer.parallel_model) if fp8 else {}
            codes, shards = record_codes(trainer.model), first_gradients(trainer)
            layout_losses = losses(
                trainer,
                case,
                job,
                slice(trainer.parallel_model.layout.data_rank, None, sizes.num_data),
            )
            row = {
                "losses": layout_losses,
                "largest difference": max(
                    abs(a - b) for a, b in zip(layout_losses, single_process, strict=True)
                ),
            }
            row[GRADIENT] = decibels(
                gradient_pairs(trainer.parallel_model, shards, full), bench.ranks.all_gather
            )
            if fp8:
                row["bytes equal on all ranks"] = all(
                    bench.ranks.all_gather(bool(codes) and codes == expected)
                )
            bench.record(f"{name} {layout}", row)
            del trainer
