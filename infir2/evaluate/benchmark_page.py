"""result.html: one self-contained page with the scores and every question, failures first."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from infir2.evaluate.benchmark_result import BenchmarkResult, Question
from infir2.evaluate.evalscope import Sample

SHOWN_CHARACTERS = 3000  # of the end of a response; answers.jsonl has all of it
_STYLE = """\
body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse}
td,th{padding:.2rem .7rem;text-align:right;border-bottom:1px solid #ccc}
td:first-child,th:first-child{text-align:left}pre{white-space:pre-wrap;background:#f5f5f5;padding:.6rem}
summary{cursor:pointer}.wrong{color:#a40000}.right{color:#006400}details details{margin-left:1.5rem}
@media(prefers-color-scheme:dark){body{background:#161616;color:#ddd}pre{background:#222}
.wrong{color:#ff8a80}.right{color:#8bd18b}}"""
_HEADINGS = (
    *("benchmark", "score", "95 %", "pass@k", "majority@k", "k", "questions", "missing"),
    *("truncated", "empty", "answerless", "tokens", "p95", "seconds"),
)


def result_page(
    settings: Mapping[str, Any],
    results: Sequence[BenchmarkResult],
    questions: Sequence[Sequence[Question]],
) -> str:
    """The page as HTML. It loads nothing and runs no script."""
    rows = "".join(f"<tr>{_cells(_row(result), 'td')}</tr>" for result in results)
    known = "".join(
        f"<tr><td>{escape(key)}</td><td>{escape(str(value))}</td></tr>"
        for key, value in settings.items()
    )
    parts = "".join(
        f"<h2>{escape(result.name)}</h2>{_questions(own)}"
        for result, own in zip(results, questions, strict=True)
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Evaluation</title>'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\">"
        f"<style>{_STYLE}</style><h1>{escape(str(settings.get('model', '')))}</h1>"
        f"<table><tr>{_cells(_HEADINGS, 'th')}</tr>{rows}</table>"
        f"<details><summary>settings</summary><table>{known}</table></details>{parts}</html>\n"
    )


def _row(result: BenchmarkResult) -> list[str]:
    interval = "–"
    if result.low is not None and result.high is not None:
        interval = f"{100 * result.low:.1f} to {100 * result.high:.1f}"
    tokens = (result.response_tokens_mean, result.response_tokens_p95)
    rates = (result.truncated_fraction, result.empty_fraction, result.answerless_fraction)
    return [
        result.name,
        _percent(result.mean),
        interval,
        _percent(result.pass_at_k.get(str(result.k))),
        _percent(result.majority_at_k),
        str(result.k),
        str(result.num_questions),
        str(result.missing),
        *map(_percent, rates),
        *("–" if value is None else f"{value:,.0f}" for value in tokens),
        f"{result.seconds:,.0f}",
    ]


def _questions(questions: Sequence[Question]) -> str:
    """Every question with its samples; those with the lowest score first, without answer last."""

    def rank(number: int) -> tuple[bool, float, int]:
        known = bool(questions[number].samples)
        return not known, questions[number].score if known else 0.0, number

    order = sorted(range(len(questions)), key=rank)
    return "".join(_question(number, questions[number]) for number in order)


def _question(number: int, question: Question) -> str:
    right = sum(sample.score > 0 for sample in question.samples)
    kind = "right" if question.samples and right == len(question.samples) else "wrong"
    head = (
        f'<span class="{kind}">{right} of {len(question.samples)}</span> question {number + 1}'
        f" {escape(question.prompt[:100])}"
    )
    samples = sorted(question.samples, key=lambda sample: sample.score)
    return (
        f"<details><summary>{head}</summary><pre>{escape(question.prompt)}</pre>"
        f"<p>answer: {escape(question.target) or '–'}</p>{''.join(map(_sample, samples))}</details>"
    )


def _sample(sample: Sample) -> str:
    kind = "right" if sample.score > 0 else "wrong"
    cut = ", truncated" if sample.truncated else ""
    text = sample.text
    if len(text) > SHOWN_CHARACTERS:
        text = f"[{len(text) - SHOWN_CHARACTERS:,} characters]\n{text[-SHOWN_CHARACTERS:]}"
    return (
        f'<details><summary><span class="{kind}">{kind}</span> {escape(sample.answer[:60]) or "–"}'
        f" ({sample.tokens:,} tokens{cut})</summary><pre>{escape(text)}</pre></details>"
    )


def _cells(values: Sequence[str], tag: str) -> str:
    return "".join(f"<{tag}>{escape(value)}</{tag}>" for value in values)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"
