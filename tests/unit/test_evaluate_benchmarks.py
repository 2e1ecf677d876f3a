"""A user's benchmark files in evalscope's layouts: names, columns, encodings, and refusals."""

import base64
import csv
import gzip
import json
import pickle
import zlib
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infir2.errors import ConfigError, DataError
from infir2.evaluate import benchmark_tests
from infir2.evaluate.benchmark_data import copy_benchmark, find_files
from infir2.evaluate.benchmark_tests import decode_tests
from infir2.evaluate.benchmarks import find_benchmark

FIXTURES = Path(__file__).parents[2] / "../shared/fixtures/eval"
AIME = [("How much is $2+3$?", "005"), ("How much is $7\\cdot 8$?", "056")]
GPQA = {
    "Question": "Which gas do plants take in?",
    "Correct Answer": "CO2",
    "Incorrect Answer 1": "N2 ",
    "Incorrect Answer 2": "O2",
    "Incorrect Answer 3": "He",
    "Record ID": "rec-1",
}
WINDOW = (datetime(2024, 8, 1), datetime(2025, 2, 1))


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data)).decode()


def contest_tests(kind: str, *pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"input": a, "output": b, "testtype": kind} for a, b in pairs]


def problem(number: int, date: str, private: Any, function: str = "") -> dict[str, Any]:
    kind = "functional" if function else "stdin"
    return {
        "question_title": f"invented {number}",
        "question_content": f"Invented problem {number}: print the double.",
        "platform": "atcoder",
        "question_id": f"x{number}",
        "contest_id": "c",
        "contest_date": date,
        "starter_code": "",
        "difficulty": "easy",
        "public_test_cases": json.dumps(contest_tests(kind, ("2", "4"))),
        "private_test_cases": private,
        "metadata": json.dumps({"func_name": function} if function else {}),
    }


def copied(name: str, data: Path, to: Path, **more: Any) -> list[dict[str, Any]]:
    result = copy_benchmark(find_benchmark(name), data, to, **more)
    (file,) = (path for path in to.rglob("*") if path.is_file() and path.name != "README.md")
    if file.suffix == ".parquet":
        rows: list[dict[str, Any]] = pq.read_table(file).to_pylist()
    else:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(result.questions) == len(rows)
    return rows


@pytest.mark.parametrize("spelling", ["problem", "question", "Problem", "Question"])
@pytest.mark.parametrize("write", [write_jsonl, write_csv, write_parquet])
def test_every_usual_spelling_and_format_becomes_evalscopes_layout(
    tmp_path: Path, spelling: str, write: Any
) -> None:
    answer = "Answer" if spelling[0].isupper() else "answer"
    rows = [{"ID": "1", spelling: question, answer: int(value)} for question, value in AIME]
    suffix = {"write_jsonl": "jsonl", "write_csv": "csv", "write_parquet": "parquet"}
    path = write(tmp_path / f"aime_2025.{suffix[write.__name__]}", rows)
    for data in (path, tmp_path):
        assert copied("aime25", data, tmp_path / f"out{data is path}" / "aime25") == [
            {"problem": question, "answer": str(int(value))} for question, value in AIME
        ]


def test_the_same_questions_in_several_files_are_copied_once(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "aime24/a.jsonl", [{"problem": q, "answer": a} for q, a in AIME])
    more = [{"Problem": q, "Answer": int(a)} for q, a in AIME]
    write_jsonl(tmp_path / "aime24/b.jsonl.gz", [*more, {"Problem": "New?", "Answer": 7}])
    rows = copied("aime24", tmp_path, tmp_path / "out")
    assert [row["answer"] for row in rows] == ["005", "056", "7"]
    write_jsonl(tmp_path / "aime24/c.jsonl", [{"problem": AIME[0][0], "answer": 6}])
    with pytest.raises(DataError, match=r"a.jsonl:1 and .*c.jsonl:1 have the same question"):
        copied("aime24", tmp_path, tmp_path / "out")


