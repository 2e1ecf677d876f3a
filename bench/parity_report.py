"""Results of bench/parity.py: gathers runs, and makes tables and plots of them.

A gap is the mean over seeds of (loss of the arm - loss of the baseline) of one seed: both began
with the same weights and read the same data in the same order. Its interval is Student's over the
seeds, and beside it a bootstrap of them; the seed spread is the standard deviation of the baseline.

Two losses are compared: of the validation after the last step, and of the text that was trained on
in the second half of the steps, each batch before its own update. In a run that repeats no text the
second is as fair as the first, and a mean over many states of the model: less noisy.
"""

import json
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from infir2.evaluate.statistics import student_half_width
from infir2.files import read_json_lines

SHOWN = ("underflow", "saturation", "cosine", "relative_error", "kurtosis")
OPERANDS = ("activation", "weight", "gradient")
GOAL_PERCENT = 0.1
RESAMPLES = 10_000
MAX_POINTS = 400  # of a training curve

Losses = Callable[[Mapping[str, Any], str], dict[int, float]]


def collect(root: Path) -> dict[str, Any]:
    """Everything that the report needs of all studies in `root`, as JSON."""
    studies = {}
    for file in sorted(root.glob("*/study.json")):
        study = json.loads(file.read_text())
        found = [_read_run(path.parent) for path in sorted(file.parent.glob("*/metrics.jsonl"))]
        study["runs"] = [run for run in found if run is not None]
        study["wall"] = read_json_lines(file.parent / "wall.jsonl")
        study["gpu"] = _read_gpu(file.parent / "gpu.csv")
        studies[file.parent.name] = study
    return studies


