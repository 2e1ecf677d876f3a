"""Sources and rows: each unusable row or file has its reason, and no neighbor is lost."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infir2.config.schema import DataSection, SourceSection
from infir2.data import load_prompts
from infir2.data.rows import (
    Quarantine,
    open_source,
    parse_conversation,
    parse_document,
    parse_prompt,
)
from infir2.data.sources import RowError, Source
from infir2.errors import ConfigError, DataError

REAL_DATA = Path(__file__).parents[2] / "../shared/data"
CHAT = [{"role": "user", "content": "2+3=?"}, {"role": "assistant", "content": "5"}]


def line(row: object) -> bytes:
    return json.dumps(row).encode()


POISON: list[tuple[bytes, str]] = [
    (b"", "empty"),
    (line({"messages": []}), "empty"),
    (line({"messages": [{"role": "user", "content": "  "}, CHAT[1]]}), "empty"),
    (line({"messages": [CHAT[0]]}), "no_trained_tokens"),
    (b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}', "bad_utf8"),
    (line({"messages": [CHAT[0], {"role": "assistant", "content": "\ud800"}]}), "bad_utf8"),
    (b'{"messages": [', "bad_json"),
    (b'["a", "list"]', "bad_json"),
    (b'{"a": ' + b"[" * 200_000, "bad_json"),
    (line({"messages": None}), "null_field"),
    (line({"messages": [CHAT[0], {"role": "assistant", "content": None}]}), "null_field"),
    (b'{"messages": "\0"}', "nul_byte"),
    (line({"messages": [CHAT[0], {"role": "assistant", "content": "a\0b"}]}), "nul_byte"),
    (line({"text": "another kind of row"}), "missing_field"),
    (line({"messages": [{"role": "user"}, CHAT[1]]}), "missing_field"),
    (line({"messages": [{"role": "tool", "content": "x"}, CHAT[1]]}), "bad_role"),
    (line({"messages": "a text"}), "bad_field"),
    (line({"messages": [CHAT[0], {"role": "assistant", "content": ["parts"]}]}), "bad_field"),
    (line({"messages": [CHAT[0], CHAT[1] | {"tool_calls": [{}]}]}), "bad_field"),
]


def test_each_unusable_row_has_its_reason_and_its_line(tmp_path: Path) -> None:
    path = tmp_path / "poison.jsonl"
    good = line({"messages": CHAT})
    path.write_bytes(b"".join(good + b"\n" + row + b"\n" for row, _ in POISON))
    section = SourceSection(path=str(path))
    source = open_source(section, "messages")
    assert len(source) == 2 * len(POISON)
    quarantine = Quarantine(0.5, tmp_path / "run" / "quarantine.jsonl")
    usable = 0
    for index in range(len(source)):
        try:
            assert parse_conversation(source.read(index), section) == CHAT
            usable += 1
        except RowError as error:
            quarantine.add(source, index, error)
    assert usable == len(POISON)
    listed = [
        json.loads(text)
        for text in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    ]
    assert [row["origin"] for row in listed] == [
        f"{path}:{2 * index + 2}" for index in range(len(POISON))
    ]
    assert [row["reason"] for row in listed] == [reason for _, reason in POISON]
    assert sum(quarantine.counts[str(path)].values()) == len(POISON)


def test_quarantine_stops_above_its_share_and_lists_a_row_once(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n' * 98 + b"x\ny\n")
    section = SourceSection(path=str(path))
    source = open_source(section, "documents")
    error = RowError("bad_json", "not JSON")
    for _ in range(2):  # the second is a resumed run
        quarantine = Quarantine(0.01, tmp_path / "quarantine.jsonl")
        quarantine.add(source, 98, error)
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 1
    with pytest.raises(
        DataError,
        match=r"2 of 100 rows are unusable \(2 bad_json; .*rows.jsonl:100.*raise "
        r"data.max_quarantined_fraction",
    ) as raised:
        quarantine.add(source, 99, error)
    assert raised.value.exit_code == 4


def test_files_of_each_kind_give_the_same_rows(tmp_path: Path) -> None:
    rows = [
        {"text": f"text {number}", "messages": CHAT, "difficulty": number} for number in range(7)
    ]
    content = b"\xef\xbb\xbf" + b"\r\n".join(line(row) for row in rows) + b"\n\n \n"
    (tmp_path / "a.jsonl").write_bytes(content)
    with gzip.open(tmp_path / "b.jsonl.gz", "wb") as file:
        file.write(content.rstrip())
    table = pa.Table.from_pylist(rows)
    table = table.set_column(0, "text", table["text"].dictionary_encode())
    pq.write_table(table, tmp_path / "c.parquet", row_group_size=3)
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet"):
        source = Source(tmp_path / name, {"text", "messages", "difficulty"})
        assert [source.read(index) for index in range(len(source))] == rows
    assert Source(tmp_path / "c.parquet", {"text"}).read(6) == {"text": "text 6"}
    directory = Source(tmp_path, {"text", "messages", "difficulty"})
    assert len(directory) == 21
    assert directory.read(13)["text"] == "text 6"
    assert directory.origin(14) == f"{tmp_path / 'c.parquet'}:1"


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("no.jsonl", None, "does not exist"),
        ("empty.jsonl", b"", "is empty"),
        ("blank.jsonl", b"\n\n", "only blank lines"),
        ("binary.jsonl", gzip.compress(b'{"text": "a"}', mtime=0), "must be named .jsonl.gz"),
        (
            "cut.jsonl.gz",
            gzip.compress(b'{"text": "a"}\n' * 1000, mtime=0)[:-20],
            "not a complete gzip file",
        ),
        ("plain.jsonl.gz", b'{"text": "a"}\n', "not a complete gzip file"),
        ("empty.jsonl.gz", gzip.compress(b"", mtime=0), "is empty"),
        ("broken.parquet", b"PAR1 and nothing else", "cannot be read as Parquet"),
        ("table.csv", b"a,b\n", "unknown file type"),
        (
            "other.jsonl",
            b'{"question": "2+3?", "answer": "5"}\n',
            r"no field `text` \(it has answer, question\)",
        ),
    ],
)
def test_unusable_files_are_named_in_one_sentence(
    tmp_path: Path, name: str, content: bytes | None, sentence: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=sentence) as raised:
        open_source(SourceSection(path=str(tmp_path / name)), "documents")
    assert name in str(raised.value)
    assert "\n" not in str(raised.value)


def test_rows_without_messages_name_the_keys_to_set(tmp_path: Path) -> None:
    (tmp_path / "qa.jsonl").write_bytes(line({"problem": "2+3", "solution": "5"}))
    with pytest.raises(
        DataError,
        match=r"no field `messages` \(it has problem, solution\): .* set prompt_field and "
        r"solution_field",
    ):
        open_source(SourceSection(path=str(tmp_path / "qa.jsonl")), "messages")
    section = SourceSection(
        path=str(tmp_path / "qa.jsonl"), prompt_field="problem", solution_field="solution"
    )
    source = open_source(section, "messages")
    messages = parse_conversation(source.read(0), section, system_prompt="Think.")
    assert [(message["role"], message["content"]) for message in messages] == [
        ("system", "Think."),
        ("user", "2+3"),
        ("assistant", "5"),
    ]


def test_a_directory_without_data_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(DataError, match=r"has no \.jsonl"):
        open_source(SourceSection(path=str(tmp_path)), "messages")


def test_a_directory_is_read_once_and_as_meant(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(line({"text": "a"}))
    for name in ("._a.jsonl", "a.quarantine.jsonl", "quarantine.jsonl"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    assert len(Source(tmp_path, {"text"})) == 2


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (("a.idx", "a.jsonl"), "the same rows"),
        (("a_text_document.idx", "a.jsonl"), "the same rows"),
        (("a.jsonl", "a.jsonl.gz"), "the same rows"),
        (("train-00000-of-00001.jsonl", "test-00000-of-00001.jsonl"), "a training split"),
        (("train/a.jsonl", "validation/b.jsonl"), "a training split"),
    ],
)
def test_a_directory_that_would_be_read_twice_or_with_held_out_rows_is_refused(
    tmp_path: Path, names: tuple[str, ...], sentence: str
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(line({"text": "a"}))
    with pytest.raises(DataError, match=sentence):
        Source(tmp_path, {"text"})


def test_messages_after_the_last_answer_are_left_out() -> None:
    section = SourceSection(path="x")
    assert (
        parse_conversation({"messages": [*CHAT, {"role": "user", "content": "thanks"}]}, section)
        == CHAT
    )
    separate = [CHAT[0], {"role": "assistant", "content": "5", "reasoning_content": "2+3=5"}]
    assert (
        parse_conversation({"messages": separate}, section)[1]["content"]
        == "<think>\n2+3=5\n</think>\n\n5"
    )
    system = {"role": "system", "content": "Own."}
    assert (
        parse_conversation({"messages": [system, *CHAT]}, section, system_prompt="Other.")[0]
        == system
    )


def test_prompts_keep_answers_as_text_and_reject_other_values() -> None:
    section = SourceSection(path="x")
    assert parse_prompt({"prompt": "q", "label": 34, "difficulty": 5.0}, section) == (
        [{"role": "user", "content": "q"}],
        "34",
        5,
    )
    assert parse_prompt(
        {"prompt": [CHAT[0]], "label": "\\frac{1}{2}", "difficulty": "hard"}, section
    ) == ([CHAT[0]], "\\frac{1}{2}", None)
    for row, reason in (
        ({"prompt": "q"}, "missing_field"),
        ({"prompt": "q", "label": True}, "bad_field"),
        ({"prompt": "q", "label": " "}, "empty"),
        ({"prompt": CHAT, "label": "5"}, "bad_role"),
    ):
        with pytest.raises(RowError) as raised:
            parse_prompt(row, section)
        assert raised.value.reason == reason


def test_load_prompts(tmp_path: Path) -> None:
    path = tmp_path / "rl.jsonl"
    path.write_bytes(
        b"".join(
            line({"prompt": f"{n}+1", "label": str(n + 1), "difficulty": 2}) + b"\n"
            for n in range(50)
        )
        + b"broken\n"
    )
    section = DataSection(
        sources=(SourceSection(path=str(path)),),
        max_quarantined_fraction=0.02,
        system_prompt="Think.",
    )
    prompts = load_prompts(section, quarantine=tmp_path / "quarantine.jsonl")
    assert (len(prompts), prompts[3].id, prompts[3].answer, prompts[3].difficulty) == (
        50,
        "0/rl.jsonl:4",
        "4",
        2,
    )
    assert prompts[3].messages[0] == {"role": "system", "content": "Think."}
    assert json.loads((tmp_path / "quarantine.jsonl").read_text())["reason"] == "bad_json"
    with pytest.raises(DataError, match="1 of 51 rows"):  # an evaluation allows no unusable problem
        load_prompts(section.sources)
    with pytest.raises(ConfigError, match=r"data\.sources\.weight"):
        load_prompts([SourceSection(path=str(path)), SourceSection(path=str(path), weight=2.0)])


@pytest.mark.skipif(not REAL_DATA.exists(), reason="real data not present")
@pytest.mark.parametrize(
    ("name", "kind", "fields"),
    [
        ("corpus/hott_book.jsonl.gz", "documents", {}),
        (
            "train/gsm8k_train.jsonl.gz",
            "messages",
            {"prompt_field": "problem", "solution_field": "solution"},
        ),
        ("eval/math500.jsonl", "prompts", {"prompt_field": "problem", "answer_field": "answer"}),
    ],
)
def test_real_files(name: str, kind: str, fields: dict[str, str]) -> None:
    section = SourceSection(path=str(REAL_DATA / name), **fields)
    source = open_source(section, kind)  # type: ignore[arg-type]
    parse = {"documents": parse_document, "messages": parse_conversation, "prompts": parse_prompt}[
        kind
    ]
    assert all(parse(source.read(index), section) for index in range(len(source)))  # type: ignore[operator]
