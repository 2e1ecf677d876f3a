"""`infir2 eval`: the scores it writes, and the directories that it refuses before it samples."""

import errno
import json
from pathlib import Path

import pytest
from stages import RECIPES, SHAPE, lines

import infir2.evaluate.output
import infir2.evaluate.run
from infir2.cli import main
from infir2.config.schema import ShapeSection
from infir2.data import load_tokenizer
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
    assert {"step", "problem", "prompt", "response", "reward"} <= json.loads(rows[0]).keys()
    before = content(tmp_path / "eval")
    assert {"recipe.toml", "environment.json"} < before.keys()
    monkeypatch.setattr(
        infir2.evaluate.run, "answer_problems", lambda *_: pytest.fail("it sampled")
    )
    assert main(command) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'eval'} has a finished evaluation" in error
    assert error.count("\n") == 1
    assert content(tmp_path / "eval") == before


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
    assert content(tmp_path / "eval").keys() == {"recipe.toml", "environment.json"}
    (tmp_path / "eval" / ".metrics.jsonl.0a1b2c.tmp").write_text('{"kind": "evalu')
    (tmp_path / "eval" / "samples.jsonl").write_text("old\n")
    assert main(command) == 0
    assert len(lines(tmp_path / "eval", "evaluation")) == 1
    assert "old" not in (tmp_path / "eval" / "samples.jsonl").read_text()


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