def _read_run(path: Path) -> dict[str, Any] | None:
    arm, _, seed = path.name.rpartition("-")
    rows = read_json_lines(path / "metrics.jsonl")
    train = [row for row in rows if row["kind"] == "train"]
    if not train:
        return None
    validation = [
        (row["step"], row["validation_loss"]) for row in rows if row["kind"] == "validation"
    ]
    # The first steps compile kernels, and one that waits for a save is no step's time.
    speeds = [row["tokens_per_second"] for row in train[len(train) // 4 :]]
    thin = max(1, len(train) // MAX_POINTS)
    return {
        "arm": arm,
        "seed": int(seed),
        "finished": (path / "finished.json").exists(),
        "steps": train[-1]["step"],
        "validation": validation,
        "train": [(row["step"], round(row["loss"], 5)) for row in train[::thin]],
        "skipped": sum(row["skipped"] for row in train),
        "tokens_per_second": round(statistics.median(speeds)),
        "step_seconds": round(sum(row["seconds"] for row in train), 2),
        "gpu": _read_gpu(path.with_suffix(".gpu.csv"), start=0.5),
        "operands": [_rounded(row) for row in read_json_lines(path / "operands.jsonl")],
    }


def _rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}


def _read_gpu(path: Path, start: float = 0.0) -> dict[str, float]:
    """Means of the GPU's power, use and memory; {} without samples.

    `start` is the share of the samples that is left out: of one run its imports and compilations.
    """
    if not path.exists():
        return {}
    rows = []
    for line in path.read_text().splitlines():
        cells = line.split(", ")
        if len(cells) == 3 and all(cell.replace(".", "", 1).isdigit() for cell in cells):
            rows.append([float(cell) for cell in cells])
    if not rows:
        return {}
    columns = list(zip(*rows[int(start * len(rows)) :], strict=True))
    watts, use, memory = map(statistics.fmean, columns)
    return {
        "samples": len(rows),
        "mean_watts": round(watts, 1),
        "mean_use_percent": round(use, 1),
        "mean_memory_mib": round(memory),
        "peak_memory_mib": max(row[2] for row in rows),
    }


def final_losses(study: Mapping[str, Any], arm: str) -> dict[int, float]:
    """{seed: validation loss after the last step} of the finished runs of an arm."""
    return {
        run["seed"]: run["validation"][-1][1]
        for run in study["runs"]
        if run["arm"] == arm and run["finished"] and run["validation"]
    }


def late_losses(study: Mapping[str, Any], arm: str) -> dict[int, float]:
    """{seed: mean training loss of the second half of the steps} of the finished runs of an arm."""
    return {
        run["seed"]: statistics.fmean(
            loss for step, loss in run["train"] if step > run["steps"] / 2
        )
        for run in study["runs"]
        if run["arm"] == arm and run["finished"]
    }


def gap(arm: Mapping[int, float], baseline: Mapping[int, float]) -> dict[str, float] | None:
    """The gap in per cent of the baseline's loss over common seeds; None without any.

    `half_width` (Student), `low` and `high` (bootstrap) are of its 95 % interval, NaN for one seed.
    """
    seeds = sorted(arm.keys() & baseline.keys())
    if not seeds:
        return None
    gaps = [100 * (arm[seed] - baseline[seed]) / baseline[seed] for seed in seeds]
    mean, half, low, high = statistics.fmean(gaps), math.nan, math.nan, math.nan
    if len(gaps) > 1:
        half = student_half_width(gaps)
        low, high = _bootstrap(gaps)
    return {"seeds": len(gaps), "mean": mean, "half_width": half, "low": low, "high": high}


def _bootstrap(values: Sequence[float]) -> tuple[float, float]:
    draw = random.Random(0)
    means = sorted(statistics.fmean(draw.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES) - 1]


def table(
    study: Mapping[str, Any],
    losses_of: Losses = final_losses,
    title: str = "final validation loss",
) -> list[str]:
    """The study as lines of Markdown."""
    baseline = losses_of(study, study["baseline"])
    lines = [
        f"| arm | seeds | {title} | seed spread | gap to {study['baseline']} "
        "| 95 % (Student) | 95 % (bootstrap) | tokens/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm in study["arms"]:
        losses = list(losses_of(study, arm).values())
        if not losses:
            continue
        spread = f"{_spread(losses):.3f} %" if len(losses) > 1 else ""
        own = gap(losses_of(study, arm), baseline) if arm != study["baseline"] else None
        speeds = [run["tokens_per_second"] for run in study["runs"] if run["arm"] == arm]
        cells = [arm, str(len(losses)), f"{statistics.fmean(losses):.5f}", spread, *_cells(own)]
        lines.append(f"| {' | '.join(cells)} | {statistics.median(speeds):,.0f} |")
    return lines


def _spread(losses: Sequence[float]) -> float:
    """Standard deviation over seeds in per cent of the mean."""
    return 100 * statistics.stdev(losses) / statistics.fmean(losses)


def _cells(own: Mapping[str, float] | None) -> list[str]:
    if own is None:
        return ["", "", ""]
    if own["seeds"] < 2:
        return [f"{own['mean']:+.3f} %", "one seed", ""]
    return [
        f"{own['mean']:+.3f} %",
        f"{own['mean'] - own['half_width']:+.3f} to {own['mean'] + own['half_width']:+.3f} %",
        f"{own['low']:+.3f} to {own['high']:+.3f} %",
    ]


def late_table(study: Mapping[str, Any]) -> list[str]:
    """As `table`, of the text that was trained on in the second half of the steps."""
    return table(study, late_losses, "loss of new text, second half")


def cost_table(study: Mapping[str, Any], price: float) -> list[str]:
    """What each arm costs alone on its GPU, at `price` dollars an hour; [] if none ran alone."""
    alone = [run for run in study["runs"] if run.get("gpu")]
    lines = [
        "| arm | tokens/s | GPU busy | peak memory | power | energy of 10^9 tokens "
        f"| at ${price:g} an hour |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in alone:
        gpu, hours = run["gpu"], 1e9 / run["tokens_per_second"] / 3600
        lines.append(
            f"| {run['arm']} | {run['tokens_per_second']:,} | {gpu['mean_use_percent']:.0f} % "
            f"| {gpu['peak_memory_mib'] / 1024:.1f} GiB | {gpu['mean_watts']:.0f} W "
            f"| {gpu['mean_watts'] * hours / 1000:.2f} kWh | ${price * hours:.2f} |"
        )
    return lines if alone else []


def seed_table(study: Mapping[str, Any]) -> list[str]:
    """The final loss of every run: one line per seed."""
    losses = {arm: final_losses(study, arm) for arm in study["arms"]}
    seeds = sorted({seed for each in losses.values() for seed in each})
    lines = [f"| seed | {' | '.join(losses)} |", "|---" * (1 + len(losses)) + "|"]
    for seed in seeds:
        cells = [f"{each[seed]:.5f}" if seed in each else "" for each in losses.values()]
        lines.append(f"| {seed} | {' | '.join(cells)} |")
    return lines


def worst_layers(rows: Sequence[Mapping[str, Any]], count: int = 3) -> list[str]:
    """Of each operand, the layers with the largest relative error at the last observed step."""
    if not rows:
        return []
    last = max(row["step"] for row in rows)
    lines = [
        f"Step {last}, the layers with the largest relative error:",
        "",
        "| operand | layer | relative error | underflow | saturation | cosine | kurtosis |",
        "|---|---|---|---|---|---|---|",
    ]
    for operand in OPERANDS:
        known = [r for r in rows if r["step"] == last and r.get(f"{operand}_relative_error")]
        known.sort(key=lambda row: -row[f"{operand}_relative_error"])
        for row in known[:count]:
            under, over, cosine, error, kurtosis = (row[f"{operand}_{name}"] for name in SHOWN)
            layer = row["layer"].removeprefix("model.layers.")
            lines.append(
                f"| {operand} | {layer} | {error:.4f} | {100 * under:.3f} % | {100 * over:.3f} % "
                f"| {cosine:.6f} | {kurtosis:.1f} |"
            )
    return lines


def write_report(studies: Mapping[str, Any], target: Path, price: float) -> None:
    """Write tables.md, parity.json and PNG plots into the directory `target`."""
    import parity_plots  # matplotlib is an extra

    target.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, study in studies.items():
        lines += [f"## {name}", "", f"{study['steps']} steps a run. {_cost(study)}", ""]
        for part in (table(study), late_table(study), seed_table(study), cost_table(study, price)):
            lines += [*part, ""]
        for run in study["runs"]:
            if run["operands"]:
                lines += [f"Operands of {run['arm']}, seed {run['seed']}.", ""]
                lines += [*worst_layers(run["operands"]), ""]
        parity_plots.draw(name, study, target)
    (target / "tables.md").write_text("\n".join(lines))
    (target / "parity.json").write_text(json.dumps(studies, separators=(",", ":")) + "\n")


def _cost(study: Mapping[str, Any]) -> str:
    """Wall time and, where the GPU told it, energy of the whole study."""
    seconds = sum(row["seconds"] for row in study["wall"])
    text = f"{seconds:,.0f} s of wall time for {len(study['runs'])} runs"
    if not study["gpu"]:
        return text + "."
    watts = study["gpu"]["mean_watts"]
    return (
        f"{text}, mean power of the GPU {watts:.0f} W ({watts * seconds / 3.6e6:.3f} kWh), "
        f"{study['gpu']['mean_use_percent']:.0f} % of the time busy, "
        f"peak memory of all runs together {study['gpu']['peak_memory_mib'] / 1024:.1f} GiB."
    )
