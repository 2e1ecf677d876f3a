"""The parts of the page that are text: sample responses, configuration, environment, commands."""

import itertools
import shlex
from collections.abc import Sequence
from html import escape

from infir2.report.read import Row, Run
from infir2.report.text import compact, html_table

SAMPLES_PER_RUN, SAMPLE_CHARACTERS, RECIPE_CHARACTERS = 8, 6_000, 30_000


def pick_samples(samples: Sequence[Row], count: int) -> list[Row]:
    """A quarter from the first step, the others from the last steps.

    Rewarded and unrewarded responses alternate.
    """
    first = min((sample["step"] for sample in samples), default=0)
    early = _alternate([sample for sample in samples if sample["step"] == first], count // 4)
    late = _alternate(sorted(samples, key=lambda sample: -sample["step"])[: 2 * count], count)
    chosen = early + [sample for sample in late if sample not in early]
    return sorted(chosen[:count], key=lambda sample: sample["step"])


def _alternate(samples: Sequence[Row], count: int) -> list[Row]:
    rewarded, others = (
        [sample for sample in samples if (sample["reward"] > 0) is good] for good in (True, False)
    )
    turns = (
        sample for pair in itertools.zip_longest(rewarded, others) for sample in pair if sample
    )
    return list(itertools.islice(turns, count))


def samples_html(run: Run) -> str:
    """Responses that open on a click."""
    items = []
    for sample in pick_samples(run.samples, SAMPLES_PER_RUN):
        quality = "good" if sample["reward"] > 0 else "bad"
        badges = f'<span class="badge {quality}">reward {compact(sample["reward"])}</span>'
        badges += '<span class="badge">truncated</span>' if sample.get("truncated") else ""
        step = f'<span class="step">step {sample["step"]:.0f}</span>' if run.train else ""
        question = escape(" ".join(str(sample.get("prompt")).split())[:160])
        parts = (("Prompt", "prompt"), ("Response", "response"), ("Expected answer", "answer"))
        body = "".join(
            f"<dt>{title}</dt><dd><pre>{_long(str(sample.get(name, '')))}</pre></dd>"
            for title, name in parts
        )
        summary = f'<summary>{step}{badges}<span class="question">{question}</span></summary>'
        items.append(f'<details class="sample">{summary}<dl>{body}</dl></details>')
    return f"<h3>{escape(run.name)}</h3>{''.join(items)}" if items else ""


def _long(text: str) -> str:
    """Escaped text without the middle of a very long one."""
    if len(text) <= SAMPLE_CHARACTERS:
        return escape(text) or "–"
    half = SAMPLE_CHARACTERS // 2
    omitted = f"<i>… {len(text) - 2 * half:,} characters left out …</i>"
    return f"{escape(text[:half])}\n{omitted}\n{escape(text[-half:])}"


def recipe_html(run: Run) -> str:
    """The resolved recipe, folded."""
    text = escape(run.recipe_text[:RECIPE_CHARACTERS])
    more = (
        "\n# … the run directory has the rest" if len(run.recipe_text) > RECIPE_CHARACTERS else ""
    )
    if not text:
        return ""
    summary = f"<summary>{escape(run.name)}/recipe.toml</summary>"
    return f"<details>{summary}<pre>{text}{more}</pre></details>"


def environment_html(runs: Sequence[Run]) -> str:
    """A table for each environment, headed by the runs that share it."""
    sharing: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for run in runs:
        rows = tuple(
            (escape(key), escape(str(value)))
            for key, value in run.environment.items()
            if key != "command"
        )
        sharing.setdefault(rows, []).append(run.name)
    tables = (
        html_table(["", escape(", ".join(names))], rows, text_columns=2)
        for rows, names in sharing.items()
        if rows
    )
    return "".join(tables)


def commands_html(runs: Sequence[Run]) -> str:
    """The command of each run, and where to find every value that it used."""
    commands = [
        command for run in runs if isinstance(command := run.environment.get("command"), list)
    ]
    lines = [shlex.join(["infir2", *map(str, command[1:])]) for command in commands if command]
    if not lines:
        return ""
    commits = sorted(
        {str(run.environment["commit"]) for run in runs if run.environment.get("commit")}
    )
    note = (
        "Each run directory's recipe.toml has every value that was used, "
        "and runs again under a new run.dir."
    )
    note += f" Commit: {', '.join(commits)}." if commits else ""
    return (
        f"<pre>{escape(chr(10).join(dict.fromkeys(lines)))}</pre><p class=note>{escape(note)}</p>"
    )
