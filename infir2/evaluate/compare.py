"""`infir2 eval compare`: the difference of two evaluations over the questions that both asked."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from infir2.config.load import load
from infir2.config.schema import EvalRecipe
from infir2.errors import ConfigError, DataError, disk_reason, first_line
from infir2.evaluate.question_scores import QuestionScores
from infir2.evaluate.statistics import paired_difference
from infir2.files import read_json_lines, read_own

# Of output.py and benchmark_run.py, which need torch.
RECIPE, SAMPLES, RESULT = "recipe.toml", "samples.jsonl", "result.json"
MAX_RESULT_BYTES = 1 << 33
Scores = dict[str, list[float]]  # question -> the scores of its known answers
# Which problems were asked is read from the answers: only common ones are compared.
_FREE_KEYS = ("problems", "max_problems")
_FREE_SETTINGS = ("model", "seed", "benchmarks")
_FREE_OF_BENCHMARK = ("data_sha256", "questions")


@dataclass(frozen=True)
class Evaluated:
    """What a directory says: settings that decide the answers, and scores by set and question."""

    directory: Path
    settings: dict[str, Any]
    scores: dict[str, Scores]


@dataclass(frozen=True)
class Comparison:
    """Scores of two evaluations on the questions that both have, as fractions of 1.

    `low` and `high` are the ends of the 95 % interval of `difference` (second - first), paired by
    question. `common` of `first_questions` and of `second_questions` were compared.
    """

    name: str
    first: float
    second: float
    difference: float
    low: float
    high: float
    common: int
    first_questions: int
    second_questions: int

    @property
    def verdict(self) -> str:
        """In words.

        Example: "aime24: the second is better by 4.2 points (95 %: +1.1 to +7.3, paired over 30
        questions)".
        """
        span = (
            f"95 %: {100 * self.low:+.1f} to {100 * self.high:+.1f}, paired over {self.common} "
            f"question{'s' * (self.common != 1)}"
        )
        if self.low > 0 or self.high < 0:
            better = "second" if self.low > 0 else "first"
            return (
                f"{self.name}: the {better} is better by {100 * abs(self.difference):.1f} points "
                f"({span})"
            )
        seen = 50 * (self.high - self.low)
        return (
            f"{self.name}: no difference is shown, {100 * self.difference:+.1f} points ({span}); "
            f"these answers show differences from about {seen:.1f} points on"
        )

    def describe(self, first: str, second: str) -> str:
        """The scores of both and the verdict, in lines."""
        return (
            f"{first}: {100 * self.first:.1f} %\n{second}: {100 * self.second:.1f} %\n"
            f"{self.verdict}."
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"verdict": self.verdict}


def compare(first: Path, second: Path) -> list[Comparison]:
    """One comparison for each set of questions that both evaluations have.

    Raises ConfigError for evaluations whose settings differ, DataError for a directory without
    answers and for evaluations without a common question.
    """
    a, b = read_evaluated(first), read_evaluated(second)
    _check_settings(a, b)
    found = [
        _compared(name, a.scores[name], b.scores[name]) for name in a.scores if name in b.scores
    ]
    found = [each for each in found if each.common]
    if not found:
        raise DataError(
            f"{first} and {second} have no answered question in common: compare evaluations of "
            "the same problems."
        )
    return found


def read_evaluated(directory: Path) -> Evaluated:
    """The settings and scores of an evaluation, also of an unfinished one.

    Raises DataError if the directory is none, or has no answer yet.
    """
    try:
        if (directory / RESULT).exists():
            return _read_benchmarks(directory)
        problems = _scores_of(directory / SAMPLES)
        is_evaluation = (directory / RECIPE).exists()
    except OSError as error:
        raise DataError(f"{directory} cannot be read ({disk_reason(error)}).") from None
    if not problems or not is_evaluation:
        raise DataError(
            f"{directory} has no answers of an evaluation: name the run.dir of `infir2 eval`."
        )
    recipe = load(EvalRecipe, [directory / RECIPE], verb="eval").recipe
    settings = recipe.evaluate.model_dump(exclude=set(_FREE_KEYS))
    named = {f"evaluate.{key}": value for key, value in settings.items()}
    return Evaluated(directory, named, {"problems": problems})


def _scores_of(samples: Path) -> Scores:
    questions = QuestionScores()
    for row in read_json_lines(samples):
        if "sample" in row:
            questions.add(row, float(row["reward"]))
    return questions.scores


def _read_benchmarks(directory: Path) -> Evaluated:
    """A run of benchmarks. Raises OSError, DataError."""
    try:
        result = json.loads(read_own(directory / RESULT, MAX_RESULT_BYTES))
        settings = {
            key: value
            for key, value in result["settings"].items()
            if key not in _FREE_SETTINGS and key.rpartition(".")[2] not in _FREE_OF_BENCHMARK
        }
        scores = {
            name: {
                question["prompt"]: [float(sample["score"]) for sample in question["samples"]]
                for question in questions
                if question["samples"]
            }
            for name, questions in result["questions"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{directory / RESULT} is damaged ({first_line(error)}).") from error
    return Evaluated(directory, settings, scores)


def _check_settings(a: Evaluated, b: Evaluated) -> None:
    common = {name for name in a.scores if name in b.scores}
    keys = a.settings.keys() | b.settings.keys()
    different = [
        f"{key} ({a.settings.get(key)!r} and {b.settings.get(key)!r})"
        for key in sorted(keys)
        if a.settings.get(key) != b.settings.get(key) and _matters(key, common)
    ]
    if different:
        raise ConfigError(
            f"{a.directory} and {b.directory} were made with different settings, so their scores "
            f"do not compare: {', '.join(different)}; evaluate both with the same settings."
        )


def _matters(key: str, common: set[str]) -> bool:
    """Whether a setting decides what is compared: one of a benchmark decides its answers only."""
    benchmark, dot, _ = key.rpartition(".")
    return not dot or benchmark in common or benchmark == "evaluate"


def _compared(name: str, a: Scores, b: Scores) -> Comparison:
    common = [question for question in a if question in b]
    if not common:
        return Comparison(name, 0.0, 0.0, 0.0, 0.0, 0.0, 0, len(a), len(b))
    first, second = ([sum(s[q]) / len(s[q]) for q in common] for s in (a, b))
    difference = paired_difference(first, second)
    means = (fmean(first), fmean(second))
    return Comparison(name, *means, *difference, len(common), len(a), len(b))
