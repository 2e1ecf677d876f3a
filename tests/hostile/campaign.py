"""Hostile files, answers and programs for every reader of what a stranger wrote; failing disks.

    python tests/hostile/campaign.py --cases 400 --to docs/results/hostile.md   (make test-hostile)

The files are mutants of good ones (`readers.py`, `mutate_*.py`), each within bounds of time and
memory (`bounded.py`). Then every STEP-th file operation of three training runs fails once
(`tests/faults/file_faults.py`). Exits with 1 if any case failed.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "faults"))

import bounded
import file_faults
import readers

KINDS = ("cpt", "resume", "rl")


def run_readers(number: int, only: str, directory: Path) -> list[bounded.Tally]:
    """The readers whose names contain `only`."""
    tallies = []
    for reader in readers.READERS:
        if only in reader.name:
            count = max(1, round(number * reader.share))
            tallies.append(bounded.run(reader, count, directory / "cases"))
            slowest = f"slowest: {tallies[-1].slowest}"
            print(_row(tallies[-1]), slowest, *tallies[-1].failures, sep="\n", flush=True)
    return tallies


def run_file_faults(step: int) -> tuple[list[str], list[str]]:
    """A sentence for each kind of run, and one for each kind that failed."""
    done, failures = [], []
    for kind in KINDS:
        try:
            done.append(file_faults.run_campaign((kind,), step))
        except AssertionError as error:
            failures.append(f"{kind}: {error}")
        print(*done[-1:], *failures, sep="\n", flush=True)
    return done, failures


def report(tallies: list[bounded.Tally], done: list[str], options: str, minutes: float) -> str:
    """The results as Markdown; `options` are those of this run."""
    table = [
        "# Hostile files",
        "",
        f"`make test-hostile` with `{options}`: {sum(tally.cases for tally in tallies)} cases and"
        f" failing disks, seed {readers.SEED},",
        f"{minutes:.1f} minutes on {os.cpu_count()} processors.",
        "",
        f"A case fails if it ends in anything but a result or one sentence, takes more than"
        f" {bounded.CASE_SECONDS:.0f} s or",
        f"{bounded.CASE_BYTES >> 20} MiB, leaves other files, or (answers, programs that cheat)"
        " earns a reward.",
        "",
        "| reader | cases | refused with a sentence | read | failures | longest, s | most, MiB |",
        "|---|---|---|---|---|---|---|",
        *map(_row, tallies),
        "",
        "For answers and programs, refused means that they earned nothing. An honest program with a"
        " line that",
        "attacks the jail may earn its reward; it may not break the jail.",
        "",
        *(
            []
            if not done
            else ["Runs whose disk failed, and which then continued bit for bit:", ""]
        ),
        *(f"- {line}" for line in done),
        *(f"- failure: {failure.splitlines()[0]}" for t in tallies for failure in t.failures),
    ]
    return "\n".join(table).rstrip() + "\n"


def _row(tally: bounded.Tally) -> str:
    cells = [tally.name, tally.cases, tally.refused, tally.read, len(tally.failures)]
    cells += [f"{tally.seconds:.1f}", f"{tally.grown / 2**20:.0f}"]
    return f"| {' | '.join(map(str, cells))} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    cases = int(os.environ.get("INFIR2_HOSTILE_CASES", "400"))
    parser.add_argument("--cases", type=int, default=cases, help="cases of most readers")
    parser.add_argument("--only", default="", help="run readers whose name contains this")
    parser.add_argument("--step", type=int, default=10, help="fail every STEP-th file operation")
    parser.add_argument("--to", type=Path, help="file for the results")
    flags = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="infir2-hostile-") as directory:
        tallies = run_readers(flags.cases, flags.only, Path(directory))
    done, failures = ([], []) if flags.only else run_file_faults(flags.step)
    options = f"--cases {flags.cases} --step {flags.step}"
    text = report(tallies, done, options, (time.monotonic() - began) / 60)
    print(text)
    if flags.to:
        flags.to.write_text(text, encoding="utf-8")
    return int(bool(failures or any(tally.failures for tally in tallies)))


if __name__ == "__main__":
    sys.exit(main())
