"""The parts of the page that are text: sample responses, configuration, environment, commands."""

import shlex
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from infir2.report.read import Run, SampleResponse
from infir2.report.text import compact, html_table

SAMPLES_PER_RUN, SAMPLE_CHARACTERS, RECIPE_CHARACTERS = 8, 6_000, 30_000


def pick_samples(samples: Sequence[SampleResponse], count: int) -> list[SampleResponse]:
    """A quarter from the first step, the others from the last ones; rewarded and unrewarded responses and prompts take turns."""
    steps = sorted({sample.step for sample in samples})
    first = [sample for sample in samples if sample.step == steps[0]] if len(steps) > 1 else []
    last = [sample for sample in samples if sample not in first]
    early = _varied(first, count // 4)
    return early + _varied(sorted(last, key=lambda sample: -sample.step)[: 2 * count], count - len(early))


def _varied(samples: Sequence[SampleResponse], count: int) -> list[SampleResponse]:
    left, taken = list(samples), list[SampleResponse]()
    while left and len(taken) < count:

        def likeness(sample: SampleResponse) -> int:
            return sum((sample.reward > 0) == (old.reward > 0) for old in taken) + 2 * sum(sample.prompt == old.prompt for old in taken)

        taken.append(left.pop(left.index(min(left, key=likeness))))
    return sorted(taken, key=lambda sample: sample.step)


def samples_html(run: Run) -> str:
    """Responses that open on a click."""
    items = []
    for sample in pick_samples(run.samples, SAMPLES_PER_RUN) if run.samples else ():
        badges = f'<span class="badge {"good" if sample.reward > 0 else "bad"}">reward {compact(sample.reward)}</span>'
        badges += '<span class="badge">truncated</span>' if sample.truncated else ""
        step = f'<span class="step">step {sample.step}</span>' if run.train else ""
        question = escape(" ".join(sample.prompt.split())[:160])
        parts = (("Prompt", sample.prompt), ("Response", sample.response), ("Expected answer", sample.answer))
        body = "".join(f"<dt>{name}</dt><dd><pre>{_long(text)}</pre></dd>" for name, text in parts)
        summary = f'<summary>{step}{badges}<span class="question">{question}</span></summary>'
        items.append(f'<details class="sample">{summary}<dl>{body}</dl></details>')
    return f"<h3>{escape(run.name)}</h3>{''.join(items)}" if items else ""


def _long(text: str) -> str:
    """Escaped text, with the middle of a very long one left out."""
    if len(text) <= SAMPLE_CHARACTERS:
        return escape(text) or "–"
    half = SAMPLE_CHARACTERS // 2
    return f"{escape(text[:half])}\n<i>… {len(text) - 2 * half:,} characters left out …</i>\n{escape(text[-half:])}"


def recipe_html(run: Run) -> str:
    """The resolved recipe, folded."""
    text = escape(run.recipe_text[:RECIPE_CHARACTERS])
    more = "\n# … the run directory has the rest" if len(run.recipe_text) > RECIPE_CHARACTERS else ""
    return f"<details><summary>{escape(run.name)}/recipe.toml</summary><pre>{text}{more}</pre></details>" if text else ""


def environment_html(runs: Sequence[Run]) -> str:
    """A table with one column when all runs agree, else with one for each run."""
    columns = {run.name: {key: value for key, value in _flatten(run.environment) if key != "command"} for run in runs if run.environment}
    if len(columns) > 1 and all(values == next(iter(columns.values())) for values in columns.values()):
        columns = {"all runs": next(iter(columns.values()))}
    keys = dict.fromkeys(key for values in columns.values() for key in values)
    rows = ([escape(key), *(escape(values.get(key, "–")) for values in columns.values())] for key in keys)
    return html_table(["", *map(escape, columns)], rows, text_columns=len(columns) + 1) if keys else ""


def _flatten(value: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, item in value.items():
        if isinstance(item, dict):
            yield from _flatten(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", ", ".join(map(str, item)) if isinstance(item, list) else str(item)


def commands_html(runs: Sequence[Run]) -> str:
    """The commands as they were given, and where every value is that they used."""
    words = [(run.environment["command"], run) for run in runs if isinstance(run.environment.get("command"), list)]
    lines = [shlex.join(["infir2", *map(str, command[1:])]) for command, _ in words if command]
    if not lines:
        return ""
    commits = sorted({str(run.environment["commit"]) for run in runs if run.environment.get("commit")})
    note = "Each run directory's recipe.toml has every value that was used, and runs again under a new run.dir."
    note += f" Commit: {', '.join(commits)}." if commits else ""
    return f"<pre>{escape(chr(10).join(dict.fromkeys(lines)))}</pre><p class=note>{escape(note)}</p>"
