"""The likely mistakes with `infir2 report`: each gets one sentence, and nothing is written."""

from pathlib import Path

import pytest
from mistakes import each, sentence_of
from report_runs import describe, rl_rows, train_rows, write

from infir2.cli import main
from infir2.cli.report import _AXES
from infir2.report.axes import AXES

MISTAKES = [
    ("report", 2, "the following arguments are required: RUN_DIR"),
    ("report nope", 4, "nope does not exist; name the run.dir of a run"),
    ("report runs/*", 4, "runs/* does not exist; name the run.dir of a run"),
    ("report empty", 4, "empty holds no run (no metrics.jsonl in it or directly below it)"),
    ("report blank", 4, "blank has recorded nothing yet (its metrics.jsonl is empty)"),
    ("report sft/metrics.jsonl", 4, "metrics.jsonl is a file; name the run directory, such as sft"),
    ("report sft/recipe.toml", 4, "sft/recipe.toml is a recipe; name its run.dir"),
    ("report model", 4, "model is a model's directory; name the run.dir of the run that trained"),
    ("report sft/checkpoints", 4, "is not a run but its checkpoints; name sft"),
    ("report sft/checkpoints/step-100", 4, "is not a run but its checkpoints; name sft"),
    ("report benchmarks", 4, "is a run of benchmarks, which has no curves; infir2 eval compare"),
    ("report sft out.html", 4, "out.html is no run directory; to write the page there: --to out"),
    ("report sft rl sft", 2, "sft is named twice; name each run once."),
    ("report sft sft/", 2, "sft is named twice; name each run once."),
    ("report sft sft/../sft", 2, "is named twice; name each run once."),
    ("report sft --to model/config.json/x.html", 2, "the page cannot be written (File exists"),
    ("report sft --to sft/metrics.jsonl", 2, "sft/metrics.jsonl: exists and is not an HTML page"),
    ("report sft --to", 2, "argument --to: expected one argument"),
    ("report sft --too x", 2, "did you mean --to?"),
    ("report sft --axis tokns", 2, "did you mean tokens?"),
    ("report sft --axis", 2, "argument --axis: expected one argument"),
    ("report bare --axis tokens", 4, "bare: its metrics.jsonl has no numbers for --axis tokens"),
    ("report sft --every 5", 2, "--every is how often --follow writes the page; add --follow."),
    ("report sft --follow --every 0", 2, "argument --every: invalid seconds value: '0'"),
    ("report sft --follow --every often", 2, "argument --every: invalid seconds value: 'often'"),
    ("report sft --follow --json", 2, "--follow and --json exclude each other; remove one."),
    ("report sft --folow", 2, "did you mean --follow?"),
    ("report sft --smoothing 0.9", 2, "unrecognized arguments: --smoothing 0.9"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("reports")
    write(describe(directory / "sft", "sft"), train_rows(9, 3.0, 1.0, 0))
    write(describe(directory / "rl", "rl"), rl_rows(9, 0.1, 0.5, 0))
    write(directory / "bare", [{"kind": "train", "step": 1, "loss": 2.0}])
    write(directory / "blank", [])
    for name in ("empty", "model", "benchmarks"):
        (directory / name).mkdir()
    (directory / "model" / "config.json").write_text("{}")
    (directory / "benchmarks" / "result.json").write_text("{}")
    return directory


@each(MISTAKES)
def test_a_mistake_gets_one_sentence_and_leaves_nothing_behind(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: str,
    code: int,
    sentence: str,
) -> None:
    monkeypatch.chdir(place)
    assert sentence in sentence_of(capsys, place, words.split(), code)


def test_a_half_written_line_and_runs_of_two_kinds_are_no_mistakes(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (place / "rl" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 10, "lo')
    page = tmp_path / "page.html"
    assert main(["report", str(place / "sft"), str(place / "rl"), "--to", str(page)]) == 0
    assert "rl: metrics.jsonl: 1 unreadable line left out." in page.read_text()
    assert capsys.readouterr().out == f"{page}\n"
    assert main(["report", str(place / "sft"), "--to", str(page)]) == 0, "a page is replaced"


def test_the_axes_of_the_verb_are_those_of_the_charts() -> None:
    assert _AXES == AXES
