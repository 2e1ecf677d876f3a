"""Runs of one stage in the same charts: which belong together, what differs, axes, smoothing."""

import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
from report_runs import demo_recipe, describe, rl_rows, train_rows, write

from infir2.errors import DataError
from infir2.report import write_report
from infir2.report.axes import Clock, cumulative
from infir2.report.overlay import differing_keys, stages
from infir2.report.read import read_runs


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    """Two SFT runs with other learning rates, the second twice as slow and half as long."""
    for name, steps, rate in (("fast", 200, 1e-3), ("slow", 100, 2e-3)):
        rows = train_rows(steps, 3.0, 1.0, 0, rate)
        for row in rows:
            row |= {"seconds": 2.0 * 200 / steps} if "seconds" in row else {}
        write(describe(tmp_path / name, "sft", base="models/m", rate=rate), rows)
    return [tmp_path / "fast", tmp_path / "slow"]


def test_stages_of_a_chain_stay_apart_and_equal_ones_meet(tmp_path: Path) -> None:
    runs = read_runs([demo_recipe(tmp_path / "demo")])
    names = [[run.name for run in group] for group in stages([run for run in runs if run.train])]
    assert names == [["cpt", "cpt-bf16"], ["sft1"], ["sft2"], ["rl1"], ["rl2"]]
    for side in ("a", "b"):
        write(describe(tmp_path / side / "sft", "sft", "models/m"), train_rows(2, 2.0, 1.0, 0))
        base = str(tmp_path / side / "sft")
        write(describe(tmp_path / side / "rl", "rl", base), rl_rows(2, 0.1, 0.2, 0))
    runs = read_runs([tmp_path / "a", tmp_path / "b"])
    names = [[run.name for run in group] for group in stages(runs)]
    assert names == [["a/sft", "b/sft"], ["a/rl", "b/rl"]]


def test_runs_that_have_no_checkpoint_yet_know_their_kind(two: list[Path]) -> None:
    (two[1] / "checkpoints/step-100/state.json").unlink()
    assert len(stages(read_runs(two))) == 1


def test_the_keys_that_differ_are_listed_and_run_dir_is_not(two: list[Path]) -> None:
    with (two[0] / "recipe.toml").open("a") as file:
        file.write('[[data.sources]]\npath = "a"\n[[data.sources]]\npath = "b"\nweight = 2.0\n')
    with (two[1] / "recipe.toml").open("a") as file:
        file.write('[[data.sources]]\npath = "a"\n')
    assert differing_keys(read_runs(two)) == {
        "schedule.learning_rate": ["0.001", "0.002"],
        "data.sources.1.path": ["b", "–"],
        "data.sources.1.weight": ["2.0", "–"],
    }


def test_runs_of_one_stage_share_their_charts(two: list[Path], tmp_path: Path) -> None:
    page = write_report(two, tmp_path / "page.html").read_text()
    section = page[page.index('<section id="runs-of-one-stage">') : page.index('id="runs"')]
    loss = section[section.index("Training loss") :]
    chart = loss[: loss.index("</figure>")]
    assert re.findall(r'class="line c(\d)"[^>]*data-label="(\w+)"', chart)[:2] == [
        ("0", "fast"),
        ("1", "slow"),
    ]
    assert '<span class="key line k0">fast</span><span class="key line k1">slow</span>' in chart
    assert '<th scope="row">schedule.learning_rate</th><td>0.001</td><td>0.002</td>' in section
    assert "<summary>Charts of fast</summary>" in page, "its own charts are folded"
    alone = write_report(two[:1], tmp_path / "page.html").read_text()
    assert "Runs of one stage" not in alone
    assert "Charts of fast" not in alone


def test_many_runs_have_different_lines(tmp_path: Path) -> None:
    for index in range(10):
        write(describe(tmp_path / f"s{index}", "sft", "m"), train_rows(90, 3.0, 1.0, index))
    page = write_report([tmp_path], tmp_path / "page.html").read_text()
    section = page[page.index('id="runs-of-one-stage"') :]
    keys = re.findall(r'<span class="key (\w+ k\d)">s\d</span>', section)[:10]
    assert len(set(keys)) == 10


