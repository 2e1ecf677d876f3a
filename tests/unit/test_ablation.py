"""bench/ablation.py: arms are recipes, runs share servers, stop in time and are not repeated."""

import argparse
import itertools
import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import ablation  # noqa: E402

from infir2.config.load import load  # noqa: E402
from infir2.config.schema import RlRecipe  # noqa: E402

# Writes its time of use to argv[2], as one who uses the server argv[4] names.
STUB = """
import json, os, pathlib, sys, time
run, use, seconds = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), float(sys.argv[3])
run.mkdir()
begun = time.monotonic()
(run / "metrics.jsonl").write_text(json.dumps({"kind": "train", "step": 1}) + "\\n")
time.sleep(seconds)
row = [sys.argv[4:], os.environ.get("INFIR2_ENGINE_KEY"), begun, time.monotonic()]
with use.open("a") as file:
    file.write(json.dumps(row) + "\\n")
sys.exit(7 if run.name == "fails" else 0)
"""


def options(folder: Path, *words: str) -> argparse.Namespace:
    required = ["--model", "model", "--to", str(folder), "--out", str(folder / "out.json")]
    return ablation.arguments_of(["run", *required, *words])


def test_every_arm_is_a_valid_recipe_of_its_precisions(tmp_path: Path) -> None:
    given = options(tmp_path, "--engines", "native", "sglang", "--", "--rl.group_size=4")
    runs = ablation.plan(given)
    assert len({run.dir for run in runs}) == len(runs) == 2 * 7 * 3
    assert [run.seed for run in runs[:7]] == [1] * 7
    for run in runs:
        urls = ["--rollout.urls=['http://127.0.0.1:20000']"] if run.engine == "sglang" else []
        recipe = load(RlRecipe, [str(ablation.RECIPE)], [*run.command[5:], *urls]).recipe
        assert recipe.fp8.enabled == (run.arm.trainer == "fp8")
        assert recipe.rollout.precision == run.arm.engine
        assert recipe.rollout.model.endswith(run.arm.format)
        if "fp8" in run.arm[1:]:
            assert recipe.fp8.scale_format == run.arm.scales
        assert (recipe.run.seed, recipe.rl.group_size) == (run.seed, 4)


def stub_run(folder: Path, name: str, engine: str, seconds: float) -> ablation.Run:
    command = [sys.executable, "-c", STUB, str(folder / name), str(folder / "use"), str(seconds)]
    return ablation.Run(ablation.Arm("", "bf16", "bf16"), engine, 1, folder / name, command)


def use_of(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "use").read_text().splitlines()]


def test_a_server_has_one_run_at_a_time_and_a_failed_run_frees_it(tmp_path: Path) -> None:
    place = SimpleNamespace(url="http://127.0.0.1:1", api_key="a key")
    servers = ablation.Servers(free={"bf16": [SimpleNamespace(place=place)]})  # type: ignore
    names = [("a", "sglang"), ("fails", "sglang"), ("c", "sglang"), ("d", "native")]
    runs = [stub_run(tmp_path, name, engine, 0.2) for name, engine in names]
    codes = ablation.run_all(runs, servers, 4, 60)
    assert codes == {"a": 0, "fails": 7, "c": 0, "d": 0}
    served = [row for row in use_of(tmp_path) if row[0]]
    assert [row[:2] for row in served] == [[['--rollout.urls=["http://127.0.0.1:1"]'], "a key"]] * 3
    assert all(one[3] <= other[2] for one, other in itertools.pairwise(served))
    again = ablation.run_all(runs[2:], servers, 4, 60)
    assert again == {}  # both are finished


def test_the_time_limit_stops_runs_and_what_has_no_server_ends_it(tmp_path: Path) -> None:
    runs = [stub_run(tmp_path, "long", "native", 60), stub_run(tmp_path, "none", "sglang", 0)]
    begun = time.monotonic()
    codes = ablation.run_all(runs, ablation.Servers(), 1, 1.5)
    assert list(codes) == ["long"]
    assert codes["long"] != 0
    assert ablation.run_all(runs[1:], ablation.Servers(), 1, 60) == {}
    assert time.monotonic() - begun < 30
    assert not runs[0].finished


def test_the_tables_have_means_over_seeds_and_students_interval(tmp_path: Path) -> None:
    runs = []
    for seed, rise in ((1, 0.2), (2, 0.3), (3, 0.4)):
        run = stub_run(tmp_path, f"native-{seed}", "native", 0)
        run.dir.mkdir()
        run.dir.with_suffix(".finished").touch()
        rows = [{"kind": "save", "step": 9}]
        for step in range(1, 11):
            reward = 0.5 if step < 6 else 0.5 + rise
            row = {"kind": "train", "step": step, "reward": reward, "seconds": 1.0}
            mismatch = {"mismatch_kl": step * 0.1 * seed, "mismatch_equal": 1.0}
            rows.append(row | (mismatch if step < 10 else {}))
        (run.dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = ablation.collect(run, 0)
        assert found is not None
        assert found["at"]["last"] == {
            "kl": pytest.approx(0.9 * seed),
            "equal": 1.0,
        }  # step 10 trained nothing
        assert found["equal"] == [1.0] * 9 + [None]
        runs.append(found)
    rows = [line[2:-2].split(" | ") for line in ablation.tables(runs) if " | " in line]
    mismatch, reward = (dict(zip(rows[n], rows[n + 1], strict=True)) for n in (0, 2))
    assert mismatch["k3, step 1"] == "20000 [10000, 30000]"  # in 1e-5
    assert mismatch["median"] == "100000 [50000, 150000]"
    assert (mismatch["largest"], mismatch["equal"], mismatch["99.9 %"]) == ("270000", "1", "")
    width = 4.303 * 0.1 / math.sqrt(3)
    assert reward["rise"] == f"+0.300 ± {width:.3f}"
    assert (reward["seeds"], reward["first 3 steps"]) == ("3 of 3", "0.500")
    runs[0]["finished"] = False
    assert "2 of 3" in ablation.tables(runs)[-1]


def test_the_published_tables_are_those_of_the_raw_file() -> None:
    results = ROOT / "docs" / "results"
    raw = json.loads((results / "ablation-h200-2026-11-30.json").read_text())
    published = (results / "rl.md").read_text().splitlines()
    assert set(ablation.tables(raw["runs"])) <= set(published)
