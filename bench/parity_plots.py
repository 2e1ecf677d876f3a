"""PNG plots of bench/parity.py's studies; needs matplotlib."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from parity_report import GOAL_PERCENT, OPERANDS, final_losses

mpl.use("Agg")
from matplotlib import pyplot as plt

COLORS = ("#4c566a", "#2f7ed8", "#d9822b", "#2e8b57", "#8e5ea2")


def draw(name: str, study: Mapping[str, Any], target: Path) -> None:
    """Write the plots NAME-loss, NAME-gap and, where operands were observed, NAME-operands-ARM."""
    _draw_losses(study, target / f"{name}-loss.png")
    _draw_gaps(study, target / f"{name}-gap.png")
    for run in study["runs"]:
        if run["operands"]:
            _draw_operands(run, target / f"{name}-operands-{run['arm']}.png")


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_losses(study: Mapping[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4))
    colors = dict(zip(study["arms"], COLORS, strict=False))
    labelled = set()
    finished = [run for run in study["runs"] if run["finished"] and run["validation"]]
    for run in finished:
        steps, losses = zip(*run["validation"], strict=True)
        label = None if run["arm"] in labelled else run["arm"]
        labelled.add(run["arm"])
        axes.plot(steps, losses, color=colors[run["arm"]], linewidth=0.9, alpha=0.7, label=label)
    lowest = min((loss for run in finished for _, loss in run["validation"]), default=0.0)
    axes.set_ylim(lowest - 0.05, lowest + 1.5)
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss")
    axes.legend(frameon=False)
    _save(figure, path)


def _draw_gaps(study: Mapping[str, Any], path: Path) -> None:
    baseline = final_losses(study, study["baseline"])
    others = [arm for arm in study["arms"] if arm != study["baseline"]]
    arms = [arm for arm in others if final_losses(study, arm)]
    figure, axes = plt.subplots(figsize=(6, 1.2 + 0.6 * len(arms)))
    axes.axvspan(-GOAL_PERCENT, GOAL_PERCENT, color="#2e8b57", alpha=0.12, label="goal: 0.1 %")
    axes.axvline(0, color="#4c566a", linewidth=0.8)
    for height, arm in enumerate(arms):
        losses = final_losses(study, arm)
        common = losses.keys() & baseline.keys()
        gaps = [100 * (losses[seed] - baseline[seed]) / baseline[seed] for seed in sorted(common)]
        axes.plot(gaps, [height] * len(gaps), "o", color=COLORS[1 + height % 4], markersize=5)
        if gaps:
            axes.plot([sum(gaps) / len(gaps)], [height], "|", color="black", markersize=16)
    axes.set_yticks(range(len(arms)), arms)
    axes.set_ylim(-0.6, len(arms) - 0.4)
    axes.set_xlabel(f"final validation loss against {study['baseline']} of the same seed, %")
    axes.legend(frameon=False, loc="upper right")
    _save(figure, path)


def _draw_operands(run: Mapping[str, Any], path: Path) -> None:
    """By layer at the last observed step: relative error, share of underflow, kurtosis."""
    last = max(row["step"] for row in run["operands"])
    rows = [row for row in run["operands"] if row["step"] == last]
    kinds = list(dict.fromkeys(row["layer"].rsplit(".", 1)[1] for row in rows))
    measures = ("relative_error", "underflow", "kurtosis")
    figure, grid = plt.subplots(3, 3, figsize=(11, 8), sharex=True)
    for line, measure in zip(grid, measures, strict=True):
        for axes, operand in zip(line, OPERANDS, strict=True):
            for kind in kinds:
                own = [row for row in rows if row["layer"].endswith(kind)]
                blocks = [int(row["layer"].split(".")[2]) for row in own]
                axes.plot(blocks, [row[f"{operand}_{measure}"] for row in own], ".-", label=kind)
            if measure != "relative_error":
                axes.set_yscale("symlog", linthresh=1e-5 if measure == "underflow" else 1)
            axes.set_title(f"{operand}: {measure.replace('_', ' ')}", fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel("block")
    grid[0][0].legend(frameon=False, fontsize=7)
    figure.suptitle(f"{run['arm']}, seed {run['seed']}, step {last}", fontsize=10)
    _save(figure, path)
