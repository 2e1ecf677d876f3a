"""recipes/parity and bench/parity.py: a shortened study on a CPU, statistics in closed form."""

import gzip
import json
import math
import random
import sys
import tomllib
import zlib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import parity  # noqa: E402
import parity_data  # noqa: E402
import parity_outside  # noqa: E402
import parity_report  # noqa: E402

from infir2.config.load import load  # noqa: E402
from infir2.config.schema import TrainRecipe  # noqa: E402
from infir2.data.indexed import IndexedDocuments  # noqa: E402
from infir2.model import Decoder  # noqa: E402
from infir2.numerics.ops import replaced  # noqa: E402

STUDIES = tomllib.loads((ROOT / "recipes/parity/studies.toml").read_text())
TINY = [
    "--model.shape.hidden_size=32",
    "--model.shape.num_layers=2",
    "--model.shape.num_heads=1",
    "--model.shape.num_kv_heads=1",
    "--model.shape.head_dim=32",
    "--model.shape.ffn_size=64",
    "--data.sequence_tokens=32",
    "--data.micro_batch_tokens=64",
    "--data.batch_sequences=2",
    "--train.validation_batches=1",
    "--run.device=cpu",
    "--run.threads=1",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of bench/parity_data.py, from a small corpus without packages."""
    folder = tmp_path_factory.mktemp("parity")
    draw = random.Random(0)
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    rows = [{"text": " ".join(draw.choices(words, k=200))} for _ in range(300)]
    (folder / "corpus").mkdir()
    with gzip.open(folder / "corpus/words.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in [*rows, rows[0], {"text": "short"}])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity_data, "PACKAGES", ())
        patch.setattr(parity_data, "PIECE_TOKENS", 150)
        to = ["--to", str(folder / "data/parity"), "--vocab-size=300"]
        parity_data.main(["--corpus", str(folder / "corpus"), *to])
    return folder


def test_documents_are_used_once_held_out_and_cut(data: Path) -> None:
    about = json.loads((data / "data/parity/about.json").read_text())
    counts = {name: about[name]["documents"] for name in ("train", "validation")}
    assert sum(counts.values()) == 300
    assert 0 < counts["validation"] < 30
    for name in counts:
        pieces = IndexedDocuments(data / "data/parity" / name)
        lengths = [len(pieces.read(index)["token_ids"]) for index in range(len(pieces))]
        assert max(lengths) == 150
        assert sum(lengths) == about[name]["tokens"]
        assert len(lengths) == about[name]["pieces"]


def test_no_document_is_more_of_the_validation_than_its_share(tmp_path: Path) -> None:
    checksums = (
        (zlib.crc32(text.encode()), text) for text in (f"{i} " * 20_000 for i in range(99))
    )
    held_out = next(text for checksum, text in checksums if checksum % parity_data.HELD_OUT == 0)
    with gzip.open(tmp_path / "long.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in (held_out, "a " * 50_000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity_data, "PACKAGES", ())
        counts = parity_data.split(tmp_path, tmp_path)
    assert counts["validation"]["long"] == parity_data.HELD_OUT_CHARACTERS
    assert counts["train"]["long"] == 100_000  # training text stays whole


def test_a_shortened_study_runs_and_its_table_has_every_arm(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(data)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = ["run", "seeds", "--to=runs", "--seeds", "1", "--steps=5", "--jobs=3", *TINY]
    assert parity.main(command) == 0, capsys.readouterr().out
    capsys.readouterr()
    assert parity.main(command) == 0
    assert capsys.readouterr().out == ""  # every run is finished: none started again
    assert parity.main(["collect", "runs", "--to=parity.json"]) == 0
    study = json.loads(Path("parity.json").read_text())["seeds"]
    assert {run["arm"]: run["steps"] for run in study["runs"]} == dict.fromkeys(study["arms"], 5)
    first = {run["arm"]: run["validation"][0] for run in study["runs"]}
    assert first["bf16"][1] == pytest.approx(first["pow2"][1], rel=1e-2)  # the same weights
    assert {row["step"] for row in study["runs"][0]["operands"]} == {1, 2, 3, 4, 5}
    table = parity_report.table(study)
    assert [line.split(" | ")[0] for line in table[2:]] == ["| bf16", "| pow2", "| fp32"]
    assert "one seed" in table[3]
    lines = parity_report.worst_layers(study["runs"][0]["operands"])
    assert sum(line.startswith("| gradient") for line in lines) == 3
    pytest.importorskip("matplotlib", reason="plots need matplotlib (pip install 'infir2[plots]')")
    assert parity.main(["report", "parity.json", "--to=report"]) == 0
    assert len(list(Path("report").glob("*.png"))) == 4


@pytest.mark.parametrize("name", STUDIES)
def test_every_arm_of_a_study_is_a_valid_recipe_of_its_length(name: str, tmp_path: Path) -> None:
    study = STUDIES[name]
    for steps in (study["steps"], 60):
        runs = parity.plan(study, tmp_path, steps, study["seeds"], [])
        assert len(runs) == len(study["arms"]) * len(study["seeds"])
        for run in runs:
            words = run.command[4:]
            files = [word for word in words if not word.startswith("--")]
            recipe = load(TrainRecipe, files, [word for word in words if word not in files]).recipe
            assert recipe.run.seed == run.seed
            assert recipe.schedule.total_steps in (steps, steps - steps // 10)
            if run.after is not None:
                start = int(recipe.checkpoint.branch_from.rpartition("-")[2])
                schedule = recipe.schedule
                assert start == schedule.total_steps - schedule.decay_steps
                assert start % recipe.checkpoint.save_every == 0
                assert run.after in [other.dir for other in runs]
    assert study["baseline"] in study["arms"]


def test_the_recipes_own_length_is_that_of_their_study(tmp_path: Path) -> None:
    for name in ("seeds", "large"):
        for run in parity.plan(STUDIES[name], tmp_path, STUDIES[name]["steps"], [1], []):
            files = [word for word in run.command[4:] if not word.startswith("--")]
            given = [word for word in run.command[4:] if word.startswith("--")]
            own, planned = (
                load(TrainRecipe, files, []).recipe,
                load(TrainRecipe, files, given).recipe,
            )
            assert own.schedule == planned.schedule


def test_the_gap_is_paired_by_seed_and_has_students_interval() -> None:
    baseline = {seed: 2.0 + 0.1 * seed for seed in range(1, 6)}
    gaps = (0.1, 0.2, 0.3, 0.4, 0.5)  # per cent: mean 0.3, deviation sqrt(0.025)
    arm = {seed: baseline[seed] * (1 + gaps[seed - 1] / 100) for seed in baseline}
    found = parity_report.gap(arm | {9: 1.0}, baseline)
    assert found is not None
    assert found["seeds"] == 5
    assert found["mean"] == pytest.approx(0.3)
    assert found["half_width"] == pytest.approx(2.776 * math.sqrt(0.025 / 5))
    assert 0.1 < found["low"] < 0.25
    assert 0.35 < found["high"] < 0.5
    assert parity_report.gap({1: 2.0}, {2: 2.0}) is None
    one = parity_report.gap({1: 2.1}, baseline)
    assert one is not None
    assert math.isnan(one["half_width"])


def test_arms_of_other_software_are_trained_by_their_own_script(tmp_path: Path) -> None:
    runs = {run.arm: run for run in parity.plan(STUDIES["outside"], tmp_path, 60, [1], [])}
    assert runs["bf16"].command[1:4] == ["-m", "infir2", "cpt"]
    ours, other = runs["bf16"].command, runs["torchao-rowwise"].command
    assert other[2:4] == [str(parity_outside.__file__), "rowwise"]
    assert [word for word in other[4:] if "run.dir" not in word] == [
        word for word in ours[4:] if "run.dir" not in word
    ]


@pytest.mark.parametrize("kind", ["torch", "rowwise", "tensorwise"])
def test_the_layers_of_other_software_compute_the_same_model(kind: str) -> None:
    if kind != "torch":
        pytest.importorskip("torchao", reason="the comparison needs torchao (pip install torchao)")
    files = [str(ROOT / "recipes/parity/small.toml"), str(ROOT / "recipes/parity/bf16.toml")]
    recipe = load(TrainRecipe, files, TINY).recipe
    assert recipe.model.shape is not None
    tokens, bounds = torch.arange(64) % 50, torch.tensor([0, 40, 64])
    positions = torch.cat([torch.arange(40), torch.arange(24)])
    results = {}
    for name in ("ours", kind):
        model = Decoder.from_shape(recipe.model.shape, 300, seed=1)
        names = [name for name, _ in model.named_parameters()]
        if name == kind:
            parity_outside.convert(model, kind)
        assert names == [name for name, _ in model.named_parameters()]
        with replaced(parity_outside.Outside if name == kind else lambda base: base):
            logits = model(tokens, positions, bounds)
            logits.square().mean().backward()
        gradient = model.model.layers[1].mlp.up_proj.weight.grad
        results[name] = [logits.detach(), gradient]
    for found, expected in zip(results[kind], results["ours"], strict=True):
        error = torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected)
        assert error < (0.01 if kind == "torch" else 0.3)  # FP8 keeps three bits
        assert kind == "torch" or error > 0.001


def test_the_loss_of_new_text_is_that_of_the_second_half() -> None:
    train = [(step, 9.0 if step <= 4 else step - 1.0) for step in range(1, 9)]
    run = {"arm": "a", "seed": 3, "finished": True, "steps": 8, "train": train}
    study = {"runs": [run, run | {"seed": 4, "finished": False}], "baseline": "a", "arms": ["a"]}
    assert parity_report.late_losses(study, "a") == {3: 5.5}
    assert (
        "| a | 1 | 5.50000 |"
        in parity_report.late_table(study | {"runs": [run | {"tokens_per_second": 7}]})[2]
    )


def test_what_an_arm_costs_alone(tmp_path: Path) -> None:
    samples = ["0.1, 0, 9000"] * 4 + ["600.0, 80, 20480", "[N/A], 80, 1", "800.0, 90, 10240"] * 2
    (tmp_path / "a-1.gpu.csv").write_text("\n".join(samples))
    gpu = parity_report._read_gpu(tmp_path / "a-1.gpu.csv", start=0.5)
    assert gpu["mean_watts"] == 700  # not the first half, of imports
    runs = [{"arm": "a", "tokens_per_second": 500_000, "gpu": gpu}, {"arm": "b", "gpu": {}}]
    lines = parity_report.cost_table({"runs": runs}, price=3.6)
    cells = "| a | 500,000 | 85 % | 20.0 GiB | 700 W | 0.39 kWh | $2.00 |"
    assert lines[2:] == [cells]
    assert parity_report.cost_table({"runs": runs[1:]}, price=3.6) == []


def test_a_run_alone_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '500.0, 50, 1024'\nexec sleep 60\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    command = [sys.executable, "-c", "import time; time.sleep(0.5)"]
    for jobs, name in ((1, "alone-1"), (2, "shared-1")):
        run = parity.Run(name[:-2], 1, tmp_path / name, command, None)
        run.dir.mkdir()
        assert parity.run_all([run], jobs, 0) == 0
        assert run.watcher is None or run.watcher.poll() is not None
    assert parity_report._read_gpu(tmp_path / "alone-1.gpu.csv")["mean_watts"] == 500
    assert not (tmp_path / "shared-1.gpu.csv").exists()


def test_a_run_that_waits_for_another_starts_after_it(tmp_path: Path) -> None:
    runs = parity.plan(STUDIES["wsd"], tmp_path, 60, [1], [])
    ready = parity._next_ready([run for run in runs if run.after is not None])
    assert ready is None
    (tmp_path / "stable-1").mkdir()
    (tmp_path / "stable-1/finished.json").write_text("{}\n")
    ready = parity._next_ready([run for run in runs if run.after is not None])
    assert ready is not None
    assert ready.arm == "branch-long"


def test_a_failed_run_ends_with_its_log_and_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('broken')"]
    waits = parity.Run("b", 1, tmp_path / "b-1", command, after=tmp_path / "a-1")
    assert parity.run_all([parity.Run("a", 1, tmp_path / "a-1", command, None), waits], 1, 0) == 1
    assert "broken" in capsys.readouterr().out


def test_the_limit_stops_what_runs_and_exits_75(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    runs = [parity.Run("a", seed, tmp_path / f"a-{seed}", command, None) for seed in (1, 2)]
    assert parity.run_all(runs, 1, 0.5) == 1  # which does not save on SIGTERM
    command = [
        sys.executable,
        "-c",
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); time.sleep(60)",
    ]
    runs = [parity.Run("a", seed, tmp_path / f"b-{seed}", command, None) for seed in (1, 2)]
    assert parity.run_all(runs, 1, 1.5) == 75
