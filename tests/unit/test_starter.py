"""`infir2 data inspect` and `infir2 init`: what they find, and that the recipe runs."""

import json
import random
from pathlib import Path

import pytest
from stages import make_model, make_world

from infir2.cli import main
from infir2.config.schema import SourceSection
from infir2.data import load_tokenizer
from infir2.data.rows import open_source, parse_conversation
from infir2.starter.fields import asks_for_answer_line, detect
from infir2.starter.inspection import Inspection, Rendered, inspect_sources
from infir2.starter.words import histogram, shown


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("starter") / "world")


@pytest.fixture(scope="module")
def model(world: Path) -> Path:
    return make_model(world, world.parent / "hf")


def inspect(path: Path, world: Path) -> Inspection:
    tokenizer = load_tokenizer(world / "tokenizer")
    (found,) = inspect_sources([path], tokenizer, None, 2)
    return found


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_counts_are_those_of_the_rows(world: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (world / "sft1.jsonl").read_text().splitlines()]
    again = json.loads(json.dumps(rows[3]).replace(": ", ":  ").replace("Tom", "TOM"))
    path = write(tmp_path / "x.jsonl", [*rows, rows[0], again, {"messages": []}])
    found = inspect(path, world)
    assert (found.kind, found.num_rows, found.num_read) == (
        "messages",
        len(rows) + 3,
        len(rows) + 3,
    )
    assert found.reasons.total() == 1
    assert found.example.startswith(f"{path}:{len(rows) + 3}: ")
    assert found.first_duplicate == f"{path}:{len(rows) + 1}"
    tokenizer = load_tokenizer(world / "tokenizer")
    samples = [tokenizer.encode_conversation(row["messages"]) for row in rows]
    assert found.lengths[: len(rows)] == [sample.num_tokens for sample in samples]
    trained = sum(int(sample.loss_mask.sum()) for sample in [*samples, samples[0]])
    assert found.trained_tokens >= trained
    assert found.duplicates >= 1


def test_trained_runs_are_the_answers(world: Path) -> None:
    row = json.loads((world / "sft1.jsonl").read_text().splitlines()[0])
    rendered = inspect(world / "sft1.jsonl", world).rendered[0]
    trained = [text for text, is_trained in rendered.runs if is_trained]
    context = [text for text, is_trained in rendered.runs if not is_trained]
    assert trained == [row["messages"][-1]["content"] + "<|im_end|>"]
    assert row["messages"][0]["content"] in context[0]


def test_duplicates_are_found_across_sources(world: Path) -> None:
    tokenizer = load_tokenizer(world / "tokenizer")
    path = world / "sft1.jsonl"
    first, second = inspect_sources([path, path], tokenizer, "messages", 0)
    assert second.duplicates == second.num_rows
    assert first.duplicates < first.num_rows


def test_packing_fills_windows_and_counts_long_rows() -> None:
    found = Inspection(
        SourceSection(path="x"), "messages", 40, 1, 40, lengths=[30, 34] * 19 + [65, 64]
    )
    packed = found.packing(64)
    assert packed == {"windows": 20, "fill": 1.0, "rows_per_window": 1.95, "too_long": 1}
    documents = Inspection(SourceSection(path="x"), "documents", 40, 1, 40, lengths=[32] * 40)
    assert documents.packing(64)["windows"] == 20
    assert documents.packing(64)["fill"] == 1.0


def test_a_histogram_counts_every_row() -> None:
    draw = random.Random(1)
    for lengths in ([7], [5, 5, 5], [draw.randint(1, 9) for _ in range(50)], [1, 3, 90000] * 4):
        counts = [int(line.split()[-1].replace(",", "")) for line in histogram(lengths)]
        assert sum(counts) == len(lengths)


def test_a_long_row_is_cut_and_says_so() -> None:
    runs = shown(Rendered("x:1", (("a" * 9000, False), ("b" * 9000, True), ("c", False))))
    text = "".join(run for run, _ in runs)
    assert len(text) < 2500
    assert "characters ...]" in text
    assert [trained for _, trained in runs] == [False, True, False]


