"""The result of benchmarks: scores with intervals, what is missing, and every question."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from infir2.evaluate.benchmarks import Benchmark
from infir2.evaluate.evalscope import Sample
from infir2.evaluate.statistics import (
    average_at_k,
    known_and_bounds,
    majority_at_k,
    pass_at_k,
    tokens_mean_and_p95,
)


@dataclass(frozen=True)
class Question:
    """One question with its answers that are known."""

    prompt: str
    target: str
    samples: list[Sample] = field(default_factory=list)

    @property
    def score(self) -> float:
        """The mean of the known answers; NaN without one."""
        scores = [sample.score for sample in self.samples]
        return sum(scores) / len(scores) if scores else math.nan


@dataclass(frozen=True)
class BenchmarkResult:
    """Scores of one benchmark, as fractions of 1.

    `mean` with its interval `low` to `high` is that of the known answers; `all_wrong` and
    `all_right` are what it would be with all missing ones wrong or right. `pass_at_k` and
    `majority_at_k` are those of questions with all answers. `beyond_context` of the missing answers
    cannot be had: their prompts are longer than the model's context. `evalscope_score` is from
    evalscope's report.
    """

    name: str
    mean: float | None
    low: float | None
    high: float | None
    all_wrong: float
    all_right: float
    k: int
    pass_at_k: dict[str, float]
    majority_at_k: float | None
    num_questions: int
    known: int
    missing: int
    beyond_context: int
    truncated_fraction: float | None
    empty_fraction: float | None
    answerless_fraction: float | None
    response_tokens_mean: float | None
    response_tokens_p95: float | None
    seconds: float
    evalscope_score: float | None

    @property
    def is_complete(self) -> bool:
        """Whether running again cannot add an answer."""
        return self.missing <= self.beyond_context

    @property
    def agrees(self) -> bool:
        """Whether evalscope's report has the same score, to four decimals."""
        if self.mean is None or self.evalscope_score is None:
            return self.mean is self.evalscope_score
        return self.missing > 0 or abs(self.mean - self.evalscope_score) < 5.1e-5

    def describe(self) -> str:
        """One line for people.

        Example: "aime24: 41.2 % (95 %: 33.0 to 50.1), pass@32 70.0 %, 30 questions x 32, 1.2 %
        truncated, 12,400 tokens".
        """
        if self.mean is None or self.low is None or self.high is None:
            return f"{self.name}: no answer is known of {self.num_questions} questions"
        best = (
            f", pass@{self.k} {100 * self.pass_at_k[str(self.k)]:.1f} %" if self.pass_at_k else ""
        )
        text = (
            f"{self.name}: {100 * self.mean:.1f} % (95 %: {100 * self.low:.1f} to "
            f"{100 * self.high:.1f}){best}, {self.num_questions} questions x {self.k}, "
            f"{100 * (self.truncated_fraction or 0):.1f} % truncated, "
            f"{self.response_tokens_mean or 0:,.0f} tokens"
        )
        if not self.missing:
            return text
        beyond = f" ({self.beyond_context} beyond the context)" if self.beyond_context else ""
        return (
            f"{text}; {self.missing} of {self.known + self.missing} answers are missing{beyond}: "
            f"{100 * self.all_wrong:.1f} % if they are wrong, {100 * self.all_right:.1f} % if right"
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def gather_questions(prompts: Sequence[str], samples: Sequence[Sample]) -> list[Question]:
    """The answers by question, in evalscope's order. `prompts` are the questions as copied."""
    own: list[list[Sample]] = [[] for _ in prompts]
    numbers = _numbers(prompts, samples)
    for sample in samples:
        own[numbers[sample.subset, sample.question]].append(sample)
    return [
        Question(prompt, known[0].target if known else "", known)
        for prompt, known in zip(prompts, own, strict=True)
    ]


def _numbers(prompts: Sequence[str], samples: Sequence[Sample]) -> dict[tuple[str, int], int]:
    """The number of each question; evalscope numbers those of each subset from 0."""
    asked = {(sample.subset, sample.question): sample.prompt for sample in samples}
    if len({subset for subset, _ in asked}) < 2:
        return {each: each[1] for each in asked}
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    return {
        each: next(number for number in order if prompts[number].strip() in prompt)
        for each, prompt in asked.items()
    }


def score_benchmark(
    benchmark: Benchmark,
    questions: Sequence[Question],
    k: int,
    beyond_context: int,
    seconds: float,
    evalscope_score: float | None,
) -> BenchmarkResult:
    """The scores of questions that were each asked k times."""
    scores = [[sample.score for sample in question.samples] for question in questions]
    answered = [own for own in scores if own]
    whole = [question for question in questions if len(question.samples) == k]
    samples = [sample for question in questions for sample in question.samples]
    _, worst, best = known_and_bounds([[*own, *[None] * (k - len(own))] for own in scores])
    mean, low, high = average_at_k(answered) if answered else (None, None, None)
    tokens = tokens_mean_and_p95([sample.tokens for sample in samples])
    return BenchmarkResult(
        benchmark.name,
        mean=mean,
        low=low,
        high=high,
        all_wrong=worst,
        all_right=best,
        k=k,
        pass_at_k=_pass_rates(whole, k),
        majority_at_k=_mean([_majority(question) for question in whole]),
        num_questions=len(questions),
        known=len(samples),
        missing=len(questions) * k - len(samples),
        beyond_context=beyond_context,
        truncated_fraction=_mean([sample.truncated for sample in samples]),
        empty_fraction=_mean([not sample.text.strip() for sample in samples]),
        answerless_fraction=_mean([not sample.answer.strip() for sample in samples]),
        response_tokens_mean=tokens[0] if samples else None,
        response_tokens_p95=tokens[1] if samples else None,
        seconds=round(seconds, 1),
        evalscope_score=evalscope_score,
    )


def _pass_rates(questions: Sequence[Question], k: int) -> dict[str, float]:
    """pass@1, 2, 4, ... and k, by name."""
    if not questions:
        return {}
    right = [sum(sample.score > 0 for sample in question.samples) for question in questions]
    ks = sorted({*(2**power for power in range(k.bit_length()) if 2**power <= k), k})
    return {str(n): sum(pass_at_k(k, c, n) for c in right) / len(right) for n in ks}


def _majority(question: Question) -> float:
    return majority_at_k([(sample.answer, sample.score > 0) for sample in question.samples])


def _mean(values: Sequence[float] | Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None
