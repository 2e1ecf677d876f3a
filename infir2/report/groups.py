"""Groups of responses that RL has kept: prompt, all samples, rewards by part, verdicts, and how far
the trainer's log-probability of each token is from the engine's."""

import json
from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby, zip_longest
from pathlib import Path

from infir2.files import open_own
from infir2.report.appendix import filters_html
from infir2.report.read import Run
from infir2.report.samples import Row, number
from infir2.report.text import compact, counted

KEPT = "kept_rollouts"
PAGE_BYTES = 1_500_000  # of all groups on a page
STEPS_SHOWN = 12
MAX_FILE_BYTES = 2**24
UNREADABLE = (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RecursionError)
LIMITS = (0.01, 0.1, 0.5)  # of |difference|, between the colors
KINDS = {"mixed": "right and wrong", "right": "all right", "wrong": "all wrong"}


def groups_html(run: Run, budget: int = PAGE_BYTES) -> str:
    """The groups of the newest steps, with filters; "" if the run has kept none.

    At most `budget` characters: of a step at a time, so that memory does not grow with the run.
    """
    kept = _kept_steps(run.path)
    shown, items, steps, size = kept[:STEPS_SHOWN], list[str](), list[int](), 0
    left_out = num_cut = 0
    for step in shown:
        path = run.path / KEPT / f"shown-{step}.jsonl"
        num_cut += _is_cut(path)
        for row in _read(path):
            item = _group(step, row)
            if size + len(item) > budget:
                left_out += 1
                continue
            size += len(item)
            items.append(item)
            steps.append(step)
    if not items and not left_out and not num_cut:
        return ""
    texts = {str(step): f"step {step}" for step in sorted({*steps}, reverse=True)}
    selects = {"step": ("all steps", texts), "kind": ("all verdicts", KINDS)}
    return (
        f'<h3>{escape(run.name)}</h3><div class="filtered">{filters_html(selects)}'
        f'<p class="note">{_extent(len(kept), len(shown), left_out, num_cut)}</p>'
        f'<p class="note legend">{_legend()}</p><div class="items">{"".join(items)}</div></div>'
    )


def _extent(num_kept: int, num_shown: int, left_out: int, num_cut: int) -> str:
    """Which of the kept rollouts are shown, in sentences."""
    text = f"Groups of {counted(num_shown, 'step')}."
    if num_shown < num_kept:
        text = f"Groups of the newest {num_shown} of {num_kept:,} steps that were kept."
    if left_out:
        text += f" To bound the page {counted(left_out, 'group')} of them left out."
    if num_cut:
        text += f" Of {counted(num_cut, 'file')} above {MAX_FILE_BYTES >> 20} MiB the first part."
    return text


def _legend() -> str:
    levels = " ".join(
        f'<span><i class="d{level}">&nbsp;a&nbsp;</i> {"above" if level else "up to"} '
        f"{LIMITS[max(0, level - 1)]}</span>"
        for level in range(4)
    )
    return f"|log-probability of the trainer − of the engine| of a token: {levels}"


def _kept_steps(run_dir: Path) -> list[int]:
    """The newest first."""
    names = (path.stem.removeprefix("shown-") for path in (run_dir / KEPT).glob("shown-*.jsonl"))
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def _is_cut(path: Path) -> bool:
    """Whether the file is so large that only its beginning is read."""
    try:
        return path.lstat().st_size > MAX_FILE_BYTES
    except OSError:
        return False


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
