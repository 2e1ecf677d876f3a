"""Groups of responses that RL has kept: prompt, all samples, rewards by part, verdicts, and how far
the trainer's log-probability of each token is from the engine's."""

import json
from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby, zip_longest
from pathlib import Path

from infir2.files import open_own
from infir2.report.read import Row, Run, number
from infir2.report.text import compact, counted

KEPT = "kept_rollouts"
PAGE_BYTES = 1_500_000  # of all groups on a page
STEPS_SHOWN = 12
MAX_FILE_BYTES = 2**24
UNREADABLE = (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RecursionError)
LIMITS = (0.01, 0.1, 0.5)  # of |difference|, between the colors
KINDS = {"mixed": "right and wrong", "right": "all right", "wrong": "all wrong"}


def groups_html(run: Run, budget: int = PAGE_BYTES) -> str:
    """The groups of some steps, with filters; "" if the run has kept none."""
    items, steps, size = list[str](), list[int](), 0
    for step in _some(_kept_steps(run.path)):
        for row in _read(run.path / KEPT / f"shown-{step}.jsonl"):
            item = _group(step, row)
            size += len(item)
            if size > budget:
                break
            items.append(item)
            steps.append(step)
    if not items:
        return ""
    options = "".join(f'<option value="{step}">step {step}</option>' for step in sorted({*steps}))
    kinds = "".join(f'<option value="{kind}">{words}</option>' for kind, words in KINDS.items())
    filters = (
        '<input type="search" placeholder="Search" aria-label="Search prompts and responses">'
        f'<select aria-label="Step"><option value="">all steps</option>{options}</select>'
        f'<select aria-label="Verdicts"><option value="">all verdicts</option>{kinds}</select>'
        "<output></output>"
    )
    legend = " ".join(
        f'<span><i class="d{level}">&nbsp;a&nbsp;</i> {"above" if level else "up to"} '
        f"{LIMITS[max(0, level - 1)]}</span>"
        for level in range(4)
    )
    note = "|log-probability of the trainer − of the engine| of a token:"
    return (
        f'<h3>{escape(run.name)}</h3><div class="groups"><div class="filters">{filters}</div>'
        f'<p class="note legend">{note} {legend}</p>{"".join(items)}</div>'
    )


def _kept_steps(run_dir: Path) -> list[int]:
    names = (path.stem.removeprefix("shown-") for path in (run_dir / KEPT).glob("shown-*.jsonl"))
    return sorted(int(name) for name in names if name.isdecimal())


def _some(steps: Sequence[int]) -> Sequence[int]:
    """The last step first, then others at equal distances."""
    stride = max(1, -(-len(steps) // STEPS_SHOWN))
    return list(reversed(steps))[::stride]


def _read(path: Path) -> Iterator[Row]:
    try:
        with open(path, "rb", opener=open_own) as file:
            lines = file.read(MAX_FILE_BYTES).splitlines()
    except OSError:
        return
    for line in lines:
        try:
            row = json.loads(line.decode("utf-8", errors="replace"))
            _group(0, row)
        except UNREADABLE:
            continue
        yield row


def _group(step: int, row: Row) -> str:
    responses, prompt = row["responses"], row["prompt"]
    num_right = sum(response["reason"] == "ok" for response in responses)
    kind = "right" if num_right == len(responses) else "mixed" if num_right else "wrong"
    question = str(prompt["messages"][-1]["content"])
    quality = {"right": "good", "wrong": "bad"}.get(kind, "")
    state = "trained" if row["trained"] else "not trained"
    summary = (
        f'<span class="step">step {step}</span>'
        f'<span class="badge {quality}">{num_right} of {len(responses)} right</span>'
        f'<span class="badge">{state}</span>'
        f'<span class="question">{escape(" ".join(question.split())[:160])}</span>'
    )
    body = (
        f"<dt>Prompt</dt><dd><pre>{escape(question[:4000])}</pre></dd>"
        f"<dt>Expected answer</dt><dd><pre>{escape(str(prompt['answer'])[:400])}</pre></dd>"
        f"<dt>Responses</dt><dd>{''.join(map(_response, responses))}</dd>"
    )
    data = f'class="sample group" data-step="{step}" data-kind="{kind}"'
    return f"<details {data}><summary>{summary}</summary><dl>{body}</dl></details>"


def _response(row: Row) -> str:
    quality = "good" if row["reason"] == "ok" else "bad"
    badges = [f'<span class="badge {quality}">{escape(str(row["reason"]))}</span>']
    parts = {"reward": row["reward"], **row["parts"]}
    badges += [
        f'<span class="badge">{escape(str(name))} {compact(number(value) + 0.0)}</span>'
        for name, value in parts.items()
    ]
    count = counted(int(row["num_tokens"]), "token")
    badges.append(f'<span class="badge">{count}{", truncated" * bool(row["truncated"])}</span>')
    if row["versions"] > 1:
        badges.append(f'<span class="badge">{int(row["versions"])} policy versions</span>')
    text = "".join(_token_html(*each) for each in _colored(row["pieces"], row["differences"]))
    left_out = int(row["num_tokens"]) - len(row["pieces"])
    more = f"\n<i>… {left_out:,} tokens left out …</i>" if left_out > 0 else ""
    summary = f"<summary>{''.join(badges)}</summary>"
    return f'<details class="sample">{summary}<pre>{text}{more}</pre></details>'


def _token_html(level: int, text: str, largest: float) -> str:
    html = escape(text)
    return f'<i class="d{level}" title="{largest:.2g}">{html}</i>' if level else html


def _colored(
    pieces: Sequence[str], differences: Sequence[float]
) -> Iterator[tuple[int, str, float]]:
    """(color, text, largest difference) of tokens beside each other with the same color."""
    pairs = [(str(p), abs(float(d))) for p, d in zip_longest(pieces, differences, fillvalue=0.0)]
    for level, run in groupby(pairs, key=lambda pair: sum(pair[1] > limit for limit in LIMITS)):
        tokens = list(run)
        yield level, "".join(text for text, _ in tokens), max(size for _, size in tokens)
