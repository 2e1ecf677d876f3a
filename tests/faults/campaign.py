"""SIGKILL at random moments of CPT, SFT and RL runs; every run must end as the one that nobody touched.

Asynchronous RL, whose responses may come from newer weights after a kill, must have lost no step and done none twice.

    python tests/faults/campaign.py --kills 30 --to docs/results/faults.md      (make test-faults)

A kill hits anywhere from the start of the process to its end: imports, loading, rollouts, verification, backward, saves in
the background, retention. After each, what the newest good checkpoint lacks of the steps done is counted.
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

from stages import assert_each_step_once, assert_same_state, curve, lines, make_world, options

from infir2.checkpoint.store import newest_checkpoint

STEPS = {"cpt": 60, "sft": 60, "rl": 12, "rl-asynchronous": 12}
SAVE_EVERY = {"cpt": 8, "sft": 8, "rl": 2, "rl-asynchronous": 2}
CURVES = {
    "cpt": ("loss", "gradient_norm"),
    "sft": ("loss", "gradient_norm"),
    "rl": ("reward", "response_tokens", "groups_sampled", "loss"),
}
IN_FRONT = ("sft",)  # whose saves the step waits for
KILLS_PER_RUN = 5


@dataclass
class Kill:
    """One SIGKILL: the last step it had logged, and the newest checkpoint then."""

    kind: str
    early: bool  # before this process had done a step
    step: int
    published: int

    @property
    def lost(self) -> int:
        """Steps that had to be done again."""
        return self.step - self.published

    @property
    def begun(self) -> int:
        """The last step whose save had begun for certain: a step came after it."""
        every = SAVE_EVERY[self.kind]
        return max(0, self.step - 1) // every * every

    @property
    def in_flight(self) -> bool:
        """The save that had begun was not yet published."""
        return self.published < self.begun


@dataclass
class Campaign:
    """Runs of one directory."""

    directory: Path
    seed: int
    kills: list[Kill] = field(default_factory=list)
    runs: int = 0

    def prepare(self) -> None:
        """The world, what each stage starts from, and an undisturbed run of each."""
        self.world = make_world(self.directory / "world")
        for kind in STEPS:
            self.finish(kind, self.directory / f"{kind}-undisturbed")
            if kind == "cpt":
                for words in (
                    ["hf", "cpt-undisturbed", "--to", "hf"],
                    ["fp8", "hf", "--to", "fp8"],
                ):
                    run = [sys.executable, "-m", "infir2", "export", *words]
                    subprocess.run(run, cwd=self.directory, check=True, stdout=subprocess.DEVNULL)

    def words(self, kind: str, run_dir: Path) -> list[str]:
        stage = {"cpt": "cpt", "sft": "sft1"}.get(kind, "rl1")
        given = {
            "schedule__total_steps": STEPS[kind],
            "checkpoint__save_every": SAVE_EVERY[kind],
            "train__validate_every": 0,
        }
        given["checkpoint__background"] = str(kind not in IN_FRONT).lower()
        if kind != "cpt":
            given["model__path"] = self.directory / "cpt-undisturbed"
        if stage == "rl1":
            given |= {
                "rollout__model": self.directory / "fp8",
                "rl__overlong_buffer_tokens": 6,
                "rl__max_response_tokens": 24,
            }
            given |= {"rl__mini_batches": 1, "rl__asynchronous": str(kind != "rl").lower()}
            del given["train__validate_every"]
        return options(self.world, run_dir, stage, **given)

    def start(self, kind: str, run_dir: Path) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "infir2", *self.words(kind, run_dir)]
        return subprocess.Popen(
            command,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def finish(self, kind: str, run_dir: Path) -> None:
        code = self.start(kind, run_dir).wait(timeout=600)
        assert code == 0, f"{kind} ended with {code} in {run_dir}"

    def kill_run(self, kind: str, kills: int) -> None:
        """One run, killed so often, then finished and compared."""
        draw = random.Random(f"{self.seed}/{self.runs}")
        self.runs += 1
        run_dir = self.directory / f"{kind}-{self.runs}"
        for _ in range(kills):
            before = (
                newest.step
                if (newest := newest_checkpoint(run_dir / "checkpoints", lambda _: None))
                else 0
            )
            stale = _logged(run_dir)  # lines after the checkpoint, which the resumed process drops
            process = self.start(kind, run_dir)
            if draw.random() < 0.8:  # most of a short process is imports; strike in its work
                while (
                    (logged := _logged(run_dir)) <= before or logged == stale
                ) and process.poll() is None:
                    time.sleep(0.005)
                time.sleep(draw.uniform(0, 1.5))
            else:
                time.sleep(draw.uniform(0, 5))
            if process.poll() is not None:
                assert process.returncode == 0
                break  # it was done before the kill: the rest go to another run
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
            f"{run_dir}: another curve than undisturbed"
        )
        assert_same_state(run_dir, undisturbed)

    def run(self, kills: int) -> None:
        """Alternates between the kinds until so many kills are done, and checks what was lost."""
        while len(self.kills) < kills:
            kind = tuple(STEPS)[self.runs % len(STEPS)]
            self.kill_run(kind, min(KILLS_PER_RUN, kills - len(self.kills)))
        for kill in self.kills:
            # a save begins when the one before it is published: only the last one can be missing; none where the step waits for it
            assert kill.published >= kill.begun - SAVE_EVERY[kill.kind] * (
                kill.kind not in IN_FRONT
            ), kill
            assert kill.kind not in IN_FRONT or kill.lost <= SAVE_EVERY[kill.kind], kill

    def save_seconds(self, kind: str) -> list[float]:
        """From the beginning of each save of the undisturbed run to its publication."""
        return [line["seconds"] for line in lines(self.directory / f"{kind}-undisturbed", "save")]

    def report(self, duration: float) -> str:
        table = [
            "# Random kills",
            "",
            f"`make test-faults`: {len(self.kills)} SIGKILLs at random moments over {self.runs} runs, seed {self.seed}, "
            f"{duration / 60:.1f} minutes. Every run",
            "of the first three kinds ended with the curve of the undisturbed one, bit for bit, and with the same checkpoint (weights,",
            "moments, data position); every asynchronous one had done each step once: numbers of steps, optimizer updates and prompts.",
            "",
            "| kind | kills | before the process had done a step | last step then | while a save was in flight: kills, most steps lost "
            "| else: mean, most | save interval | a save takes, s: mean, most |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for kind in STEPS:
            kills = [kill for kill in self.kills if kill.kind == kind]
            if kills:
                steps, seconds = [kill.step for kill in kills], self.save_seconds(kind)
                flying, resting = (
                    [kill.lost for kill in kills if kill.in_flight == in_flight]
                    for in_flight in (True, False)
                )
                cells = [
                    kind,
                    len(kills),
                    sum(kill.early for kill in kills),
                    f"{min(steps)} to {max(steps)} of {STEPS[kind]}",
                ]
                cells += [f"{len(flying)}, {max(flying)}" if flying else "0"]
                cells += [
                    f"{sum(resting) / len(resting):.1f}, {max(resting)}" if resting else "",
                    SAVE_EVERY[kind],
                ]
                cells += [f"{sum(seconds) / len(seconds):.2f}, {max(seconds):.2f}"]
                table.append(f"| {' | '.join(map(str, cells))} |")
        table += [
            "",
            "A kill loses the steps since the newest published checkpoint. A save begins at every interval, after the one before it",
            "is published: so one interval, and while a save is in flight what was done since it began on top. The campaign checks that",
            f"no kill finds more than the last save missing; and that {' and '.join(IN_FRONT)}, which ran with",
            "`checkpoint.background = false`, never lost more than the interval.",
        ]
        return "\n".join(table) + "\n"


def _logged(run_dir: Path) -> int:
    """The last step in the record, whose last line may be half written."""
    path = run_dir / "metrics.jsonl"
    whole = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in whole if '"kind": "train"' in line), default=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1236)
    parser.add_argument("--to", type=Path, help="file for the results")
    words = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="infir2-campaign-") as directory:
        campaign = Campaign(Path(directory), words.seed)
        campaign.prepare()
        campaign.run(words.kills)
        text = campaign.report(time.monotonic() - began)
    print(text)
    if words.to:
        words.to.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
