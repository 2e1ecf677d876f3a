"""metrics.jsonl: a resumed run keeps its good lines, whatever stands between them."""

import json
from pathlib import Path

import pytest

from infir2.checkpoint.record import MetricsWriter

GOOD = [
    {"kind": "train", "step": 1, "loss": 2.5},
    {"kind": "validation", "step": 2, "validation_loss": 2.25},
    {"kind": "train", "step": 2, "loss": 2},
]
DAMAGED = [
    '{"step": 1, "loss": 9}',
    '{"kind": "train", "loss": 9}',
    '{"kind": "train", "step": "x", "loss": 9}',
    '{"kind": "train", "step": NaN, "loss": 9}',
    '{"kind": ["train"], "step": 1, "loss": 9}',
    '{"kind": {"train": 1}, "step": 1, "loss": 9}',
    '{"kind": "train", "step": 1, "loss": "9"}',
    '{"kind": "train", "step": 1, "loss": [9]}',
    '{"kind": "train", "step": 1, "loss": Infinity}',
    '{"kind": "train", "step": 1, "loss": null}',
    '{"kind": "train", "step": 1, "loss": true}',
    '{"kind": "train", "step": 1e999, "loss": 9}',
    "7",
    "",
    "{",
    "[" * 100_000,
    '{"a": ' * 100_000,
    "\x00\xff",
    "9" * 6_000,
]


def metrics(tmp_path: Path, text: str, resumed_step: int = 2) -> MetricsWriter:
    (tmp_path / "metrics.jsonl").write_text(text)
    return MetricsWriter(tmp_path, resumed_step)


@pytest.mark.parametrize("damage", DAMAGED, ids=[text[:30] for text in DAMAGED])
def test_a_damaged_line_stops_no_resume_and_is_no_value(tmp_path: Path, damage: str) -> None:
    lines = [json.dumps(row) for row in GOOD]
    writer = metrics(tmp_path, "\n".join([lines[0], damage, *lines[1:]]) + "\n")
    assert writer.values("train", "loss") == [(1, 2.5), (2, 2)]
    assert writer.values("validation", "validation_loss") == [(2, 2.25)]
    writer.close()


def test_lines_without_a_step_are_dropped_like_those_after_the_checkpoint(tmp_path: Path) -> None:
    later = {"kind": "train", "step": 3, "loss": 1}
    metrics(tmp_path, "".join(f"{line}\n" for line in (*DAMAGED[:6], json.dumps(later)))).close()
    (kept,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert kept == DAMAGED[0], "a line without a kind may be of samples.jsonl"