def test_totals_of_steps_between_lines_and_of_nothing() -> None:
    values = np.array([2.0, np.nan, 4.0])
    assert cumulative(np.array([10.0, 20.0, 30.0]), values).tolist() == [0.0, 2.0, 32.0, 72.0]
    assert cumulative(np.array([]), np.array([])).tolist() == [0.0]
    steps = np.array([0.0, 1.0, 3.0])
    clock = Clock("a", steps, np.array([0.0, 10.0, 40.0]), np.zeros(3))
    assert clock.at("tokens", np.array([-5.0, 0.5, 2.0, 9.0])).tolist() == [0.0, 5.0, 25.0, 40.0]
    assert clock.at("step", steps) is steps


@pytest.mark.parametrize(
    ("axis", "title", "ratio"),
    [("step", "step", 0.5), ("tokens", "trained tokens", 0.5), ("time", "minutes", 1.0)],
)
def test_charts_lie_along_steps_tokens_or_time(
    two: list[Path], tmp_path: Path, axis: str, title: str, ratio: float
) -> None:
    """The slow run ends after half the steps and tokens of the other, and after the same time."""
    page = write_report(two, tmp_path / "page.html", axis).read_text()
    figure = page[page.index('id="runs-of-one-stage"') :]
    figure = figure[figure.index("<svg") : figure.index("</svg>")]
    ends = []
    for name in ("fast", "slow"):
        (path,) = re.findall(rf'class="line c\d" d="([^"]+)"[^>]*data-label="{name}"', figure)
        ends.append(float(re.findall(r"[ML]([\d.]+)", path)[-1]) - 50)
    assert ends[1] / ends[0] == pytest.approx(ratio, abs=0.03)
    assert f"{title}</text>" in figure
    assert f'data-axis="{axis}"' in page


def test_the_page_has_what_its_script_draws_with(two: list[Path], tmp_path: Path) -> None:
    """Clocks of both runs, the raw values beside the smoothed ones, and the axes to choose."""
    page = write_report(two, tmp_path / "page.html").read_text()
    clocks = json.loads(html.unescape(re.findall(r'data-clocks="([^"]+)"', page)[0]))
    assert clocks["fast"][0][0] == 0
    assert clocks["fast"][0][-1] == 200
    assert clocks["fast"][2][-1] == pytest.approx(400.0)
    for x, y, raw in re.findall(r'data-x="([^"]+)"[^>]*data-y="([^"]+)" data-raw="([^"]+)"', page):
        assert len(x.split()) == len(y.split()) == len(raw.split())
    assert '<option value="tokens">' in page
    row = {"kind": "train", "step": 1, "loss": 2.0}
    write(tmp_path / "bare", [row, row | {"step": 2}])
    page = write_report([tmp_path / "bare"], tmp_path / "page.html").read_text()
    assert '<option value="step">' in page
    assert '<option value="tokens">' not in page
    with pytest.raises(DataError, match=r"bare: its metrics.jsonl has no numbers for --axis time"):
        write_report([tmp_path / "bare"], tmp_path / "page.html", "time")


def test_flat_charts_fold_away(tmp_path: Path) -> None:
    rows = rl_rows(60, 0.2, 0.7, 0)
    for row in rows:
        row |= {"clip_fraction": 0.0, "capped_fraction": 0.0} if row["kind"] == "train" else {}
    write(describe(tmp_path / "rl", "rl"), rows)
    page = write_report([tmp_path / "rl"], tmp_path / "page.html").read_text()
    folded = page[page.index('<details class="flat">') :]
    summary = folded[: folded.index("</summary>")]
    assert "flat charts: " in summary
    assert "Clipped and capped: clip 0.00 %, importance capped 0.00 %" in html.unescape(summary)
    assert "Learning rate: 1e−5" in summary
    assert "Reward" not in summary


def test_training_and_validation_have_columns_of_their_own(two: list[Path], tmp_path: Path) -> None:
    (two[0] / "events.out.tfevents.1796072097.host.1.0").touch()
    page = write_report(two, tmp_path / "page.html").read_text()
    section = page[page.index('<section id="runs">') :]
    head = re.findall(r'<th scope="col"[^>]*>([^<]*)', section[: section.index("</thead>")])
    for name in ("training loss", "validation loss", "TFLOP/s", "trained tokens", "started"):
        assert name in head
    assert "2026-11-30 20:54 UTC" in section
