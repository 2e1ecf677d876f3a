"""The forms in which people store conversations and prompts."""

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infir2.config.schema import SourceSection
from infir2.data.messages import messages, with_reasoning
from infir2.data.rows import open_source, parse_conversation, parse_prompt
from infir2.data.types import RowError

QUESTION = {"role": "user", "content": "2+3=?"}
ANSWER = {"role": "assistant", "content": "5"}
CHAT = [QUESTION, ANSWER]
SHAREGPT = [{"from": "human", "value": "2+3=?"}, {"from": "gpt", "value": "5"}]
SECTION = SourceSection(path="x")


def conversation(*messages: dict[str, Any]) -> list[Any]:
    return list(parse_conversation({"messages": list(messages)}, SECTION))


@pytest.mark.parametrize("system", ["", " \n", None])
def test_a_system_message_without_content_counts_as_absent(system: str | None) -> None:
    assert conversation({"role": "system", "content": system}, *CHAT) == CHAT
    row = {"messages": [{"role": "system", "content": system}, *CHAT]}
    assert parse_conversation(row, SECTION, "Think.")[0]["content"] == "Think."


@pytest.mark.parametrize("value", [CHAT, SHAREGPT, json.dumps(CHAT), json.dumps(SHAREGPT)])
def test_messages_of_each_form_are_the_same_conversation(value: Any) -> None:
    section = SourceSection(path="x", messages_field="data.conversations")
    assert parse_conversation({"data": {"conversations": value}}, section) == CHAT


def test_sharegpt_messages_of_other_roles_are_refused() -> None:
    with pytest.raises(RowError, match="observation"):
        conversation(*SHAREGPT, {"from": "observation", "value": "x"})


@pytest.mark.parametrize("key", ["reasoning", "thinking", "reasoning_content"])
@pytest.mark.parametrize(
    ("thought", "content"),
    [
        ("2+3", "5"),
        ("<think>\n2+3\n</think>", "5"),
        ("2+3", "<think>\n2+3\n</think>\n\n5"),
        ("\n2+3\n", "2+3\n</think>\n\n5"),
    ],
)
def test_a_thought_is_one_block(key: str, thought: str, content: str) -> None:
    message = conversation(QUESTION, ANSWER | {"content": content, key: thought})[1]
    answer = message["content"]
    if "reasoning_content" in message:
        answer = with_reasoning(message["reasoning_content"], answer)
    assert answer.count("</think>") == 1
    assert answer.split("</think>")[1] == "\n\n5"
    assert answer.count("2+3") == 1


def test_equal_thoughts_of_two_keys_are_one_and_different_ones_are_refused() -> None:
    both = ANSWER | {"reasoning": "2+3", "reasoning_content": "2+3"}
    assert conversation(QUESTION, both)[1] == ANSWER | {"reasoning_content": "2+3"}
    for message in (
        both | {"thinking": "3+2"},
        both | {"content": "<think>\n3+2\n</think>\n\n5"},
        ANSWER | {"thinking": ["2+3"]},
    ):
        with pytest.raises(RowError):
            conversation(QUESTION, message)
    with pytest.raises(RowError, match="message of the user"):
        conversation(QUESTION | {"reasoning": "2+3"}, ANSWER)


@pytest.mark.parametrize("key", ["weight", "train", "trainable", "loss", "loss_mask"])
def test_a_message_that_is_not_to_be_trained_is_refused(key: str) -> None:
    assert conversation(QUESTION | {key: None}, ANSWER | {key: 1}) == CHAT
    assert conversation(QUESTION | {key: 0}, ANSWER | {key: True}) == CHAT
    for value in (0, False, 0.5, math.nan):
        with pytest.raises(RowError, match=f"`{key}`"):
            conversation(QUESTION, ANSWER | {key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mask", 0),
        ("mask", 1),
        ("ignore", False),
        ("prefix", True),
        ("function_call", {"name": "f"}),
        ("tool_calls", [{"function": {"name": "f"}}]),
        ("tool_call_id", "1"),
        ("step_loss_mask", 0),
    ],
)
def test_keys_that_change_what_is_trained_are_refused_by_name(key: str, value: Any) -> None:
    assert conversation(QUESTION, ANSWER | {key: None}) == CHAT
    assert conversation(QUESTION, ANSWER | {"id": 7, "name": "x", "model": None}) == CHAT
    with pytest.raises(RowError, match=f"`{key}`"):
        conversation(QUESTION, ANSWER | {key: value})


THOUGHT = ANSWER | {"reasoning_content": "2+3"}


@pytest.mark.parametrize("key", ["reasoning", "thinking", "reasoning_content"])
@pytest.mark.parametrize("answer", [ANSWER, THOUGHT, ANSWER | {"thinking": "2+3"}])
def test_a_thought_beside_the_messages_belongs_to_the_answer(
    key: str, answer: dict[str, Any]
) -> None:
    row = {"messages": [QUESTION, answer], key: "2+3"}
    assert parse_conversation(row, SECTION) == [QUESTION, THOUGHT]
    solved = SourceSection(path="x", prompt_field="q", solution_field="a")
    assert parse_conversation({"q": "2+3=?", "a": "5", key: "2+3"}, solved) == [QUESTION, THOUGHT]
    with pytest.raises(RowError, match="two different thoughts"):
        parse_conversation({"messages": [QUESTION, THOUGHT], key: "3+2"}, SECTION)
    with pytest.raises(RowError, match=f"`{key}` beside 2 messages"):
        parse_conversation({"messages": [*CHAT, *CHAT], key: "2+3"}, SECTION)
    inside = ANSWER | {"content": "<think>\n2+3\n</think>\n\n5"}
    assert parse_conversation({"messages": [QUESTION, inside], key: "2+3"}, SECTION)[1] == inside


