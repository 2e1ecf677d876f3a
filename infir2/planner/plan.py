"""The plan of a run: the recipe as written, what fits better, and how sure that is."""

from dataclasses import asdict, dataclass, field
from math import ceil
from typing import Any

from infir2.config.schema import RlRecipe, RolloutSection, TrainRecipe
from infir2.data.sources import Source
from infir2.engines.server_room import crowding
from infir2.errors import ConfigError, UserError
from infir2.model.memory import GIB
from infir2.parallel.mesh import Sizes, check_model, plan_sizes
from infir2.planner.estimate import Estimate, Job, estimate
from infir2.planner.gpus import Gpu, find_gpu, package_json
from infir2.planner.layouts import best, fp8_gain, reasons
from infir2.planner.model import mean_tokens, shape_of
from infir2.train.plan import check_graphs, check_observer, check_optimizer

MEASURED, MEASURED_GPUS = ("h100", "h200"), 2  # of one node; more were never measured


@dataclass(frozen=True)
class Plan:
    """What `infir2 plan` prints. `steps` is 0 where the recipe leaves it to data not here."""

    job: Job
    written: Estimate
    chosen: Estimate | None
    why: list[str]
    steps: int
    fp8_ratio: float = 0.0
    fp8_from_tokens: int = 0
    notes: list[str] = field(default_factory=list)

    def certainty(self) -> tuple[str, str]:
        """(high, medium or low; why)."""
        fit = package_json("constants.json")
        errors = fit["largest_error"]
        base = (
            f"{fit['rows']} measured steps are met within {errors['fitted']:.0%}, "
            f"{errors['held_out']:.0%} by fits without them, their memory within "
            f"{errors['memory']:.0%}"
        )
        if self.job.nodes > 1:
            return "low", f"{base}; no step over several nodes was measured: take +-40 %"
        if isinstance(self.job.recipe, RlRecipe):
            return "low", f"{base}; sampling rests on one measured model: take +-50 %"
        if "never" in self.job.gpu.origin:
            return "low", f"{base}; {self.job.gpu.name} was not: take +-30 %"
        if self.job.gpu not in map(find_gpu, MEASURED):
            return "medium", f"{base}; those were not on this GPU: take +-30 %"
        sizes = (self.chosen or self.written).sizes
        if self.job.world > MEASURED_GPUS or sizes.tp * sizes.cp * sizes.dp_replicate > 1:
            return "medium", f"{base}; on two GPUs at most, sharded weights only: take +-25 %"
        return "high", base


def make_plan(recipe: TrainRecipe, gpu: Gpu, gpus: int, nodes: int, sample_tokens: int = 0) -> Plan:
    """Plan a recipe on `nodes` x `gpus` GPUs.

    Args:
        recipe: of cpt, sft or rl.
        gpu: its rates.
        gpus: of one node.
        nodes: of the job.
        sample_tokens: mean tokens of a row; 0 to read the data, or to assume.

    Raises:
        ConfigError: the layout does not fit the GPUs or the model; the model is not known.
    """
    config, note = shape_of(recipe.model)
    sizes = plan_sizes(recipe.parallel, gpus * nodes)
    check_optimizer(recipe, sizes)
    check_graphs(recipe, sizes)
    check_observer(recipe, sizes)
    check_model(sizes, config, recipe.fp8.enabled)
    crowded = _crowded(recipe.rollout, gpus, nodes) if isinstance(recipe, RlRecipe) else ""
    row_tokens, assumption = mean_tokens(recipe, sample_tokens)
    job = Job(config, recipe, gpu, gpus, nodes, row_tokens)
    written = estimate(job, sizes)
    chosen, found = best(job)
    if chosen and written.fits(gpu) and chosen.total_seconds > 0.98 * written.total_seconds:
        chosen = written  # not worth a change
    ratio, tokens = _fp8(job, sizes)
    return Plan(
        job=job,
        written=written,
        chosen=chosen,
        why=reasons(job, written, chosen, found) if chosen else [],
        steps=_steps(recipe, job),
        fp8_ratio=ratio,
        fp8_from_tokens=tokens,
        notes=[text for text in (note, assumption, crowded) if text],
    )


