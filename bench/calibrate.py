"""Fit the constants of `infir2 plan` to the measured steps in docs/results.

    python bench/calibrate.py            prints every row: measured, fitted, held out
    python bench/calibrate.py --write    and writes measured.json and constants.json of the package

But for the host's, the model is linear in its constants (infir2/planner/step_time.py): least
squares of relative errors, in which each row of the same GPU, model and layout counts less the more
there are. "Held out" is what the fit without any row of that model, length and layout says.
"""

import argparse
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from scale_bench import case_of
from step_cases import CASES, SHAPES, SMALL_OPTIMIZER, Case

from infir2.config.keys import flatten
from infir2.config.schema import ScheduleSection, TrainRecipe
from infir2.numerics import SavedActivations
from infir2.planner.gpus import find_gpu
from infir2.planner.rows import Row
from infir2.planner.step_time import HOST, PARTS, POWER, host_seconds, terms

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PACKAGE = ROOT / "docs/results", ROOT / "infir2/planner"
# Rows that only a page has: (page, name, GPU, case, milliseconds, micro-batches, GiB)
ON_PAGES = [
    ("house.md", "1.5B-8k FP8", "h200", CASES["1.5B-8k"]["FP8"], 303.0, 1, 49.31),
    ("house.md", "1.5B-8k BF16", "h200", CASES["1.5B-8k"]["BF16"], 365.9, 1, 55.47),
    ("house.md", "1.5B-8k FP8, two", "h200", CASES["1.5B-8k"]["FP8"], 615.0, 2, 0.0),
    ("house.md", "1.5B-8k BF16, two", "h200", CASES["1.5B-8k"]["BF16"], 733.6, 2, 0.0),
]
ALL_OF_7B = Case(
    "7B",
    1,
    8192,
    True,
    SavedActivations(keep_transposed_weights=False),
    recompute="full",
    **SMALL_OPTIMIZER,
)
# GPU milliseconds by part of forward and backward, from the kernels that run A's file lists.
PROFILES = {
    "A 1.5B-8k FP8": {
        "GEMMs of the layers": 103.0,
        "attention": 75.0,
        "head": 32.0,
        "norms, SwiGLU, RoPE, quantizers": 62.0,
    },
    "A 1.5B-8k BF16": {
        "GEMMs of the layers": 190.0,
        "attention": 84.0,
        "head": 34.0,
        "norms, SwiGLU, RoPE, quantizers": 50.0,
    },
}
BUSY_WEIGHT = 2.0  # a profile of a whole step says more than its time, of which the host is part
SPECIAL = {
    "7B, all parameters": ALL_OF_7B,
    "BF16": CASES["1.5B-8k"]["BF16"],
    "FP8, least memory": CASES["1.5B-8k"]["FP8, least memory without full recompute"],
}


def row_of(source: str, name: str, gpu: str, case: Case, result: dict[str, float]) -> Row:
    """A row of one GPU from a case of bench/step.py."""
    default = TrainRecipe(schedule=ScheduleSection(learning_rate=1e-5))
    values, usual = flatten(case.recipe()), flatten(default)
    options = {
        key: value
        for key, value in values.items()
        if value != usual[key] and key != "data.micro_batch_tokens"
    }
    seconds = result.get("seconds_per_step", 0.0)
    return Row(
        source=source,
        name=name,
        gpu=gpu,
        shape=SHAPES[case.model] | {"num_layers": case.layers},
        options=options,
        tokens=case.tokens,
        length=case.length,
        milliseconds=round(seconds * 1e3 or result["total"], 3),
        peak_gib=round(result.get("peak_gib", 0.0), 3),
        update_ms=round(result.get("update", 0.0), 3),
        has_optimizer=case.optimizer,
    )


def step_rows(path: Path) -> Iterator[Row]:
    """Rows of a file of bench/step.py, whose runs may be under their names."""
    content = json.loads(path.read_text(encoding="utf-8"))
    runs = content if "gpu" not in content else {"": content}
    for title, run in runs.items():
        gpu = "h200" if "H200" in run["gpu"] else "h100"
        cases = {f"{group} {name}": case for group in CASES for name, case in CASES[group].items()}
        found = {name: value for name, value in run.items() if isinstance(value, dict)}
        found |= {
            key: run["1.5B-8k, least memory and its BF16"][key]
            for key in SPECIAL
            if key in run.get("1.5B-8k, least memory and its BF16", {})
        }
        flash = run.get("attention", "flash" if "FlashAttention 4" in title else "torch")
        for name, result in found.items():
            if case := (cases | SPECIAL).get(name):
                row = row_of(path.name, run_name(title, name), gpu, case, result)
                yield replace(row, attention=flash)