@pytest.mark.parametrize(
    ("row", "kind", "fields"),
    [
        ({"text": "a"}, "documents", {}),
        ({"content": "a"}, "documents", {"text_field": "content"}),
        ({"messages": [{"role": "user", "content": "a"}]}, "messages", {}),
        (
            {"conversations": [{"from": "human", "value": "a"}]},
            "messages",
            {"messages_field": "conversations"},
        ),
        (
            {"problem": "1+1", "solution": "2"},
            "messages",
            {"prompt_field": "problem", "solution_field": "solution"},
        ),
        ({"prompt": "1+1", "label": "2"}, "prompts", {}),
        (
            {"question": "1+1", "answer": "2"},
            "prompts",
            {"prompt_field": "question", "answer_field": "answer"},
        ),
        (
            {
                "data_source": "math_dapo",
                "prompt": [{"role": "user", "content": "1+1"}],
                "reward_model": {"ground_truth": "2", "style": "rule"},
            },
            "prompts",
            {"answer_field": "reward_model.ground_truth"},
        ),
    ],
)
def test_fields_are_found_by_their_names(
    row: dict, kind: str, fields: dict, tmp_path: Path
) -> None:
    found, section = detect(write(tmp_path / "x.jsonl", [row]))
    assert found == kind
    assert section.model_dump(exclude_defaults=True, exclude={"path"}) == fields


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        ("Answer: $Answer", True),
        ("Answer: \\boxed{$Answer}", False),
        ("a box", False),
    ],
)
def test_prompts_that_ask_for_an_answer_line(wish: str, expected: bool, tmp_path: Path) -> None:
    row = {"prompt": [{"role": "user", "content": f"1+1? End with {wish}"}], "label": "2"}
    _, section = detect(write(tmp_path / "x.jsonl", [row]), "prompts")
    assert asks_for_answer_line(section) is expected


def test_rows_that_are_asked_to_be_conversations(tmp_path: Path) -> None:
    """An answer is then what to train on, and Alpaca's input a part of the question."""
    path = write(tmp_path / "x.jsonl", [{"question": "1+1", "answer": "2"}])
    _, section = detect(path, "messages")
    assert (section.prompt_field, section.solution_field) == ("question", "answer")
    alpaca = {"instruction": "Translate.", "input": "Haus", "output": "house"}
    _, section = detect(write(tmp_path / "y.jsonl", [alpaca]), "messages")
    assert (section.prompt_field, section.solution_field) == ("instruction", "output")
    message = parse_conversation(open_source(section, "messages").read(0), section, "")[0]
    assert message["content"] == "Translate.\n\nHaus"


def test_inspect_prints_each_part(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(world / "sft1.jsonl"), str(world / "cpt.jsonl"), "--tokenizer"]
    words += [str(world / "tokenizer"), "--sequence-tokens", "256"]
    assert main(["data", "inspect", *words, "--problems", str(world / "heldout.jsonl")]) == 0
    text = capsys.readouterr().out
    for word in ("messages", "documents", "trained  ", "duplicates", "packing", "█", "⟦<think>"):
        assert word in text
    assert "questions share 13-grams" in text
    assert main(["data", "inspect", *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["sources"]
    assert [each["kind"] for each in found] == ["messages", "documents"]
    assert found[0]["rows"] == len((world / "sft1.jsonl").read_text().splitlines())


def test_control_characters_of_data_do_not_reach_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from infir2.terminal import print_marked

    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    print_marked([("a\x1b]0;evil\x07", False), ("b\x1b[2J", True)])
    text = capsys.readouterr().out
    assert text == "a\\x1b]0;evil\\x07\033[32mb\\x1b[2J\033[0m\n"


@pytest.mark.parametrize("task", ["cpt", "sft", "rl"])
def test_the_recipe_of_init_runs(
    task: str,
    world: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    data = {"cpt": "cpt", "sft": "sft1", "rl": "rl1"}[task]
    held_out = {"cpt": "cpt_validation", "sft": "sft2", "rl": "heldout"}[task]
    words = ["--model", str(model), "--task", task, "--data", str(world / f"{data}.jsonl")]
    assert main(["init", "first", *words, "--validation", str(world / f"{held_out}.jsonl")]) == 0
    said = capsys.readouterr().out
    assert f"infir2 {task} first/recipe.toml" in said
    if task == "rl":
        export = said.split("Next:")[1].splitlines()[1].split()
        assert main(export[1:]) == 0
    assert main(["check", task, "first/recipe.toml"]) == 0
    fast = ["--rl.prompts_per_step=1", "--rl.over_sample_prompts=2"] if task == "rl" else []
    fast += ["--rl.max_response_tokens=4", "--evaluate.max_response_tokens=4"] if fast else []
    assert main([task, "first/recipe.toml", "--train.stop_after_step=1", *fast]) == 0
    text = Path("first/recipe.toml").read_text()
    assert text.count("#") > 8
    assert max(map(len, text.splitlines())) < 200
    assert main(["init", "first", *words]) == 2
    assert "first/recipe.toml exists; name a new directory" in capsys.readouterr().err
