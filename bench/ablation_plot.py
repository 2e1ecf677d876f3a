"""A PNG of the k3 of each step and arm: ablation_plot.py FILE.json OUT.png; needs matplotlib."""

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

COLORS = {
    "bf16-bf16": "#4c566a",
    "fp8-fp8": "#2f7ed8",
    "bf16-fp8": "#d9822b",
    "fp8-bf16": "#2e8b57",
}


def medians(runs: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """The median over the seeds of each step's k3, by step."""
    found: dict[int, list[float]] = {}
    for run in runs:
        for step, value in enumerate(run["k3"], 1):
            if value is not None:
                found.setdefault(step, []).append(value)
    return {step: statistics.median(values) for step, values in sorted(found.items())}


def draw(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A panel for each engine. Arms whose k3 is 0 in every step are only named."""
    engines = dict.fromkeys(run["engine"] for run in runs)
    figure, panels = plt.subplots(1, len(engines), figsize=(11, 4.5), sharey=True, squeeze=False)
    for axes, engine in zip(panels[0], engines, strict=True):
        own = [run for run in runs if run["engine"] == engine]
        for arm in dict.fromkeys(run["arm"] for run in own):
            line = medians([run for run in own if run["arm"] == arm])
            color = next(COLORS[pair] for pair in COLORS if f"-{arm}".endswith(f"-{pair}"))
            style = "--" if arm.startswith("fp32") else "-"
            label = arm if any(line.values()) else f"{arm}: 0 in every step"
            axes.plot(*zip(*line.items(), strict=True), style, color=color, lw=1.2, label=label)
        axes.set(title=engine, xlabel="step", yscale="log")
        axes.legend(frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    panels[0][0].set_ylabel("k3, median over the seeds")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text())["runs"], Path(sys.argv[2]))
