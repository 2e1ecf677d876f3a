"""Reading run directories: what a killed, diverged or resumed run leaves behind."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from report_runs import demo_recipe, describe, evaluation, train_rows, write

from infir2.errors import DataError
from infir2.report.read import read_run, read_runs


def test_half_written_last_line_and_garbage_are_counted_not_fatal(tmp_path: Path) -> None:
    write(tmp_path, train_rows(5, 3.0, 1.0, 0))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\xfe not json\n[1, 2]\n{"kind": "train", "step": 6, "lo')
    run = read_run(tmp_path)
    assert run.train.steps.tolist() == [1, 2, 3, 4, 5]
    assert "metrics.jsonl: 3 unreadable lines left out" in run.notes
    assert "no recipe.toml" in run.notes


def test_values_that_are_not_finite_become_nan(tmp_path: Path) -> None:
    losses = ["1.5", "null", "NaN", "-Infinity", '"text"', "1e400", f"{10**400}"]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(f'{{"kind": "train", "step": {i}, "loss": {x}}}\n' for i, x in enumerate(losses))
    )
    np.testing.assert_array_equal(read_run(tmp_path).train["loss"], [1.5] + [np.nan] * 6)


def test_the_later_line_of_a_step_stands_and_steps_are_ordered(tmp_path: Path) -> None:
    write(
        tmp_path,
        [
            {"kind": "train", "step": step, "loss": loss}
            for step, loss in ((1, 1.0), (2, 2.0), (3, 3.0), (2, 20.0))
        ],
    )
    assert read_run(tmp_path).train["loss"].tolist() == [1.0, 20.0, 3.0]


def test_totals_count_the_steps_between_logged_lines(tmp_path: Path) -> None:
    write(
        tmp_path, [{"kind": "train", "step": step, "seconds": 2.0} for step in range(10, 101, 10)]
    )
    assert read_run(tmp_path).total("seconds") == pytest.approx(2.0 * 91)


def test_a_directory_of_runs_is_read_bases_first(tmp_path: Path) -> None:
    order = [run.name for run in read_runs([demo_recipe(tmp_path / "demo")])]
    trained = [name for name in order if not name.startswith("eval-")]
    assert trained == ["cpt", "cpt-bf16", "sft1", "sft2", "rl1", "rl2"]


def test_a_checkpoint_is_a_base_too(tmp_path: Path) -> None:
    describe(tmp_path / "stable", "cpt")
    describe(tmp_path / "decay", "cpt", base="elsewhere/stable/checkpoints/step-300")
    stable, decay = read_runs([tmp_path / "stable", tmp_path / "decay"])
    assert decay.starts_from(stable)
    assert not stable.starts_from(decay)


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for side in ("a", "b"):
        write(describe(tmp_path / side / "cpt", "cpt"), train_rows(2, 2.0, 1.0, 0))
        write(
            describe(tmp_path / side / "sft", "sft", base=str(tmp_path / side / "cpt")),
            train_rows(2, 2.0, 1.0, 0),
        )
    runs = read_runs([tmp_path / "a", tmp_path / "b", tmp_path / "a"])
    assert [run.name for run in runs] == ["a/cpt", "a/sft", "b/cpt", "b/sft"]
    assert runs[3].starts_from(runs[2])
    assert not runs[3].starts_from(runs[0])


def test_a_path_without_runs_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no run"):
        read_runs([tmp_path])


def test_an_evaluation_line_with_little_in_it(tmp_path: Path) -> None:
    write(
        tmp_path,
        [
            evaluation(3, 0.5),
            {"kind": "evaluation", "step": 4, "avg_at_k": None, "by_difficulty": None},
        ],
    )
    run = read_run(tmp_path)
    assert run.evaluations["avg_at_k"][0] == 0.5
    second = run.evaluation
    assert second is not None
    assert (second.k, second.by_difficulty) == (0, {})
    assert np.isnan(second.avg_at_k)


def test_recipe_and_environment_that_cannot_be_parsed(tmp_path: Path) -> None:
    run_dir = describe(tmp_path / "run", "cpt")
    write(run_dir, train_rows(2, 2.0, 1.0, 0))
    (run_dir / "recipe.toml").write_text("[model\n")
    (run_dir / "environment.json").write_text(json.dumps([1]))
    run = read_run(run_dir)
    assert (run.recipe, run.environment, run.fp8, run.base) == ({}, {}, None, "")
    assert [note.split(" cannot")[0] for note in run.notes] == ["recipe.toml", "environment.json"]


def test_lines_with_different_names_texts_and_nulls_share_columns(tmp_path: Path) -> None:
    lines = [
        {"kind": "train", "step": 1, "loss": 3.0, "skipped": False},
        {"kind": "train", "step": 3, "skipped": True, "note": "text", "loss": 10**400},
        {"step": 2, "kind": "train", "loss": None, "reward": 0.5},
        {"kind": ["train"], "step": 4, "loss": 1.0},
        {"kind": "train", "step": "5", "loss": 1.0},
        {"kind": "train", "step": 1, "loss": 2.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    train = read_run(tmp_path).train
    assert train.steps.tolist() == [1.0, 2.0, 3.0]
    np.testing.assert_array_equal(train["loss"], [2.0, np.nan, np.nan])
    np.testing.assert_array_equal(train["reward"], [np.nan, 0.5, np.nan])
    np.testing.assert_array_equal(train["skipped"], [np.nan, np.nan, 1.0])
    assert not train.has("note")
    assert not train.has("absent")


def test_a_long_run_is_read_as_numbers(tmp_path: Path) -> None:
    num_lines, names = 2000, [f"metric_{i}" for i in range(40)]
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(num_lines):
            row = {"kind": "train", "step": step} | {name: step + 0.5 for name in names}
            file.write(json.dumps(row) + "\n")
    read_run(tmp_path)  # imports and caches
    tracemalloc.start()
    try:
        train = read_run(tmp_path).train
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert train["metric_7"][-1] == num_lines - 0.5
    assert peak < 4 * 8 * num_lines * len(names)  # the numbers are 8 bytes each