@pytest.mark.parametrize("value", ["", None, "on", "Off", True, False])
def test_a_switch_beside_the_messages_is_no_thought(value: Any) -> None:
    assert parse_conversation({"messages": CHAT, "reasoning": value}, SECTION) == CHAT


def test_a_thought_in_a_named_field(tmp_path: Path) -> None:
    section = SourceSection(path=str(tmp_path / "a.parquet"), reasoning_field="cot")
    row = {"messages": CHAT, "cot": "2+3"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    assert parse_conversation(open_source(section, "messages").read(0), section)[1] == THOUGHT
    row = {"messages": CHAT, "reasoning": "2+3"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "b.parquet")
    section = SourceSection(path=str(tmp_path / "b.parquet"))
    assert parse_conversation(open_source(section, "messages").read(0), section)[1] == THOUGHT
    with pytest.raises(RowError, match="`cot`"):
        parse_conversation({"messages": CHAT}, SourceSection(path="x", reasoning_field="cot"))


@pytest.mark.parametrize("prompt", ["2+3=?", [QUESTION], json.dumps([QUESTION]), SHAREGPT[:1]])
def test_prompts_of_each_form(prompt: Any) -> None:
    assert parse_prompt({"prompt": prompt, "label": "5"}, SECTION)[0] == [QUESTION]


@pytest.mark.parametrize("prompt", ["[1, 2] has which sum?", "[1, 2]", "[]", "[x]", '["role"]'])
def test_a_question_that_looks_like_json_stays_a_question(prompt: str) -> None:
    turns = parse_prompt({"prompt": prompt, "label": "3"}, SECTION)[0]
    assert turns == [{"role": "user", "content": prompt}]


def test_dotted_fields_name_nested_values(tmp_path: Path) -> None:
    row = {"prompt": "q", "reward_model": {"ground_truth": "34", "style": "rule"}}
    (tmp_path / "verl.jsonl").write_text(json.dumps(row))
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "verl.parquet")
    for name in ("verl.jsonl", "verl.parquet"):
        section = SourceSection(path=str(tmp_path / name), answer_field="reward_model.ground_truth")
        source = open_source(section, "prompts")
        assert parse_prompt(source.read(0), section)[1] == "34"
    section = SourceSection(path="x", answer_field="a.b")
    assert parse_prompt({"prompt": "q", "a.b": "1", "a": {"b": "2"}}, section)[1] == "1"
    for other in ({"a": None}, {"a": {}}, {"a": "text"}):
        with pytest.raises(RowError):
            parse_prompt({"prompt": "q", **other}, section)


def test_the_input_of_alpaca_follows_its_instruction(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add", "input": "2 and 3", "output": "5"},
        {"instruction": "Say 5", "input": "", "output": "5"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "alpaca.parquet")
    section = SourceSection(
        path=str(tmp_path / "alpaca.parquet"), prompt_field="instruction", solution_field="output"
    )
    source = open_source(section, "messages")
    questions = [parse_conversation(source.read(i), section)[0]["content"] for i in range(2)]
    assert questions == ["Add\n\n2 and 3", "Say 5"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "NaN", "inf", "-Infinity"])
def test_values_that_are_not_finite_never_crash_and_never_score(value: float | str) -> None:
    assert parse_prompt({"prompt": "q", "label": 5, "difficulty": value}, SECTION)[1:] == (
        "5",
        None,
    )
    with pytest.raises(RowError, match="which is no answer"):
        parse_prompt({"prompt": "q", "label": value}, SECTION)


@pytest.mark.parametrize("value", ["null", "None", " N/A ", "\\boxed{nan}"])
def test_a_label_that_is_no_answer_is_refused(value: str) -> None:
    with pytest.raises(RowError, match="which is no answer"):
        parse_prompt({"prompt": "q", "label": value}, SECTION)


def test_text_parts_are_joined_and_other_parts_are_refused_by_name() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": " b"}, {"text": "c"}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "e"}]}
    assert [turn["content"] for turn in messages(row, "messages")] == ["a bc", "e"]
    for part, kind in (
        ({"type": "image_url", "image_url": {"url": "x"}}, "image_url"),
        ({"type": "image", "text": "x"}, "image"),
        ({"type": "text", "text": None}, "text"),
        ("x", "str"),
    ):
        row["messages"][0]["content"] = [*parts, part]  # type: ignore[index]
        with pytest.raises(RowError, match=f"`content` has a part of type '{kind}'"):
            messages(row, "messages")
    row["messages"][0]["content"] = []  # type: ignore[index]
    with pytest.raises(RowError, match="empty"):
        messages(row, "messages")
