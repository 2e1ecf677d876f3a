"""Rows of every reward: which labels it takes, and the sentence about a row that it cannot use."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from stages import options

from infir2.cli import main
from infir2.config.schema import DataSection, RewardSection, SourceSection
from infir2.data import load_prompts
from infir2.data.labels import Labels
from infir2.data.rows import open_source
from infir2.errors import DataError
from infir2.verify.programs import extract_program, read_tests

STDIN = {"input": "1", "output": "2"}
CALL = {"fn_name": "f", "args": [1], "expected": 2}


def labels(*names: str, field: str = "") -> Labels:
    return Labels(tuple(RewardSection(name=name) for name in names), field)


def load(tmp_path: Path, rows: list[dict[str, Any]], wanted: Labels, **source: Any) -> list[Any]:
    path = tmp_path / "rl.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = DataSection(
        sources=(SourceSection(path=str(path), **source),), max_quarantined_fraction=0.0
    )
    return load_prompts(section, labels=wanted)


@pytest.mark.parametrize(
    ("name", "label", "text"),
    [
        ("math", 34, "34"),
        ("answer", "1/2", "1/2"),
        ("choice", "(C)", "(C)"),
        ("choice", "A, C", "A, C"),
        ("code", [STDIN, CALL], json.dumps([STDIN, CALL])),
        ("code", json.dumps(CALL), json.dumps([CALL])),
        ("code", {"inputs": ["1", "2"], "outputs": ["2", "3"]}, None),
        ("code", ["assert f(1) == 2", "assert f(2) == 3"], None),
        ("code", "assert f(1) == 2", None),
        ("format", {"any": ["thing"]}, '{"any": ["thing"]}'),
        ("a.b:c", 3.5, "3.5"),
    ],
)
def test_labels_that_a_reward_takes(tmp_path: Path, name: str, label: Any, text: str) -> None:
    row = {"prompt": "q", "extra_info": {"answer": label}}
    (prompt,) = load(tmp_path, [row], labels(name), answer_field="extra_info.answer")
    assert text is None or prompt.answer == text


@pytest.mark.parametrize(
    ("name", "row", "sentence"),
    [
        ("math", {}, "no field `label`"),
        ("math", {"label": None}, "`label` is null"),
        ("math", {"label": [1]}, "`label` is neither text nor a number"),
        ("choice", {"label": "twelve"}, "`label` is 'twelve', which is no letter of a choice"),
        ("code", {"label": []}, "the tests are neither a list nor an object, or there are none"),
        ("code", {"label": 7}, "the tests are neither a list"),
        ("code", {"label": "print(1"}, "the tests are text that is neither JSON nor Python"),
        ("code", {"label": "x = 1"}, "the tests are text without an assert"),
        ("code", {"label": [{"input": "1"}]}, "number 0 has input"),
        ("code", {"label": [STDIN, 3]}, "the tests have no object as number 1"),
        ("code", {"label": {"inputs": ["1"], "outputs": []}}, "have 1 inputs and 0 outputs"),
        ("code", {"label": "[" * 100_000}, "the tests are text that is neither JSON nor Python"),
    ],
)
def test_a_row_that_a_reward_cannot_use_is_named(
    tmp_path: Path, name: str, row: dict[str, Any], sentence: str
) -> None:
    good = {"prompt": "q", "label": {"math": "5", "choice": "C", "code": [STDIN]}[name]}
    with pytest.raises(DataError, match=rf"rl\.jsonl:2: .*{re.escape(sentence)}"):
        load(tmp_path, [good, {"prompt": "r", **row}], labels(name))


def test_rewards_without_a_label_need_no_field(tmp_path: Path) -> None:
    (prompt,) = load(tmp_path, [{"prompt": "q"}], labels("format"))
    assert (prompt.answer, prompt.fields) == ("", {})
    (prompt,) = load(tmp_path, [{"prompt": "q", "x": {"y": [1]}}], labels("m:f"))
    assert prompt.fields == {"prompt": "q", "x": {"y": [1]}}


def test_a_field_chooses_what_the_label_has_to_be(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "label": "5", "kind": "math"},
        {"prompt": "b", "label": [STDIN], "kind": "code"},
    ]
    prompts = load(tmp_path, rows, labels("math", "code", field="kind"))
    assert [prompt.fields for prompt in prompts] == [{"kind": "math"}, {"kind": "code"}]
    for kind, sentence in (("cod", "`kind` is 'cod': no rl.reward is for it"), (None, "null")):
        with pytest.raises(DataError, match=sentence):
            load(
                tmp_path, [rows[0], rows[0] | {"kind": kind}], labels("math", "code", field="kind")
            )


def test_a_file_without_the_field_that_a_key_names_gets_that_key_as_remedy(tmp_path: Path) -> None:
    row = {"prompt": "q", "label": "5"}
    remedy = (
        r"`kind` \(it has label, prompt\): rl\.reward_field names it: name a field that every row"
    )
    with pytest.raises(DataError, match=remedy):
        load(tmp_path, [row], labels("math", "code", field="kind"))
    with pytest.raises(DataError, match=r"`label` .*: set prompt_field and answer_field"):
        load(tmp_path, [{"prompt": "q", "kind": "math"}], labels("math", "code", field="kind"))
    section = SourceSection(path=str(tmp_path / "rl.jsonl"), reasoning_field="thought")
    (tmp_path / "rl.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(DataError, match=r"`thought` .*: reasoning_field names it"):
        open_source(section, "messages")


def test_whole_rows_of_parquet_reach_a_function(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"prompt": ["q"], "other": [[1, 2]]}), tmp_path / "rl.parquet")
    section = DataSection(sources=(SourceSection(path=str(tmp_path / "rl.parquet")),))
    (prompt,) = load_prompts(section, labels=labels("m:f"))
    assert prompt.fields["other"] == [1, 2]


def test_a_label_within_a_field_of_parquet_beside_a_reward_that_needs_none(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist([{"prompt": "q", "extra": {"answer": "5"}, "kind": "math"}])
    pq.write_table(table, tmp_path / "rl.parquet")
    source = SourceSection(path=str(tmp_path / "rl.parquet"), answer_field="extra.answer")
    section = DataSection(sources=(source,), max_quarantined_fraction=0.0)
    (prompt,) = load_prompts(section, labels=labels("math", "format", field="kind"))
    assert prompt.answer == "5"


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"rl__reward": "mth"}, "rl.reward.0.name = 'mth' is unknown; did you mean math?"),
        ({"rl__reward": "[]"}, "rl.reward is empty"),
        ({"rl__reward": '["math", "math"]'}, "rl.reward has 'math' twice"),
        ({"rl__reward": '[{name = "math", weight = -1}]'}, "weight must be greater than 0, not -1"),
        ({"rl__reward": '[{name = "math", weight = nan}]'}, "weight must be a finite number"),
        ({"rl__reward": '[{name = "math", rows = ["a"]}]'}, "rl.reward.0.rows has no effect"),
        (
            {
                "rl__reward": '["math", {name = "reasoning_gym:sums", rows = ["a"]}]',
                "rl__reward_field": "kind",
            },
            "rl.reward.1.rows must be empty: a task",
        ),
        ({"rl__reward": "no_module_here:f"}, "No module named 'no_module_here'"),
        ({"rl__reward": "http://example.com/x"}, "set INFIR2_REWARD_KEY"),
        ({"rl__reward": "http://127.0.0.1:99999/x"}, "is no URL"),
        ({"rl__reward": "reasoning_gym:no_such_task"}, "rl.reward = reasoning_gym:no_such_task"),
        ({"rl__group_size": 1}, "rl.group_size must be greater than 1, not 1"),
    ],
)
def test_a_reward_that_cannot_be_is_one_sentence(
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    values: dict[str, object],
    sentence: str,
) -> None:
    (tmp_path / "model").mkdir()
    given = {
        "model__path": tmp_path / "model",
        "rollout__model": tmp_path,
        "schedule__total_steps": 1,
    }
    code = main(options(world, tmp_path / "rl", "rl1", **given, **values))
    error = capsys.readouterr().err
    assert sentence in error
    assert code == 2
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("```python\na\n```\n```py\nb\n```", "b\n"),
        ("```\na\n```", "a\n"),
        ("````python\n```\na\n```\n````", "```\na\n```\n"),
        ("~~~python\na\n~~~", "a\n"),
        ("```python\na\n```\n```text\nb\n```", "a\n"),
        ("```python\na", None),
        ("`a`", None),
        ("<think>```python\na\n```", None),
        ("<think>```python\na\n```</think>\n```python\nb\n```", "b\n"),
    ],
)
def test_the_program_is_the_last_closed_block_after_the_thinking(
    response: str, program: str | None
) -> None:
    assert extract_program(response) == program


def test_tests_without_a_number_of_bounds_are_refused() -> None:
    with pytest.raises(ValueError, match="are 1001, more than 1000"):
        read_tests([STDIN] * 1001)
