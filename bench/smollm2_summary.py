"""Scores and validation losses of bench/smollm2_study.py's runs, and FP8 against BF16.

A difference is over the questions that both formats answered with the same seed: of each question
the mean over seeds, then mean and 95 % interval over questions. The range over seeds stands beside
it, since the interval has only the questions' part of the noise.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from infir2.evaluate.question_scores import QuestionScores
from infir2.files import read_json_lines

FORMATS = ("bf16", "pow2", "fp32")
NORMAL_95 = 1.96

Scores = dict[str, float]  # mean reward of each question


def scores(evaluation: Path) -> Scores:
    """{question: mean over its responses} of a finished evaluation, {} of another."""
    if not any(row["kind"] == "evaluation" for row in _rows(evaluation / "metrics.jsonl")):
        return {}
    questions = QuestionScores()
    for row in read_json_lines(evaluation / "samples.jsonl"):
        questions.add(row, float(row["reward"]))
    return {question: statistics.fmean(own) for question, own in questions.scores.items()}


def _rows(path: Path) -> list[dict[str, object]]:
    return read_json_lines(path) if path.exists() else []


def difference(first: Mapping[int, Scores], second: Mapping[int, Scores]) -> str:
    """`first` less `second`, both by seed, in points; empty without a common seed."""
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return ""
    means = [100 * (_mean(first[seed]) - _mean(second[seed])) for seed in seeds]
    questions = sorted(first[seeds[0]].keys() & second[seeds[0]].keys())
    each = [
        100 * statistics.fmean(first[seed][name] - second[seed][name] for seed in seeds)
        for name in questions
    ]
    half = NORMAL_95 * statistics.stdev(each) / math.sqrt(len(each)) if len(each) > 1 else math.nan
    return (
        f"{statistics.fmean(means):+.2f} [{statistics.fmean(each) - half:+.2f}, "
        f"{statistics.fmean(each) + half:+.2f}]; seeds {min(means):+.2f} to {max(means):+.2f}"
    )


def _mean(found: Scores) -> float:
    return statistics.fmean(found.values())


def validation(run: Path) -> tuple[float, float] | None:
    """(first, last) validation loss of a training, None without one."""
    losses = [
        row["validation_loss"] for row in _rows(run / "metrics.jsonl") if "validation_loss" in row
    ]
    return (float(str(losses[0])), float(str(losses[-1]))) if losses else None


def summary(root: Path, stages: Sequence[str], tasks: Sequence[str]) -> list[str]:
    """Tables of Markdown: accuracies, and validation losses, of each stage and format."""
    lines = [
        "| stage, task | format | accuracy of each seed, % | less BF16, points |",
        "|---|---|---|---|",
    ]
    for stage in stages:
        for task in tasks:
            lines += _accuracies(root, stage, task)
    lines += ["", "| stage | format | validation loss of each seed, first to last | less BF16, % |"]
    lines += ["|---|---|---|---|"]
    for stage in stages:
        lines += _losses(root, stage)
    return lines


def _of_seeds(root: Path, form: str) -> dict[int, Path]:
    return {int(path.name.rpartition("-")[2]): path for path in sorted(root.glob(f"{form}-[0-9]*"))}


def _accuracies(root: Path, stage: str, task: str) -> list[str]:
    found = {}
    for form in FORMATS:
        runs = _of_seeds(root, form).items()
        read = {seed: scores(path / f"eval-{stage}-{task}") for seed, path in runs}
        found[form] = {seed: own for seed, own in read.items() if own}
    lines = []
    for form, by_seed in found.items():
        if by_seed:
            shown = ", ".join(f"{100 * _mean(own):.2f}" for own in by_seed.values())
            less = difference(by_seed, found["bf16"]) if form != "bf16" else ""
            lines.append(f"| {stage}, {task} | {form} | {shown} | {less} |")
    return lines


def _losses(root: Path, stage: str) -> list[str]:
    found = {}
    for form in FORMATS:
        read = {seed: validation(path / stage) for seed, path in _of_seeds(root, form).items()}
        found[form] = {seed: own for seed, own in read.items() if own}
    lines = []
    for form, by_seed in found.items():
        if by_seed:
            shown = ", ".join(f"{first:.4f} to {last:.4f}" for first, last in by_seed.values())
            both = by_seed.keys() & found["bf16"].keys() if form != "bf16" else ()
            gaps = [100 * (by_seed[s][1] / found["bf16"][s][1] - 1) for s in sorted(both)]
            less = ", ".join(f"{gap:+.3f}" for gap in gaps)
            lines.append(f"| {stage} | {form} | {shown} | {less} |")
    return lines
