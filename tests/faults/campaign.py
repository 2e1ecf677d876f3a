"""SIGKILL at random moments of CPT, SFT and RL runs; every run must end like the undisturbed one.

Asynchronous RL, whose responses may come from newer weights after a kill, must have lost no step
and repeated none.

    python tests/faults/campaign.py --kills 30 --to docs/results/faults.md      (make test-faults)

A kill hits anywhere from the start of the process to its end: imports, loading, rollouts,
verification, backward, background saves, retention. After each kill the steps done since the newest
good checkpoint are counted.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stages import (
    assert_each_step_once,
    assert_same_state,
    curve,
    guessing,
    lines,
    make_guessing_start,
    make_world,
    options,
)

from infir2.checkpoint.reader import newest_checkpoint

STEPS = {"cpt": 60, "sft": 60, "rl": 12, "rl-asynchronous": 12}
SAVE_EVERY = {"cpt": 8, "sft": 8, "rl": 2, "rl-asynchronous": 2}
CURVES = {
    "cpt": ("loss", "gradient_norm"),
    "sft": ("loss", "gradient_norm"),
    "rl": ("reward", "response_tokens", "groups_sampled", "loss"),
}
SYNCHRONOUS = ("sft",)  # kinds that save without checkpoint.background
KILLS_PER_RUN = 5


@dataclass
class Kill:
    """One SIGKILL: the last logged step and the newest checkpoint at that moment."""

    kind: str
    early: bool  # before the process had finished a step
    step: int
    published: int

    @property
    def lost(self) -> int:
        """Steps that had to be repeated."""
        return self.step - self.published

    @property
    def started(self) -> int:
        """The last step whose save had certainly started: a later step is logged."""
        every = SAVE_EVERY[self.kind]
        return max(0, self.step - 1) // every * every

    @property
    def in_flight(self) -> bool:
        """Whether that save was not yet published."""
        return self.published < self.started


@dataclass
class Campaign:
    """All runs in one directory, and their kills."""

    directory: Path
    seed: int
    kills: list[Kill] = field(default_factory=list)
    runs: int = 0

    def prepare(self) -> None:
        """Make the data, the models that stages start from, and an undisturbed run of each."""
        self.world = make_world(self.directory / "world")
        self.guesser = make_guessing_start(self.world, self.directory / "guesser")
        for kind in STEPS:
            self.finish(kind, self.directory / f"{kind}-undisturbed")

    def arguments(self, kind: str, run_dir: Path) -> list[str]:
        stage = {"cpt": "cpt", "sft": "sft1"}.get(kind, "rl1")
        keys = {
            "schedule__total_steps": STEPS[kind],
            "checkpoint__save_every": SAVE_EVERY[kind],
            "train__validate_every": 0,
        }
        keys["checkpoint__background"] = str(kind not in SYNCHRONOUS).lower()
        if kind == "sft":
            keys["model__path"] = self.directory / "cpt-undisturbed"
        if stage == "rl1":
            keys |= guessing(self.guesser)
            keys |= {"rl__overlong_buffer_tokens": 24, "rl__max_response_tokens": 24}
            keys |= {"rl__mini_batches": 1, "rl__max_off_policy_steps": int(kind != "rl")}
            del keys["train__validate_every"]
        return options(self.world, run_dir, stage, **keys)

    def start(self, kind: str, run_dir: Path) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "infir2", *self.arguments(kind, run_dir)]
        return subprocess.Popen(
            command,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def finish(self, kind: str, run_dir: Path) -> None:
        code = self.start(kind, run_dir).wait(timeout=600)
        assert code == 0, f"{kind} returned {code} in {run_dir}"

    def kill_run(self, kind: str, kills: int) -> None:
        """Kill one run up to `kills` times, then finish it and compare it."""
        draw = random.Random(f"{self.seed}/{self.runs}")
        self.runs += 1
        run_dir = self.directory / f"{kind}-{self.runs}"
        for _ in range(kills):
            before = (
                newest.step
                if (newest := newest_checkpoint(run_dir / "checkpoints", lambda _: None))
                else 0
            )
            stale = _logged(run_dir)  # includes lines that the resumed process drops
            process = self.start(kind, run_dir)
            if draw.random() < 0.8:  # imports dominate a short process; kill after them
                while (
                    (logged := _logged(run_dir)) <= before or logged == stale
                ) and process.poll() is None:
                    time.sleep(0.005)
                time.sleep(draw.uniform(0, 1.5))
            else:
                time.sleep(draw.uniform(0, 5))
            if process.poll() is not None:
                assert process.returncode == 0
                break  # it finished before the kill; the next run gets the rest
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            newest = newest_checkpoint(run_dir / "checkpoints", lambda _: None)
            step = _logged(run_dir)
            self.kills.append(Kill(kind, step <= before, step, newest.step if newest else 0))
        self.finish(kind, run_dir)
        if kind == "rl-asynchronous":
            assert_each_step_once(run_dir, STEPS[kind])
            return
        undisturbed = self.directory / f"{kind}-undisturbed"
        assert curve(run_dir, *CURVES[kind]) == curve(undisturbed, *CURVES[kind]), (
            f"{run_dir}: the curve differs from the undisturbed run"
        )
        assert_same_state(run_dir, undisturbed)

    def run(self, kills: int) -> None:
        """Alternate between the kinds until `kills` are done, and check what was lost."""
        while len(self.kills) < kills:
            kind = tuple(STEPS)[self.runs % len(STEPS)]
            self.kill_run(kind, min(KILLS_PER_RUN, kills - len(self.kills)))
        for kill in self.kills:
            # A save starts after the previous one is published, so only the last one can be
            # missing, and none of a synchronous save.
            assert kill.published >= kill.started - SAVE_EVERY[kill.kind] * (
                kill.kind not in SYNCHRONOUS
            ), kill
            assert kill.kind not in SYNCHRONOUS or kill.lost <= SAVE_EVERY[kill.kind], kill

    def save_seconds(self, kind: str) -> list[float]:
        """Seconds from start to publication of each save of the undisturbed run."""
        return [line["seconds"] for line in lines(self.directory / f"{kind}-undisturbed", "save")]

    def report(self, duration: float) -> str:
        table = [
            "# Random kills",
            "",
            f"`make test-faults`: {len(self.kills)} SIGKILLs at random moments of {self.runs} runs,"
            f" seed {self.seed}, {duration / 60:.1f} minutes. Every run",
            "of the first three kinds ended with the curve of the undisturbed run, bit for bit,",
            "and with the same checkpoint (weights, moments, data position). Every asynchronous",
            "run did each step once, counted by steps, optimizer updates and prompts.",
            "",
            "| kind | kills | before the first step of the process | last step at the kill"
            " | during a save: kills, most steps lost | otherwise: steps lost, mean, most"
            " | save interval | seconds of a save: mean, most |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for kind in STEPS:
            kills = [kill for kill in self.kills if kill.kind == kind]
            if kills:
                steps, seconds = [kill.step for kill in kills], self.save_seconds(kind)
                during_save, otherwise = (
                    [kill.lost for kill in kills if kill.in_flight == in_flight]
                    for in_flight in (True, False)
                )
                cells = [
                    kind,
                    len(kills),
                    sum(kill.early for kill in kills),
                    f"{min(steps)} to {max(steps)} of {STEPS[kind]}",
                ]
                cells += [f"{len(during_save)}, {max(during_save)}" if during_save else "0"]
                cells += [
                    f"{sum(otherwise) / len(otherwise):.1f}, {max(otherwise)}" if otherwise else "",
                    SAVE_EVERY[kind],
                ]
                cells += [f"{sum(seconds) / len(seconds):.2f}, {max(seconds):.2f}"]
                table.append(f"| {' | '.join(map(str, cells))} |")
        table += [
            "",
            "A kill loses the steps since the newest published checkpoint. A save starts at every",
            "interval, after the previous one is published. So a kill loses at most one interval",
            "plus, during a save, the steps since that save started. The campaign checks that at",
            "most the last save is missing after a kill, and that",
            f"{' and '.join(SYNCHRONOUS)}, which ran with `checkpoint.background = false`, never",
            "lost more than the interval.",
        ]
        return "\n".join(table) + "\n"


def _logged(run_dir: Path) -> int:
    """The last step in metrics.jsonl, whose last line may be incomplete."""
    path = run_dir / "metrics.jsonl"
    complete = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
    return max(
        (json.loads(line)["step"] for line in complete if '"kind": "train"' in line), default=0
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1236)
    parser.add_argument("--to", type=Path, help="file for the results")
    flags = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="infir2-campaign-") as directory:
        campaign = Campaign(Path(directory), flags.seed)
        campaign.prepare()
        campaign.run(flags.kills)
        text = campaign.report(time.monotonic() - began)
    print(text)
    if flags.to:
        flags.to.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
