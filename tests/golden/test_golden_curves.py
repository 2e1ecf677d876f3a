"""The loss curves of the three kinds of stage are those in the repository.

Bit-equal on the machine that wrote them (same processor, torch and Python), within 1e-3 elsewhere: other processors order
FP32 sums of the backward differently. `INFIR2_UPDATE_GOLDEN=1` writes them anew after a change that is meant to move them.
"""

import json
import os
import platform
from pathlib import Path

import pytest
import torch
from stages import curve, options, run

import infir2.rl.sampler
from infir2.rl.groups import Response

GOLDEN = Path(__file__).with_name("curves.json")


def machine() -> str:
    """What the bits depend on."""
    wanted = ("model name", "cpu family", "model", "stepping")
    found = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines() if ":" in line)
    processor = ", ".join(value.strip() for name, value in found.items() if name.strip() in wanted)
    return f"{processor}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, {platform.machine()}"


def reward_by_parity(completions, texts, answers, rl):  # type: ignore[no-untyped-def]
    """A reward that an untrained model earns in half of its answers."""
    even = [sum(completion.token_ids) % 2 == 0 for completion in completions]
    return [Response(c, text, right, float(right)) for c, text, right in zip(completions, texts, even, strict=True)]


@pytest.fixture(scope="module")
def found(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[float]]]:
    """(loss, gradient norm) of every step of a small CPT, SFT and RL run."""
    runs = tmp_path_factory.mktemp("golden")
    # rates are told here, so that tuning the demo moves no golden curve
    run(options(world, runs / "cpt", "cpt", schedule__total_steps=12, schedule__learning_rate=3e-3, schedule__final_learning_rate=3e-4))
    rates = {"schedule__learning_rate": 1e-3, "schedule__final_learning_rate": 1e-4}
    run(options(world, runs / "sft", "sft1", model__path=runs / "cpt", train__epochs=0.5, **rates))
    run(["export", "hf", str(runs / "sft"), "--to", str(runs / "hf")])
    run(["export", "fp8", str(runs / "hf"), "--to", str(runs / "fp8")])
    words = options(world, runs / "rl", "rl1", model__path=runs / "sft", rollout__model=runs / "fp8", schedule__total_steps=4)
    words.append("--schedule.learning_rate=1e-4")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(infir2.rl.sampler, "rate", reward_by_parity)
        run(words)
    return {name: [list(row[1:]) for row in curve(runs / name, "loss", "gradient_norm")] for name in ("cpt", "sft", "rl")}


@pytest.mark.parametrize("stage", ["cpt", "sft", "rl"])
def test_curves_are_the_recorded_ones(stage: str, found: dict[str, list[list[float]]]) -> None:
    if os.environ.get("INFIR2_UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps({"machine": machine(), "curves": found}, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    if golden["machine"] == machine():
        assert found[stage] == golden["curves"][stage]
    else:
        flat = [value for row in found[stage] for value in row]
        assert flat == pytest.approx([value for row in golden["curves"][stage] for value in row], rel=1e-3, abs=1e-3)
