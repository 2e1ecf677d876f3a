"""The parts of the page that are text: sample responses, configuration, environment."""

import itertools
from collections.abc import Mapping, Sequence
from html import escape

from infir2.report.commands import Paths
from infir2.report.read import Run
from infir2.report.samples import Row
from infir2.report.text import compact, html_table

SAMPLES_PER_RUN, SAMPLE_CHARACTERS, RECIPE_CHARACTERS = 24, 6_000, 30_000
SAMPLES_BYTES = 600_000  # of all samples on a page


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


def samples_html(run: Run, budget: int = SAMPLES_BYTES) -> str:
    """Responses that open on a click, with a filter; as many as fit into `budget` characters."""
    items, chosen, size = list[str](), list[Row](), 0
    for sample in pick_samples(run.samples, SAMPLES_PER_RUN):
        item = _sample_html(sample, bool(run.train))
        size += len(item)
        if items and size > budget:
            break
        items.append(item)
        chosen.append(sample)
    if not items:
        return ""
    steps = {f"{row['step']:.0f}": f"step {row['step']:.0f}" for row in chosen}
    verdicts = {verdict_of(row): verdict_of(row) for row in chosen}
    selects = {"step": ("all steps", steps)} if len(steps) > 1 else {}
    bar = filters_html(selects | {"verdict": ("all verdicts", verdicts)})
    note = f'<p class="note">{len(items)} of {run.num_samples:,} recorded samples.</p>'
    box = f'<div class="items" tabindex="0">{"".join(items)}</div>'
    return f'<h3>{escape(run.name)}</h3><div class="filtered">{bar}{note}{box}</div>'


def verdict_of(sample: Row) -> str:
    """What the reward said of a response; right or wrong if only its reward is recorded."""
    verdict = sample.get("verdict")
    if isinstance(verdict, str) and verdict:
        return "right" if verdict == "ok" else verdict[:40]
    return "right" if sample["reward"] > 0 else "wrong"


def _sample_html(sample: Row, has_steps: bool) -> str:
    verdict, quality = verdict_of(sample), "good" if sample["reward"] > 0 else "bad"
    badges = f'<span class="badge {quality}">{escape(verdict)}</span>'
    badges += f'<span class="badge">reward {compact(sample["reward"])}</span>'
    badges += '<span class="badge">truncated</span>' if sample.get("truncated") else ""
    step = f'<span class="step">step {sample["step"]:.0f}</span>' if has_steps else ""
    question = escape(" ".join(str(sample.get("prompt")).split())[:160])
    parts = {"Prompt": "prompt", "Response": "response", "Expected answer": "answer"}
    parts |= {"Answer found": "extracted"} if "extracted" in sample else {}
    body = "".join(
        f"<dt>{title}</dt><dd><pre>{_long(str(sample.get(name, '')))}</pre></dd>"
        for title, name in parts.items()
    )
    body += f"<dt>Verdict</dt><dd>{escape(verdict)}</dd>"
    summary = f'<summary>{step}{badges}<span class="question">{question}</span></summary>'
    data = f'data-step="{sample["step"]:.0f}" data-verdict="{escape(verdict)}"'
    return f'<details class="sample" {data}>{summary}<dl>{body}</dl></details>'


def filters_html(selects: Mapping[str, tuple[str, Mapping[str, str]]]) -> str:
    """A search and selects, which the page's script shows and acts on.

    `selects` has, by the name of a data attribute, the text for all items and {value: text}.
    """
    html = '<input type="search" placeholder="Search" aria-label="Search prompts and responses">'
    for name, (everything, values) in selects.items():
        options = "".join(
            f'<option value="{escape(value)}">{escape(text)}</option>'
            for value, text in values.items()
        )
        html += f'<select name="{name}" aria-label="{name}">'
        html += f'<option value="">{everything}</option>{options}</select>'
    return f'<div class="filters" hidden>{html}<output></output></div>'


def _long(text: str) -> str:
    """Escaped text without the middle of a very long one."""
    if len(text) <= SAMPLE_CHARACTERS:
        return escape(text) or "–"
    half = SAMPLE_CHARACTERS // 2
    omitted = f"<i>… {len(text) - 2 * half:,} characters left out …</i>"
    return f"{escape(text[:half])}\n{omitted}\n{escape(text[-half:])}"


def recipe_html(run: Run, paths: Paths) -> str:
    """The resolved recipe, folded, without the paths of the machine."""
    text = escape(paths.portable(run.recipe_text[:RECIPE_CHARACTERS]))
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