def test_layouts_and_names_of_hugging_face(tmp_path: Path) -> None:
    gpqa = tmp_path / "Idavidrein___gpqa"
    gpqa.mkdir()
    write_csv(gpqa / "gpqa_diamond.csv", [GPQA])
    write_csv(gpqa / "gpqa_main.csv", [GPQA | {"Question": "Another one?"}])
    (gpqa / "README.md").write_text("about")
    (gpqa / "dataset_infos.json").write_text("{}")
    math = tmp_path / "math-ai--aime24/data/test-00000-of-00001.parquet"
    write_parquet(math, [{"problem": q, "answer": int(a)} for q, a in AIME])
    gsm = tmp_path / "gsm8k"
    for split in ("train", "test"):
        for config in ("main", "socratic"):
            rows = [{"question": f"{split} question?", "answer": f"{config}\n#### 1,200"}]
            write_parquet(gsm / config / f"{split}-00000-of-00001.parquet", rows)
    assert copied("gpqa_diamond", tmp_path, tmp_path / "out/1") == [
        {key: value for key, value in GPQA.items() if key != "Record ID"}
    ]
    assert len(copied("aime24", tmp_path, tmp_path / "out/2")) == 2
    assert copied("gsm8k", tmp_path, tmp_path / "out/3") == [
        {"question": "test question?", "answer": "main\n#### 1,200"}
    ]
    assert (gpqa / "dataset_infos.json").exists()


def test_live_code_bench_keeps_the_window_and_decodes_every_encoding(tmp_path: Path) -> None:
    hidden = contest_tests("stdin", ("5", "10"))
    text = json.dumps(hidden)
    called = contest_tests("functional", ("[5]", "10"))
    write_jsonl(
        tmp_path / "lcb/test.jsonl",
        [
            problem(0, "2024-07-31T23:59:59", text),
            problem(1, "2024-08-01T00:00:00", text),
            problem(2, "2024-10-05T00:00:00", packed(pickle.dumps(text))),
        ],
    )
    write_jsonl(
        tmp_path / "lcb/test2.jsonl",
        [
            problem(3, "2025-02-01T00:00:00", packed(json.dumps(called).encode()), "double"),
            problem(4, "2025-02-01T00:00:01", text),
        ],
    )
    rows = copied("live_code_bench", tmp_path, tmp_path / "out", window=WINDOW)
    assert [row["question_id"] for row in rows] == ["x1", "x2", "x3"]
    assert [json.loads(row["private_test_cases"]) for row in rows] == [hidden, hidden, called]
    assert [json.loads(row["metadata"]) for row in rows] == [{}, {}, {"func_name": "double"}]
    assert all(isinstance(row["contest_date"], str) for row in rows)
    rows = copied("live_code_bench", tmp_path / "lcb/test2.jsonl", tmp_path / "all")
    assert len(rows) == 2


def test_dates_of_parquet_files_are_written_as_text(tmp_path: Path) -> None:
    row = problem(1, "", "[]") | {"contest_date": datetime(2024, 9, 1, 12)}
    path = write_parquet(tmp_path / "code_generation_lite.parquet", [row])
    (found,) = copied("live_code_bench", path, tmp_path / "out", window=WINDOW)
    assert found["contest_date"] == "2024-09-01T12:00:00"


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (print, ("PICKLE RAN",))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (packed(pickle.dumps(Evil())), "asks for 'builtins.print', which no such file needs"),
        (packed(pickle.dumps("[", 4)), "is not JSON"),
        (packed(b"\xff\xfe"), "unpacks to neither JSON nor a pickled text"),
        (base64.b64encode(zlib.compress(b"[]" * 999)[:-9]).decode(), "is cut off"),
        (base64.b64encode(b"no zlib").decode(), "is not zlib data after base64"),
        ("so what?", "is neither JSON nor base64"),
        ("[" * 5000, "is not JSON"),
        ({"input": "1"}, "is no list of tests"),
        ([{"input": 1, "output": "2"}], "without the texts `input` and `output` (test 1)"),
        ([{"input": "", "output": "", "testtype": "x"}], "of the unknown type 'x' (test 1)"),
        (packed(bytes(2000)), "unpacks to more than 1,000 bytes"),
    ],
)
def test_tests_that_cannot_be_decoded_are_refused_and_nothing_runs(
    tmp_path: Path,
    value: Any,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "1,000" in said:
        monkeypatch.setattr(benchmark_tests, "MAX_TEST_BYTES", 1000)
    with pytest.raises(ValueError, match=r".") as caught:
        decode_tests(value)
    assert said in str(caught.value)
    path = write_jsonl(tmp_path / "lcb.jsonl", [problem(1, "2024-10-05", value)])
    with pytest.raises(DataError) as refused:
        copied("live_code_bench", path, tmp_path / "out")
    assert f"{path}:1 has a `private_test_cases` that " in str(refused.value)
    assert refused.value.exit_code == 4
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "x", "answer": 1}], "has no field `problem` (it has answer, text)"),
        ([{"problem": "x", "solution": 1}], "has no field `answer` (it has problem, solution)"),
        ([{"problem": "x", "answer": None}], "a `answer` that is neither text nor a number"),
        ([{"problem": " ", "answer": 1}], "has an empty `problem`"),
        ([{"problem": "x", "answer": float("nan")}], "has a `answer` that is nan"),
    ],
)
def test_a_row_without_question_or_answer_is_named(
    tmp_path: Path, rows: list[dict[str, Any]], said: str
) -> None:
    path = write_jsonl(tmp_path / "aime24.jsonl", rows)
    with pytest.raises(DataError) as refused:
        copied("aime24", path, tmp_path / "out")
    assert f"{path}:1 " in str(refused.value)
    assert said in str(refused.value)


