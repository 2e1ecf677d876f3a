"""The layouts that a job can have, and the one that it should."""

from collections.abc import Iterator
from dataclasses import replace
from typing import get_args

from infir2.config.schema import RlRecipe
from infir2.errors import ConfigError
from infir2.parallel.mesh import Sizes, tp_problem
from infir2.planner.estimate import Estimate, Job, Recompute, estimate, with_fp8
from infir2.train.plan import check_graphs, needs_one_process

_CLOSE = 1.02  # times the shortest step: then the simpler layout is the better one


def candidates(job: Job) -> Iterator[Sizes]:
    """Every layout of the job's GPUs in which each rank has rows of its own to train."""
    if job.world > 1 and needs_one_process(job.recipe.optimizer):
        return
    for tp in (1, 2, 4, 8):
        if tp > job.gpus or tp_problem(job.config, tp, job.recipe.fp8.enabled):
            continue
        for cp in (1, 2, 4, 8):
            rest, left = divmod(job.world, tp * cp)
            if left or not rest or tp * cp > job.gpus:
                continue
            whole = job.world if tp * cp == 1 else 1
            for replicas in sorted({1, job.nodes, whole}):
                sizes = Sizes(replicas, rest // replicas, cp, tp)
                if sizes.world == job.world and rest <= job.rows and _may_run(job, sizes):
                    yield sizes


def _may_run(job: Job, sizes: Sizes) -> bool:
    try:
        check_graphs(job.recipe, sizes)
    except ConfigError:
        return False
    return True


def best(job: Job) -> tuple[Estimate | None, list[Estimate]]:
    """The recommended layout (None if none fits), and all, the shortest step first."""
    kinds: tuple[Recompute, ...] = get_args(Recompute)
    found = [estimate(job, sizes, kind) for sizes in candidates(job) for kind in kinds]
    found.sort(key=lambda each: each.total_seconds)
    fitting = [each for each in found if each.fits(job.gpu)]
    if not fitting:
        return None, found
    limit = _CLOSE * fitting[0].total_seconds
    close = [each for each in fitting if each.total_seconds <= limit]
    return min(close, key=lambda each: (_complexity(each), each.total_seconds)), found


def _complexity(each: Estimate) -> int:
    return sum(size > 1 for size in (each.sizes.tp, each.sizes.cp, each.sizes.dp_replicate))


def reasons(job: Job, written: Estimate, chosen: Estimate, found: list[Estimate]) -> list[str]:
    """What the chosen layout saves, what does not fit, and what the nearest others cost."""
    said = []
    saved = {n: s - chosen.seconds.get(n, 0.0) for n, s in written.seconds.items()}
    parts = [f"{s:.2f} s of {name}" for name, s in sorted(saved.items(), key=_largest) if s > 0.01]
    if chosen.sizes != written.sizes or chosen.recompute != written.recompute:
        said += [f"it saves {', '.join(parts)}"] if parts and written.fits(job.gpu) else []
    for kind in ("none", "selective"):
        same = [e for e in found if e.recompute == kind and e.sizes == chosen.sizes]
        if chosen.recompute != kind and same and not same[0].fits(job.gpu):
            said.append(f"model.recompute = {kind!r} would need {same[0].gib:.0f} GiB there")
    for axis in ("tp", "cp", "dp_replicate"):
        others = [e for e in found if getattr(e.sizes, axis) > getattr(chosen.sizes, axis)]
        if others and getattr(chosen.sizes, axis) == 1:
            nearest = next((e for e in others if e.fits(job.gpu)), others[0])
            change = nearest.total_seconds / chosen.total_seconds - 1
            fits = "" if nearest.fits(job.gpu) else " and would not fit"
            size = getattr(nearest.sizes, axis)
            said.append(f"{axis} {size} changes the step by {change:+.0%}{fits}")
    return said


def _largest(item: tuple[str, float]) -> float:
    return -item[1]


def fp8_gain(job: Job, sizes: Sizes) -> tuple[float, int]:
    """(BF16's step over FP8's, tokens of a pass from which FP8 is faster; 0 for never).

    The second is of one pass a step, of one row, which the weights' codes and gathers weigh on.
    """
    ratio = _ratio(job, sizes)
    if isinstance(job.recipe, RlRecipe):  # a pass is as long as its responses
        return ratio, 0
    for tokens in (2**power for power in range(8, 18)):
        batch = {"batch_sequences": sizes.num_data, "batch_samples": 0}
        lengths = {"micro_batch_tokens": tokens, "sequence_tokens": tokens}
        data = job.recipe.data.model_copy(update=batch | lengths)
        recipe = job.recipe.model_copy(update={"data": data})
        if _ratio(replace(job, recipe=recipe, row_tokens=tokens), sizes) > 1:
            return ratio, tokens
    return ratio, 0


def _ratio(job: Job, sizes: Sizes) -> float:
    bf16, fp8 = (estimate(with_fp8(job, enabled), sizes) for enabled in (False, True))
    return bf16.total_seconds / fp8.total_seconds