def _crowded(rollout: RolloutSection, gpus: int, nodes: int) -> str:
    """What has to be said of the servers' room; empty if they fit the first node."""
    if not crowding(rollout, gpus):
        return ""
    spread = f"its {rollout.engines} servers are spread over the nodes by infir2 launch ray"
    return crowding(rollout, gpus, nodes) or f"{spread}; any other launcher is refused"


def _fp8(job: Job, sizes: Sizes) -> tuple[float, int]:
    try:
        return fp8_gain(job, sizes)
    except ConfigError:  # a GPU without FP8
        return 0.0, 0


def _steps(recipe: TrainRecipe, job: Job) -> int:
    """Optimizer steps of the run; 0 if they follow from data that is not here.

    Only samples can be counted in epochs, as in `Loader.steps_per_epoch`.
    """
    if recipe.schedule.total_steps:
        steps = recipe.schedule.total_steps
        return min(steps, recipe.train.stop_after_step or steps)
    samples = 0 if isinstance(recipe, RlRecipe) else recipe.data.batch_samples
    if not samples:
        return 0
    return ceil(recipe.train.epochs * ceil(_num_rows(recipe) / samples))


def _num_rows(recipe: TrainRecipe) -> int:
    try:
        return sum(len(Source(section.path)) for section in recipe.data.sources)
    except UserError:
        return 0


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain data: bytes, seconds, GPU-hours."""
    level, reason = plan.certainty()
    return {
        "gpu": plan.job.gpu.name,
        "gpus": plan.job.world,
        "nodes": plan.job.nodes,
        "written": _estimate_json(plan, plan.written),
        "recommended": _estimate_json(plan, plan.chosen) if plan.chosen else None,
        "why": plan.why,
        "steps": plan.steps,
        "fp8_speedup": round(plan.fp8_ratio, 3),
        "fp8_faster_from_tokens": plan.fp8_from_tokens,
        "certainty": level,
        "certainty_reason": reason,
        "assumptions": plan.notes,
    }


def _estimate_json(plan: Plan, each: Estimate) -> dict[str, Any]:
    return {
        "parallel": {
            name: getattr(each.sizes, name) for name in ("dp_replicate", "dp", "cp", "tp")
        },
        "recompute": each.recompute,
        "micro_batches": each.micro_batches,
        "fits": each.fits(plan.job.gpu),
        "memory_bytes": each.memory,
        "peak_gib": round(each.gib, 2),
        "step_seconds": round(each.total_seconds, 4),
        "seconds": {name: round(value, 4) for name, value in each.seconds.items()},
        "tokens_per_second": round(plan.job.step_tokens / each.total_seconds, 1),
        "days": round(plan.steps * each.total_seconds / 86400, 3),
        "gpu_hours": round(plan.steps * each.total_seconds * plan.job.world / 3600, 1),
    }


def as_text(plan: Plan) -> str:
    """The plan in lines for a terminal."""
    job = plan.job
    nodes = f" ({job.nodes} nodes of {job.gpus})" if job.nodes > 1 else ""
    precision = "FP8" if job.recipe.fp8.enabled else "BF16"
    billions = job.config.num_parameters / 1e9
    lines = [f"{billions:.2f} B parameters in {precision} on {job.world} x {job.gpu.name}{nodes}"]
    lines += ["", "as the recipe is written:", *_estimate_lines(plan, plan.written)]
    if plan.chosen is None:
        lines += ["", "no layout of these GPUs fits; " + _remedy(plan)]
    elif plan.chosen is not plan.written:
        lines += ["", f"recommended: {keys_of(plan)}", *_estimate_lines(plan, plan.chosen)]
    else:
        lines += ["", "recommended: as it is written"]
    lines += [f"  because         {reason}" for reason in plan.why if plan.chosen]
    if plan.fp8_ratio:
        lines += ["", f"FP8 against BF16  {_fp8_words(plan)}"]
    level, reason = plan.certainty()
    lines += [f"how sure          {level}: {reason}"]
    return "\n".join([*lines, *(f"assumed           {note}" for note in plan.notes)])


def keys_of(plan: Plan) -> str:
    """The options that make the recipe the recommended one."""
    assert plan.chosen is not None
    pairs = [(f"parallel.{n}", getattr(plan.chosen.sizes, n)) for n in ("dp_replicate", "cp", "tp")]
    section = plan.job.recipe.parallel
    changed = [f"--{k}={v}" for k, v in pairs if v != getattr(section, k.partition(".")[2])]
    if section.dp not in (-1, plan.chosen.sizes.dp):
        changed.append("--parallel.dp=-1")
    if plan.chosen.recompute != plan.job.recipe.model.recompute:
        changed.append(f"--model.recompute={plan.chosen.recompute}")
    return " ".join(changed) or "as it is written"


def _estimate_lines(plan: Plan, each: Estimate) -> list[str]:
    gpu, tokens = plan.job.gpu, plan.job.step_tokens
    verdict = "fits" if each.fits(gpu) else "DOES NOT FIT"
    sizes = ", ".join(f"{name} {size}" for name, size in asdict(each.sizes).items() if size > 1)
    memory = ", ".join(f"{name} {size / GIB:.1f}" for name, size in each.memory.items() if size)
    parts = sorted(each.seconds.items(), key=lambda item: -item[1])
    seconds = ", ".join(f"{name} {value:.2f}" for name, value in parts if value >= 0.005)
    rate = tokens / each.total_seconds
    lines = [
        f"  layout          {sizes or 'one GPU'}; {each.micro_batches} passes a step and GPU; "
        f"model.recompute = {each.recompute!r}",
        f"  memory a GPU    {each.gib:.1f} of {gpu.memory_gib:.1f} GiB, {verdict}: {memory}",
        f"  step            {each.total_seconds:.2f} s for {tokens:,.0f} tokens: {seconds}",
        f"  tokens/s        {rate:,.0f}, {rate / plan.job.world:,.0f} a GPU",
    ]
    return [*lines, f"  the run         {_duration(plan, each)}"]


def _duration(plan: Plan, each: Estimate) -> str:
    if not plan.steps:
        return "its steps follow from data that is not here; --schedule.total_steps=N says how many"
    hours = plan.steps * each.total_seconds / 3600
    time = f"{hours / 24:,.1f} days" if hours >= 48 else f"{hours:,.2f} hours"
    return f"{plan.steps:,} steps: {time}, {hours * plan.job.world:,.0f} GPU-hours"


def _fp8_words(plan: Plan) -> str:
    faster = f"FP8 is {plan.fp8_ratio:.2f}x as fast as BF16 here"
    if isinstance(plan.job.recipe, RlRecipe):
        return faster
    if not plan.fp8_from_tokens:
        return f"{faster}, and not faster for any number of tokens a pass"
    if plan.fp8_from_tokens == 256:
        return f"{faster}, and faster for every number of tokens a pass"
    return f"{faster}, and faster from {plan.fp8_from_tokens:,} tokens a pass"


def _remedy(plan: Plan) -> str:
    recipe, words = plan.job.recipe, []
    if "CUDA graphs" in plan.written.memory:
        words.append("--train.cuda_graphs=false")
    if recipe.data.micro_batch_tokens > 8192:
        words.append(f"--data.micro_batch_tokens={recipe.data.micro_batch_tokens // 2}")
    if recipe.optimizer.moment_dtype == "fp32":
        words.append("--optimizer.moment_dtype=bf16")
    if not recipe.optimizer.offload:
        words.append("--optimizer.offload=true")
    return f"try {' '.join(words)}, or more GPUs." if words else "use more GPUs."