def test_missing_paths_and_empty_windows_are_named(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "d/aime24.jsonl", [{"problem": "x", "answer": 1}])
    write_jsonl(tmp_path / "lcb.jsonl", [problem(1, "2024-01-05", "[]")])
    for name, data, said in (
        ("aime24", tmp_path / "no/dir", f"does not exist; {tmp_path} has d, lcb.jsonl."),
        ("gpqa_diamond", tmp_path / "d", "has no data of gpqa_diamond; it has aime24.jsonl."),
        ("live_code_bench", tmp_path, "live_code_bench between 2024-08-01 and 2025-02-01"),
    ):
        with pytest.raises(DataError) as refused:
            copied(name, data, tmp_path / "out", window=WINDOW, alone=True)
        assert said in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_directory_of_one_benchmark_needs_no_names(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "d/test.jsonl", [{"problem": "x", "answer": 1}])
    write_jsonl(tmp_path / "d/train.jsonl", [{"problem": "y", "answer": 1}])
    assert len(copied("aime24", tmp_path / "d", tmp_path / "out", alone=True)) == 1
    with pytest.raises(DataError, match="has no data of aime24"):
        copied("aime24", tmp_path / "d", tmp_path / "out")
    for name in ("lcb_a", "lcb_b"):
        write_jsonl(tmp_path / "two" / name / "test.jsonl", [problem(1, "2024-01-05", "[]")])
    with pytest.raises(DataError, match=r"several that may be live_code_bench \(lcb_a, lcb_b\)"):
        copied("live_code_bench", tmp_path / "two", tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("problem,answer\nx,1,2\n", ":2 has another number of fields than its header"),
        ("problem,answer\nx\n", ":2 has another number of fields than its header"),
        ('problem,answer\n"x"y,1\n', ":2 is not CSV"),
        (b"problem,answer\n\xff,1\n", "is not UTF-8 at byte 15"),
    ],
)
def test_damaged_csv_files_are_named(tmp_path: Path, text: str | bytes, said: str) -> None:
    path = tmp_path / "aime24.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(DataError) as refused:
        copied("aime24", path, tmp_path / "out")
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gpqa", "'gpqa' is not a benchmark; did you mean gpqa_diamond? there are aime24, "),
        ("AIME-2024", "did you mean aime24?"),
        ("livecodebench", "did you mean live_code_bench?"),
        ("nonsense", "'nonsense' is not a benchmark; there are "),
    ],
)
def test_an_unknown_benchmark_is_refused_with_the_nearest_name(name: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        find_benchmark(name)
    assert said in str(refused.value)


@pytest.mark.skipif(not FIXTURES.exists(), reason="the benchmark-shaped fixtures are not here")
def test_shared_fixtures_of_four_benchmarks(tmp_path: Path) -> None:
    counts = {
        name: len(copied(name, FIXTURES, tmp_path / name, window=window))
        for name, window in (("aime25", None), ("gpqa_diamond", None), ("live_code_bench", WINDOW))
    }
    assert counts == {"aime25": 6, "gpqa_diamond": 5, "live_code_bench": 4}
    assert find_files(find_benchmark("live_code_bench"), FIXTURES)[0].parent.name == "lcb"
    with pytest.raises(DataError, match=r"test.jsonl:1 has a `private_test_cases` that asks for"):
        copied("live_code_bench", FIXTURES / "lcb_evil", tmp_path / "evil")
