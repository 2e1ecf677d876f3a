"""`infir2 eval`: the scores it writes, and the directories that it refuses before it samples."""

import errno
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stages import RECIPES, SHAPE, begin, lines

import infir2.evaluate.output
import infir2.evaluate.run
import infir2.terminal
from infir2.cli import main
from infir2.config.schema import ShapeSection
from infir2.data import load_tokenizer
from infir2.errors import CheckpointError
from infir2.files import read_json_lines
from infir2.model import Decoder, exported_weights, write_hf


@pytest.fixture(scope="module")
def model_dir(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = world / "tokenizer"
    vocab_size = load_tokenizer(tokenizer).vocab_size
    decoder = Decoder.from_shape(ShapeSection(**SHAPE), vocab_size, seed=1)
    directory = tmp_path_factory.mktemp("model") / "hf"
    write_hf(directory, exported_weights(decoder), decoder.config.to_hf(), tokenizer)
    return directory


@pytest.fixture
def command(world: Path, model_dir: Path, tmp_path: Path) -> list[str]:
    """An evaluation of two problems into tmp_path/eval."""
    return [
        "eval",
        str(RECIPES / "eval.toml"),
        f"--model.path={model_dir}",
        f"--run.dir={tmp_path / 'eval'}",
        "--run.threads=1",
        f"--evaluate.problems.0.path={world / 'heldout.jsonl'}",
        "--evaluate.max_problems=2",
        "--evaluate.samples=2",
        "--evaluate.max_response_tokens=4",
    ]


@pytest.fixture
def sampling_is_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        infir2.evaluate.run, "answer_problems", lambda *_: pytest.fail("it sampled")
    )


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_the_scores_are_written_and_a_finished_evaluation_is_not_overwritten(
    command: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert main(command) == 0
    assert "on 2 problems" in capsys.readouterr().err
    (line,) = lines(tmp_path / "eval", "evaluation")
    assert (line["step"], line["k"], line["num_problems"]) == (1, 2, 2)
    rows = (tmp_path / "eval" / "samples.jsonl").read_text().splitlines()
    assert len(rows) == 4
    own = {"problem", "prompt", "response", "answer", "extracted", "reward", "tokens", "truncated"}
    assert {"step", *own} <= json.loads(rows[0]).keys()
    assert 0 <= line["low"] <= line["avg_at_k"] <= line["high"] <= 1
    assert line["response_tokens_mean"] <= line["response_tokens_p95"] <= 4
    before = content(tmp_path / "eval")
    assert {"recipe.toml", "environment.json", "inputs.json"} < before.keys()
    monkeypatch.setattr(
        infir2.evaluate.run, "answer_problems", lambda *_: pytest.fail("it sampled")
    )
    assert main(command) == 0
    error = capsys.readouterr().err
    assert f"{tmp_path / 'eval'} has this evaluation, finished; nothing was sampled." in error
    assert "on 2 problems" in error
    assert content(tmp_path / "eval") == before


@pytest.mark.usefixtures("finished", "sampling_is_forbidden")
@pytest.mark.parametrize("setting", ["evaluate.samples=3", "run.seed=7", "evaluate.top_p=0.5"])
def test_other_settings_do_not_mix_with_an_evaluation(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str
) -> None:
    before = content(tmp_path / "eval")
    assert main([*command, f"--{setting}"]) == 2
    key, _, value = setting.partition("=")
    error = capsys.readouterr().err
    assert f"has a finished evaluation with {key} = " in error
    assert f"and now it is {value}; restore the value, name another directory" in error
    assert main([*command, "--accept-changes"]) == 2
    assert "--accept-changes is not an option of infir2 eval" in capsys.readouterr().err
    assert content(tmp_path / "eval") == before


@pytest.fixture
def finished(command: list[str]) -> None:
    assert main(command) == 0


@pytest.mark.usefixtures("finished", "sampling_is_forbidden")
def test_other_weights_or_problems_do_not_mix_with_an_evaluation(
    command: list[str], tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problems = Path(command[5].partition("=")[2])
    copy = tmp_path / "copy.jsonl"
    copy.write_text(problems.read_text())
    command = [*command, f"--run.dir={tmp_path / 'other'}", f"--evaluate.problems.0.path={copy}"]
    shutil.copytree(model_dir, tmp_path / "model")
    command.append(f"--model.path={tmp_path / 'model'}")
    (tmp_path / "other").mkdir()
    for name in ("environment.json", "recipe.toml", "inputs.json"):
        shutil.copy(tmp_path / "eval" / name, tmp_path / "other" / name)
    recipe = (tmp_path / "other" / "recipe.toml").read_text()
    recipe = recipe.replace(str(problems), str(copy)).replace(str(model_dir), command[-1][13:])
    (tmp_path / "other" / "recipe.toml").write_text(recipe)
    copy.write_text(problems.read_text().replace('"label": "', '"label": "1'))
    assert main(command) == 2
    assert "an evaluation of what evaluate.problems named before it changed" in (
        capsys.readouterr().err
    )
    copy.write_text(problems.read_text())
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert main(command) == 2
    assert "an evaluation of what model.path named before it changed" in capsys.readouterr().err


def start(command: list[str], **variables: str) -> "subprocess.Popen[str]":
    return begin([sys.executable, "-m", "infir2", *command], **variables)


@pytest.mark.parametrize("responses", [1, 5])
def test_a_killed_evaluation_resumes_bit_for_bit(
    command: list[str], tmp_path: Path, responses: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every response that had ended is kept, and the others do not depend on the interruption."""
    command += ["--evaluate.max_problems=4", "--evaluate.max_response_tokens=12"]
    command += ["--rollout.max_running_requests=3"]
    assert main(command) == 0
    whole = tmp_path / "eval"
    whole.rename(tmp_path / "whole")
    process = start(command, INFIR2_FAULTS=f"evaluate:{responses}:kill")
    process.communicate(timeout=60)
    assert process.returncode == -9
    kept = read_json_lines(whole / "samples.jsonl")
    assert responses <= len(kept) < 8
    with (whole / "samples.jsonl").open("ab") as file:
        file.write(b'{"step": 1, "problem": "torn')
    capsys.readouterr()
    assert main([*command, "--rollout.max_running_requests=8", "--run.threads=2"]) == 0
    assert f"eval: resumed after {len(kept)} of 8 responses" in capsys.readouterr().err
    for name in ("samples.jsonl", "metrics.jsonl"):
        assert (whole / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    rows = read_json_lines(whole / "samples.jsonl")
    assert len({(row["problem"], row["sample"]) for row in rows}) == len(rows) == 8
    assert all(row in rows for row in kept)


def test_two_evaluations_do_not_share_a_directory(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = start(command, INFIR2_FAULTS="evaluate:1:hang")
    while not (tmp_path / "eval" / "samples.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.05)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'eval'}: another job uses this run directory (pid {process.pid}" in error
    assert error.count("\n") == 1


def test_a_start_that_fails_leaves_nothing_behind(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise CheckpointError("a damaged model")

    monkeypatch.setattr(infir2.evaluate.run, "build_model", fail)
    assert main([*command, f"--run.dir={tmp_path / 'new' / 'eval'}"]) == 3
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    assert main([*command, f"--run.dir={tmp_path / 'empty'}"]) == 3
    assert not list((tmp_path / "empty").iterdir())


def test_progress_is_shown_while_no_response_has_ended(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(infir2.terminal, "_PLAIN_INTERVAL_SECONDS", 0.0)
    assert main([*command, "--evaluate.max_response_tokens=12"]) == 0
    shown = capsys.readouterr().err.splitlines()
    banner = "eval: qwen2, 0.0547 M parameters, on cpu (1 thread), FP8 emulated, 1 process"
    assert shown[0] == banner
    assert shown[1] == "eval response 0/4 none ended yet, decoding step 1"
    assert any(
        re.fullmatch(r"eval response [1-4]/4 \d+.\d % right, decoding step \d+ left .*", line)
        for line in shown
    )


@pytest.mark.usefixtures("sampling_is_forbidden")
@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"metrics.jsonl": '{"kind": "train", "step": 1}\n'}, "metrics.jsonl"),
        ({"environment.json": "{}", "metrics.jsonl": '{"kind": "event"}\n'}, "metrics.jsonl"),
        ({"environment.json": "{}", "checkpoints/step-2/state.json": "{}"}, "checkpoints"),
        ({"recipe.toml": "[run]\n"}, "recipe.toml"),
        ({"thesis.tex": "x"}, "thesis.tex"),
    ],
    ids=["a training run", "a training run's events", "checkpoints", "a recipe", "anything"],
)
def test_a_directory_with_other_files_is_refused_before_sampling(
    command: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    files: dict[str, str],
    named: str,
) -> None:
    for name, text in files.items():
        (tmp_path / "eval" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "eval" / name).write_text(text)
    before = content(tmp_path / "eval")
    assert main(command) == 2
    error = capsys.readouterr().err
    assert f"is not an evaluation's directory (it has {named}" in error
    assert error.count("\n") == 1
    assert content(tmp_path / "eval") == before


@pytest.mark.usefixtures("sampling_is_forbidden")
def test_a_directory_that_cannot_be_written_is_refused_before_sampling(
    command: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").write_text("x")
    assert main([*command, f"--run.dir={tmp_path / 'file'}"]) == 2
    assert "ENOTDIR" in capsys.readouterr().err
    assert main([*command, f"--run.dir={tmp_path / 'file' / 'eval'}"]) == 2
    assert "cannot be written (Not a directory" in capsys.readouterr().err
    assert main([*command, "--run.dir="]) == 2
    assert "run.dir is missing" in capsys.readouterr().err

    def read_only(path: Path, data: bytes) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(infir2.evaluate.output, "write_atomically", read_only)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'eval'} cannot be written (Read-only file system" in error


def test_an_interrupted_evaluation_is_run_again(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that a kill interrupted while it wrote a file."""

    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as context:
        context.setattr(infir2.evaluate.run, "answer_problems", die)
        with pytest.raises(Killed):
            main(command)
    own = {"recipe.toml", "environment.json", "inputs.json", ".lock"}
    assert content(tmp_path / "eval").keys() == own
    (tmp_path / "eval" / ".metrics.jsonl.0a1b2c.tmp").write_text('{"kind": "evalu')
    (tmp_path / "eval" / "samples.jsonl").write_text("old\n")
    assert main(command) == 0
    assert len(lines(tmp_path / "eval", "evaluation")) == 1
    assert "old" not in (tmp_path / "eval" / "samples.jsonl").read_text()


def test_the_scores_as_json(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):  # sampled, and found
        assert main([*command, "--json", "--quiet"]) == 0
        output = capsys.readouterr()
        scores = json.loads(output.out)
        assert lines(tmp_path / "eval", "evaluation") == [
            {"kind": "evaluation", "step": 1} | scores
        ]
        assert output.err.count("\n") == 1  # the scores in words


def test_an_empty_directory_is_used(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "eval").mkdir()
    assert main(command) == 0


def test_a_disk_that_is_full_at_the_end_costs_no_scores(
    command: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The scores are printed, the command fails, and the directory does not look finished."""
    real = infir2.evaluate.output.write_atomically

    def full_for_metrics(path: Path, data: bytes) -> None:
        if path.name == "metrics.jsonl":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, data)

    monkeypatch.setattr(infir2.evaluate.output, "write_atomically", full_for_metrics)
    assert main(command) == 3
    error = capsys.readouterr().err
    assert "on 2 problems" in error
    assert "the scores above cannot be written (No space left on device" in error
    assert not (tmp_path / "eval" / "metrics.jsonl").exists()
