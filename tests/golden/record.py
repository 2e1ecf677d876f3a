"""Curves of a small CPT, SFT and RL run from the same untrained weights, as JSON.

    record.py OUT.json

test_golden_curves.py runs it. `VARIABLES` restrict MKL and torch to instructions that every x86-64
processor has, in one order. With each processor's best instructions, sums in the backward round
differently, an FP8 code flips within a few steps, and in RL a sampled token after it.
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stages import curve, make_rl_start, make_world, options, run

import infir2.rl.dynamic_sampling
from infir2.rl.groups import Response

VARIABLES = {
    "CUDA_VISIBLE_DEVICES": "",
    "MKL_CBWR": "COMPATIBLE",
    "ATEN_CPU_CAPABILITY": "default",
    "OMP_NUM_THREADS": "1",
}
# One step that changes nothing, so that differences of one stage do not carry over to the next.
UNTRAINED = {
    f"schedule__{name}": value
    for name, value in {"total_steps": 1, "warmup_steps": 0, "decay_steps": 0}.items()
}
UNTRAINED |= {"schedule__learning_rate": 1e-12, "schedule__final_learning_rate": 1e-12}


def reward_by_parity(completions, texts, prompt, rl):
    """A reward that an untrained model gets for half of its responses."""
    even = [sum(completion.token_ids) % 2 == 0 for completion in completions]
    return [
        Response(c, text, "ok" if right else "wrong", float(right))
        for c, text, right in zip(completions, texts, even, strict=True)
    ]


def record(runs: Path) -> dict[str, list[list[float]]]:
    """(loss, gradient norm) of every step of each stage."""
    world = make_world(runs / "world")
    start = make_rl_start(world, runs / "start", **UNTRAINED)
    # Learning rates are set here, so tuning the demo changes no golden curve.
    run(
        options(
            world,
            runs / "cpt",
            "cpt",
            schedule__total_steps=12,
            schedule__learning_rate=1e-3,
            schedule__final_learning_rate=1e-4,
        )
    )
    rates = {"schedule__learning_rate": 2e-4, "schedule__final_learning_rate": 2e-5}
    run(options(world, runs / "sft", "sft1", model__path=start / "cpt", train__epochs=0.5, **rates))
    infir2.rl.dynamic_sampling.rate = reward_by_parity
    names = {"model__path": start / "cpt", "rollout__model": start / "fp8"}
    run(
        options(
            world,
            runs / "rl",
            "rl1",
            **names,
            schedule__total_steps=4,
            schedule__learning_rate=1e-4,
        )
    )
    return {
        name: [list(row[1:]) for row in curve(runs / name, "loss", "gradient_norm")]
        for name in ("cpt", "sft", "rl")
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        curves = record(Path(directory))
    Path(sys.argv[1]).write_text(json.dumps(curves), encoding="utf-8")
