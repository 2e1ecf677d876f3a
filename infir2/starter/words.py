"""Inspections as text for a terminal and as data."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from infir2.evaluate.contamination import Contamination
from infir2.starter.inspection import Inspection, Rendered

_BARS, _WIDTH = 12, 40
_MAX_CHARACTERS = 1500  # of a rendered row


def as_json(found: Inspection, sequence_tokens: int) -> dict[str, Any]:
    """Counts, lengths and packing of one source."""
    return {
        "source": found.section.path,
        "kind": found.kind,
        "rows": found.num_rows,
        "bytes": found.num_bytes,
        "rows_read": found.num_read,
        "unusable": dict(found.reasons),
        "tokens": found.total_tokens,
        "trained_fraction": round(found.trained_tokens / max(1, sum(found.lengths)), 4),
        "lengths": found.percentiles() if found.lengths else {},
        "duplicates": found.duplicates,
        "packing": found.packing(sequence_tokens) if found.lengths else {},
        "fields": found.section.model_dump(exclude_defaults=True, exclude={"path"}),
    }


def describe(found: Inspection, sequence_tokens: int) -> str:
    """The lines about one source."""
    read = "" if found.num_read == found.num_rows else f" ({found.num_read:,} of them read)"
    lines = [
        f"{found.section.path}: {found.num_rows:,} {found.kind}{read}, "
        f"{found.num_bytes / 1e6:,.1f} MB{_fields(found)}"
    ]
    if found.kind == "prompts":
        lines.append("  kind        of infir2 rl and eval; --kind messages: train on the answers")
    if found.reasons:
        counts = ", ".join(f"{number} {reason}" for reason, number in found.reasons.most_common())
        lines.append(f"  unusable    {found.reasons.total():,} rows: {counts}; {found.example}")
    if not found.lengths:
        return "\n".join([*lines, "  no row can be used"])
    lengths = ", ".join(f"{name} {value:,}" for name, value in found.percentiles().items())
    lines.append(f"  tokens      {found.total_tokens:,} in total; a row has {lengths}")
    if found.kind == "messages":
        share = found.trained_tokens / sum(found.lengths)
        lines.append(f"  trained     {share:.1%} of the tokens, those of the assistant's turns")
    lines.append(f"  duplicates  {_duplicates(found)}")
    if found.kind != "prompts":
        lines.append(f"  packing     {_packing(found, sequence_tokens)}")
    return "\n".join([*lines, *histogram(found.lengths)])


def _fields(found: Inspection) -> str:
    named = found.section.model_dump(exclude_defaults=True, exclude={"path"})
    return "".join(f', {name} = "{value}"' for name, value in named.items())


def _duplicates(found: Inspection) -> str:
    if not found.duplicates:
        return "none among the rows that were read"
    share = found.duplicates / found.num_read
    return (
        f"{found.duplicates:,} rows ({share:.1%}) repeat an earlier one but for case and spaces, "
        f"first {found.first_duplicate}"
    )


def _packing(found: Inspection, sequence_tokens: int) -> str:
    packed = found.packing(sequence_tokens)
    total = packed["windows"] * found.num_rows / found.num_read
    text = (
        f"about {total:,.0f} windows of {sequence_tokens:,} tokens, {packed['fill']:.1%} full, "
        f"{packed['rows_per_window']:,.1f} rows each"
    )
    if packed["too_long"]:
        fate = "are split" if found.kind == "documents" else "are dropped"
        text += f"; {packed['too_long']:,.0f} of the rows read are longer and {fate}"
    return text


def histogram(lengths: Sequence[int]) -> Iterator[str]:
    """A bar for each twelfth of the lengths, on a logarithmic axis if they differ widely."""
    low, high = max(1, min(lengths)), max(lengths) + 1
    space = np.geomspace if high > 20 * low else np.linspace
    edges = np.unique(space(low, high, _BARS + 1).round().astype(int))
    counts = np.histogram(lengths, edges)[0] if len(edges) > 1 else np.array([len(lengths)])
    pairs = list(pairwise(edges)) or [(low, high)]
    for (first, end), count in zip(pairs, counts, strict=True):
        bar = "█" * max(int(count > 0), round(_WIDTH * count / counts.max()))
        yield f"  {first:>8,} - {end - 1:<8,} {bar} {count:,}"


def shown(row: Rendered) -> list[tuple[str, bool]]:
    """The runs of a row with the middle left out if it is long."""
    left, runs = _MAX_CHARACTERS, []
    for text, trained in row.runs:
        if len(text) > left:
            half = max(40, left // 2)
            text = f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"
        runs.append((text, trained))
        left = max(120, left - len(text))
    return runs


def contamination(found: Contamination | None) -> str:
    """The verdict, and the questions that share most."""
    if found is None:
        return "contamination: not looked for; --problems FILE names test questions"
    *questions, verdict = found.describe().splitlines()
    more = [f"  ... and {len(questions) - 10} more"] if len(questions) > 10 else []
    lines = [f"  {question}" for question in questions[:10]]
    return "\n".join([f"contamination: {verdict}", *lines, *more])
