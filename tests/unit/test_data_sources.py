"""Sources and rows: each unusable row or file has its reason, and no neighbor is lost."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infir2.config.schema import DataSection, SourceSection
from infir2.data import decompress, json_rows, load_prompts, parquet
from infir2.data.indexed import is_indexed, write_index
from infir2.data.rows import (
    Quarantine,
    open_source,
    parse_conversation,
    parse_document,
    parse_prompt,
)
from infir2.data.sources import Source
from infir2.data.types import RowError
from infir2.errors import ConfigError, DataError

REAL_DATA = Path(__file__).parents[2] / "../shared/data"
CHAT = [{"role": "user", "content": "2+3=?"}, {"role": "assistant", "content": "5"}]


def line(row: object) -> bytes:
    return json.dumps(row).encode()


def pack_zstd(content: bytes) -> bytes:
    packed: bytes = pa.Codec("zstd").compress(content, asbytes=True)
    return packed


ROWS = [
    {"text": 'a "quoted" \\ [1, {2}]'},
    {"text": "\u00e9\u2028\ufeff"},
    {"text": "c", "n": [{}, [","]]},
]
LINES = [line(row) for row in ROWS]
RAW = [json.dumps(row, ensure_ascii=False).encode() for row in ROWS]
BOM = b"\xef\xbb\xbf"


POISON: list[tuple[bytes, str]] = [
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
        ("empty.jsonl", b"", "has no row"),
        ("blank.jsonl", b"\n\n", "has no row"),
        ("binary.jsonl", gzip.compress(b'{"text": "a"}', mtime=0), "must be named .jsonl.gz"),
        (
            "cut.jsonl.gz",
            gzip.compress(b'{"text": "a"}\n' * 1000, mtime=0)[:-20],
            "not a complete gzip file",
        ),
        ("plain.jsonl.gz", b'{"text": "a"}\n', "not a complete gzip file"),
        ("empty.jsonl.gz", gzip.compress(b"", mtime=0), "has no row"),
        ("broken.parquet", b"PAR1 and nothing else", "cannot be read as Parquet"),
        ("table.csv", b"a,b\n", "is a table, which is not read"),
        ("table.xyz", b"a,b\n", "unknown file type"),
        (
            "other.jsonl",
            b'{"question": "2+3?", "answer": "5"}\n',
            r"no field `text` \(it has answer, question\)",
        ),
        ("utf16.jsonl", '{"text": "a"}'.encode("utf-16"), "is UTF-16 text: convert it to UTF-8"),
        ("utf16.txt", "text".encode("utf-16"), "is UTF-16 text: convert it to UTF-8"),
        ("marked.json", '[{"text": "a"}]'.encode("utf-16-be"), "is UTF-16 text"),
        ("utf32.jsonl", '{"text": "a"}'.encode("utf-32"), "is UTF-32 text.*iconv -f UTF-32"),
        ("marked.txt", "text".encode("utf-32-be"), "is UTF-32 text"),
        ("binary.ndjson", pack_zstd(b'{"text": "a"}'), "must be named .jsonl.gz or .jsonl.zst"),
        ("cut.jsonl.zst", pack_zstd(b'{"text": "a"}\n' * 99)[:-3], "not a complete zstd file"),
        ("plain.jsonl.zst", b'{"text": "a"}\n', "not a complete zstd file"),
        ("blank.txt", b" \n", "has no row"),
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


@pytest.mark.parametrize(
    "suffix", [".jsonl", ".json.gz", ".jsonl.zst", ".parquet", ".idx", ".txt", ""]
)
def test_only_regular_files_are_read(tmp_path: Path, suffix: str) -> None:
    fifo, loop = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    os.mkfifo(fifo)
    loop.symlink_to(loop)
    zeros = tmp_path / "dir" / f"c{suffix or '.jsonl'}"
    zeros.parent.mkdir()
    zeros.symlink_to("/dev/zero")
    for path in (fifo, loop, zeros, zeros.parent, tmp_path / "a\0b", tmp_path / ("n" * 300)):
        with pytest.raises(DataError) as raised:
            Source(path, {"text"})
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("path", [".", "", "..", "/"])
def test_a_directory_is_no_prefix_of_tokens(tmp_path: Path, path: str) -> None:
    assert not is_indexed(Path(path))


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
    (tmp_path / ".cache").mkdir()
    (tmp_path / "config.json").write_text('{"text": "of no row"}')
    for name in ("._a.jsonl", "a.quarantine.jsonl", "quarantine.jsonl", ".cache/a.jsonl"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    assert len(Source(tmp_path, {"text"})) == 2
    (tmp_path / "c.json").write_bytes(line([{"text": "b"}, {"text": "c"}]))
    assert len(Source(tmp_path, {"text"})) == 4


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b"[" + b", ".join(LINES) + b"]"),
        ("a.json", BOM + json.dumps(ROWS, indent=2).encode() + b"\n"),
        ("a.json", b" [\n" + b",\n".join(RAW) + b",\n]\n"),
        ("a.json", b"\n".join(LINES)),
        ("a.jsonl", json.dumps(ROWS, indent=1).encode()),
        ("a.jsonl", b"\n".join(json.dumps(row, indent=4).encode() for row in ROWS) + b"\n"),
        ("a.ndjson", b"\n".join(RAW)),
        ("A.JSONL", b"\r\n".join(LINES) + b"\r\n"),
        ("a.jsonl", b"\r".join(LINES) + b"\r"),
        ("a.jsonl", b"\r".join(LINES)),
        ("a.jsonl", b"".join(BOM + each + b"\n" for each in RAW) + BOM),
        ("a.jsonl", b"\n \t\n\n" + b"\n\r\n\n".join(LINES) + b"\n\n" + BOM + b"\n"),
        ("a.json.gz", gzip.compress(b"[" + b",".join(LINES) + b"]", mtime=0)),
        ("A.Jsonl.GZ", gzip.compress(b"\n".join(LINES), mtime=0)),
        ("a.jsonl.zst", pack_zstd(b"\n".join(LINES[:2]) + b"\n") + pack_zstd(LINES[2])),
        ("a.json.zst", pack_zstd(json.dumps(ROWS).encode())),
        ("a.ndjson.zst", pack_zstd(b"\n".join(LINES))),
    ],
)
def test_forms_of_json_text_give_the_same_rows(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path / name, tmp_path):
        source = Source(path, {"text"})
        assert [source.read(index) for index in range(len(source))] == ROWS
        assert source.files[0].fields == {"text", "n"}


@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 7, 64])
def test_rows_do_not_depend_on_where_chunks_end(
    tmp_path: Path, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_rows, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(json_rows, "STRUCTURE_BYTES", chunk_bytes)
    rows = [{"text": text} for text in ("\\", '"', '\\"', '\\\\"', "[", "]}", ",", "{\n")] + [{}]
    path = tmp_path / "rows.json"
    for content in (
        json.dumps(rows),
        json.dumps(rows, indent=1),
        "\n".join(json.dumps(row, indent=1) for row in rows),
        "\n".join(map(json.dumps, rows)),
        "\r\n\r\n".join(map(json.dumps, rows)),
        "\r".join(map(json.dumps, rows)) + "\n",
    ):
        path.write_text(content, newline="")
        source = Source(path)
        assert [source.read(index) for index in range(len(source))] == rows


def test_blank_lines_are_no_rows_and_keep_the_numbers_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n" + LINES[0] + b"\r\n\r\n" + LINES[1] + b"\n")
    source = Source(path)
    assert [source.origin(index) for index in range(len(source))] == [f"{path}:2", f"{path}:4"]


def test_an_empty_shard_is_nothing(tmp_path: Path) -> None:
    for number, content in enumerate((b"", b"\n \n", b"[]", BOM)):
        (tmp_path / f"a{number}.jsonl").write_bytes(content)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"", mtime=0))
    (tmp_path / "c.jsonl.zst").write_bytes(pack_zstd(b""))
    pq.write_table(pa.table({"other": pa.array([], pa.int64())}), tmp_path / "d.parquet")
    write_index(tmp_path / "e.idx", np.uint16, np.zeros(0, np.int64))
    (tmp_path / "e.bin").write_bytes(b"")
    with pytest.raises(DataError, match="has no row"):
        Source(tmp_path)
    (tmp_path / "z.jsonl").write_bytes(LINES[0])
    source = open_source(SourceSection(path=str(tmp_path)), "documents")
    assert (len(source), source.read(0), source.origin(0)) == (1, ROWS[0], f"{tmp_path}/z.jsonl:1")


def test_a_damaged_array_is_quarantined_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for content, reasons in (
        (b"[" + LINES[0], ["bad_json"]),
        (b"[1, {}, []]", ["bad_json", "", "bad_json"]),
        (b"[[{}]]\n[[{}]]", ["bad_json"] * 2),
        (LINES[0] + b",\n" + LINES[1], ["bad_json", ""]),
        (b"{\n" + LINES[0] + b"\n", ["bad_json"]),
    ):
        path.write_bytes(content)
        source, found = Source(path), []
        for index in range(len(source)):
            try:
                source.read(index)
                found.append("")
            except RowError as error:
                found.append(error.reason)
        assert found == reasons, content


def test_rows_and_files_are_unpacked_within_a_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decompress, "FREE_BYTES", 1 << 20)
    bomb = b'{"text": "' + b"0" * (4 << 20) + b'"}'
    for name, packed in (("a.jsonl.gz", gzip.compress(bomb)), ("a.json.zst", pack_zstd(bomb))):
        (tmp_path / name).write_bytes(packed)
        with pytest.raises(DataError, match=r"unpacks to more than 1,\d\d\d,\d\d\d bytes"):
            Source(tmp_path / name)
    (tmp_path / "long.jsonl").write_bytes(bomb + b"\n" + LINES[0])
    pq.write_table(pa.Table.from_pylist([{"text": "0" * 5000}, ROWS[0]]), tmp_path / "b.parquet")
    for module, path in ((json_rows, "long.jsonl"), (parquet, "b.parquet")):
        monkeypatch.setattr(module, "MAX_ROW_BYTES", 4000)
        source = Source(tmp_path / path)
        with pytest.raises(RowError, match="more than 4,000") as raised:
            source.read(0)
        assert raised.value.reason == "too_large"
        assert source.read(1)["text"] == ROWS[0]["text"]


def test_parquet_keys_that_are_always_null_are_absent(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = [{"messages": [each | {"name": None} for each in CHAT], "extra": {"a": {"b": None}}}] * 3
    pq.write_table(pa.Table.from_pylist(rows), path)
    source = Source(path)
    assert source.read(2) == {"messages": CHAT, "extra": {"a": {}}}
    assert parse_conversation(source.read(0), SourceSection(path=str(path))) == CHAT


def test_parquet_dictionaries_and_maps_in_nested_columns(tmp_path: Path) -> None:
    role = pa.dictionary(pa.int32(), pa.string())
    kind = pa.list_(pa.struct([("role", role), ("content", pa.large_string())]))
    table = pa.table({"messages": pa.array([CHAT] * 70, kind)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=20)
    pq.write_table(
        pa.table(
            {
                "messages": pa.array(
                    [[list(each.items()) for each in CHAT]] * 70,
                    pa.list_(pa.map_(pa.string(), pa.string())),
                )
            }
        ),
        tmp_path / "b.parquet",
    )
    for name in ("a.parquet", "b.parquet"):
        source = Source(tmp_path / name)
        assert all(source.read(index) == {"messages": CHAT} for index in range(70))


@pytest.mark.parametrize("nested", [False, True])
def test_parquet_columns_of_one_name_are_refused_by_name(tmp_path: Path, nested: bool) -> None:
    column = pa.array(["a"])
    table = pa.Table.from_arrays([column, column], names=["text", "text"])
    if nested:
        table = pa.table({"row": pa.StructArray.from_arrays([column] * 2, names=["text", "text"])})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"two columns named `(row\.)?text`"):
        Source(tmp_path / "a.parquet", {"text"})


def test_memory_for_parquet_does_not_grow_with_the_row_group(tmp_path: Path) -> None:
    """One row group of 256 MiB in nested text, from a file of less than 1 MiB."""
    path = tmp_path / "a.parquet"
    text = pa.DictionaryArray.from_arrays(np.zeros(64, np.int32), ["0" * (4 << 20)])
    lists = pa.ListArray.from_arrays(np.arange(65, dtype=np.int32), text)
    pq.write_table(pa.table({"texts": lists}), path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 1 << 20
    # A process of its own starts it: a child's peak begins with the memory of what forked it.
    starter = (
        "import resource, subprocess, sys\n"
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    request = {"path": str(path), "to": str(tmp_path / "a.arrow"), "columns": []}
    result = subprocess.run(
        [sys.executable, "-I", "-c", starter, sys.executable, "-P", parquet.SCRIPT],
        input=json.dumps(request).encode() + b"\n",
        capture_output=True,
        check=True,
    )
    child = int(result.stdout)  # KiB
    assert (tmp_path / "a.arrow").stat().st_size > 64 << 22
    assert child < 400 << 10  # of which 110 before it reads


def test_a_reader_that_dies_is_an_error_of_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "abort.py"
    script.write_text("import os; input(); os.abort()")
    monkeypatch.setattr(parquet, "SCRIPT", script)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet cannot be read .*Arrow ended with SIGABRT"):
        Source(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (("a.idx", "a.jsonl"), "the same rows"),
        (("a_text_document.idx", "a.jsonl"), "the same rows"),
        (("a.jsonl", "a.jsonl.gz"), "the same rows"),
        (("train-00000-of-00001.jsonl", "test-00000-of-00001.jsonl"), "a training split"),
        (("train/a.jsonl", "validation/b.jsonl"), "a training split"),
        (("gsm8k_train.JSONL", "gsm8k_test.jsonl"), "a training split"),
        (("a.json.gz", "a.parquet"), "the same rows"),
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
    assert parse_conversation({"messages": separate}, section) == separate
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
    with pytest.raises(ConfigError, match=r"evaluate\.problems\.weight"):
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