def run_name(title: str, name: str) -> str:
    """Example: "A 1.5B-8k FP8" of the run "A: FlashAttention 4, ..."; "run 2 1.5B-8k FP8"."""
    short = re.match(r"[A-Z](?=:)|run \d+", title)
    return f"{short[0]} {name}" if short else name


def scale_rows(path: Path) -> Iterator[Row]:
    """Rows of a file of bench/scale.py."""
    run = json.loads(path.read_text(encoding="utf-8"))
    gpu = "h200" if "H200" in run["gpu"] else "h100"
    for title, results in run.items():
        match = re.fullmatch(r"throughput: (\S+) (\d+) (.+)", title)
        if not match or match[1] not in SHAPES:
            continue
        model, length = match[1], int(match[2])
        job: dict[str, Any] = {"model": model, "length": length, "layers": 28}
        job["sequences"] = 2 if (model, length) == ("1.5B", 8192) else 1
        job["recompute"] = "full" if length == 32768 else "none"
        for name, result in results.items():
            if not isinstance(result, dict):
                continue
            case = case_of(job, name.startswith("FP8"))
            if "gate/up" in name:
                case = replace(case, saved=SavedActivations(pre_activations="fp8"))
            row = row_of(path.name, f"{model}-{length} {match[3]} {name}", gpu, case, result)
            sizes, attention = sizes_of(match[3]), run.get("attention", "torch")
            yield replace(row, sizes=sizes, attention=attention)


def graph_rows(path: Path) -> Iterator[Row]:
    """Rows of a file of bench/host.py, of each case the last run that has it.

    The peak is what the allocator reserves: of what a graph holds, little counts as allocated. The
    first run has none, as its rows left memory behind.
    """
    found: dict[str, dict[str, Any]] = {}
    for run in json.loads(path.read_text(encoding="utf-8")).values():
        found |= {name: result for name, result in run.items() if isinstance(result, dict)}
    for name, result in found.items():
        group, kind = name.removesuffix(", graphs").split()
        case = replace(CASES[group][kind], graphs=name.endswith("graphs"))
        peak = result.get("reserved_gib" if case.graphs else "allocated_gib", 0.0)
        row = row_of(path.name, name, "h200", case, {"total": result["step"], "peak_gib": peak})
        yield replace(row, attention="flash")


def busy_milliseconds() -> dict[str, float]:
    """Milliseconds of a step in which a kernel runs, by the name of the row without graphs."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("graphs-*.json")]
    results = [item for run in runs for measured in run.values() for item in measured.items()]
    return {name: result["gpu"] for name, result in results if "host" in result}


def sizes_of(layout: str) -> tuple[int, int, int, int]:
    """(dp_replicate, dp, cp, tp) of a layout's name, such as dp2-tp2 or hsdp2x4."""
    sizes = {"dp": 1, "cp": 1, "tp": 1, "hsdp": 1}
    for name, number, second in re.findall(r"(hsdp|dp|cp|tp)(\d+)(?:x(\d+))?", layout):
        sizes[name] = int(number)
        if second:
            sizes["dp"] = int(second)
    return sizes["hsdp"], sizes["dp"], sizes["cp"], sizes["tp"]


def all_rows() -> list[Row]:
    rows = []
    for page, name, gpu, case, milliseconds, micro_batches, gib in ON_PAGES:
        row = row_of(
            page, name, gpu, case, {"total": milliseconds, "peak_gib": gib, "update": 12.7}
        )
        rows.append(replace(row, micro_batches=micro_batches))
    for path in sorted(RESULTS.glob("step-*.json")):
        rows += step_rows(path)
    for path in sorted(RESULTS.glob("scale-*.json")):
        rows += scale_rows(path)
    for path in sorted(RESULTS.glob("graphs-*.json")):
        rows += graph_rows(path)
    return rows


def group_of(row: Row) -> tuple[Any, ...]:
    """Rows that say the same: held out together."""
    return row.gpu, row.shape["hidden_size"], row.shape["num_layers"], row.length, row.sizes


def fit(rows: Iterable[Row]) -> dict[str, float]:
    """All constants: those of the host by search, for each the others by least squares."""
    rows = list(rows)
    # Of one GPU and of graphs: inside the range that bench/host.py measured, as hosts differ.
    grids = [[6.0], [3.0], [*np.arange(8.0, 13.1)], [*np.arange(4.0, 9.1)], [27.0], [18.0]]
    tried = (dict(zip(HOST, map(float, host), strict=True)) for host in itertools.product(*grids))
    return min((host | fit_gpu(rows, host) for host in tried), key=lambda c: loss(rows, c))


def loss(rows: list[Row], constants: dict[str, float]) -> float:
    """Sum of squared relative errors, weighted as in `fit_gpu`."""
    groups = [group_of(row) for row in rows]
    return sum(
        (row.predicted_milliseconds(constants) / row.milliseconds - 1) ** 2 / groups.count(group)
        for row, group in zip(rows, groups, strict=True)
    )


def fit_gpu(rows: list[Row], host: dict[str, float]) -> dict[str, float]:
    """Constants by least squares of relative errors, none negative (those that would be are 0)."""
    groups = [group_of(row) for row in rows]
    names, profiled = list(PARTS), busy_milliseconds()
    matrix, weights = [], []
    for row, group in zip(rows, groups, strict=True):
        features = terms(row.load(), find_gpu(row.gpu))
        waits = 1e3 * host_seconds(row.load(), find_gpu(row.gpu), host)
        busy = max(row.milliseconds**POWER - waits**POWER, 0.0) ** (1 / POWER)
        # A step that waits for the host says little about the GPU.
        matrix.append([1e3 * features[name] / max(busy, 1.0) for name in names])
        weights.append(groups.count(group) ** -0.5 * (waits < 0.8 * row.milliseconds))
        if measured := profiled.get(row.name):
            matrix.append([1e3 * features[name] / measured for name in names])
            weights.append(BUSY_WEIGHT)
        if row.update_ms > 0.1:
            matrix.append(
                [1e3 * features[name] / row.update_ms * (name == "update") for name in names]
            )
            weights.append(weights[-1])
        for part, milliseconds in PROFILES.get(row.name, {}).items():
            inside = [PARTS[name] == part for name in names]
            shares = [1e3 * features[name] / milliseconds for name in names]
            matrix.append([share * is_in for share, is_in in zip(shares, inside, strict=True)])
            weights.append(0.5)
    a, w = np.array(matrix), np.array(weights)
    # A weak pull to 1, the rates as measured alone, for what the rows do not tell apart.
    scale = 0.01 * np.sqrt(len(rows))
    usual = [3.0 if name.endswith("kernels") else 1.0 for name in names]
    free = np.ones(len(names), dtype=bool)
    while True:
        pull = scale * np.eye(len(names))
        left = np.vstack([a * w[:, None], pull])[:, free]
        right = np.concatenate([w, scale * np.array(usual)])
        found = np.linalg.lstsq(left, right, rcond=None)[0]
        if (found >= 0).all():
            break
        free[np.flatnonzero(free)[found < 0]] = False
    values = np.zeros(len(names))
    values[free] = found
    return {name: round(float(value), 4) for name, value in zip(names, values, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    rows = all_rows()
    constants = fit(rows)
    worst = [0.0, 0.0, 0.0]
    without = {
        group: fit(row for row in rows if group_of(row) != group)
        for group in {*map(group_of, rows)}
    }
    for row in rows:
        held_out = without[group_of(row)]
        fitted = row.predicted_milliseconds(constants) / row.milliseconds - 1
        honest = row.predicted_milliseconds(held_out) / row.milliseconds - 1
        memory = row.predicted_gib() / row.peak_gib - 1 if row.peak_gib else 0.0
        worst = [max(w, abs(e)) for w, e in zip(worst, (fitted, honest, memory), strict=True)]
        print(
            f"{row.source:30s} {row.name:48s} {row.milliseconds:8.1f} ms {fitted:+7.1%} "
            f"held out {honest:+7.1%}   {row.peak_gib:6.2f} GiB {memory:+7.1%}"
        )
    print(constants)
    print(
        f"{len(rows)} rows; largest error: fitted {worst[0]:.1%}, held out {worst[1]:.1%}, "
        f"memory {worst[2]:.1%}"
    )
    if options.write:
        write(rows, constants, worst)


def write(rows: list[Row], constants: dict[str, float], worst: list[float]) -> None:
    """The package's tables, a row a line."""
    lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
    (PACKAGE / "measured.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    errors = {"fitted": worst[0], "held_out": worst[1], "memory": worst[2]}
    content = {"constants": constants, "rows": len(rows), "largest_error": errors}
    text = json.dumps(content, indent=1)
    (PACKAGE / "constants.json").write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
