"""infir2 tokenize: kinds of sources, resuming after a kill, errors, and leftover files."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stages import gone

from infir2.cli import main
from infir2.data import load_tokenizer
from infir2.data import tokenize as module
from infir2.data.indexed import IndexedDocuments
from infir2.errors import ConfigError, DataError, OutputExistsError

SMALL_CHUNKS = (
    "import sys; from infir2.cli import main; from infir2.data import tokenize; "
    "tokenize.CHUNK_BYTES = 20_000; sys.exit(main(sys.argv[1:]))"
)


def documents(prefix: Path) -> list[list[int]]:
    rows = IndexedDocuments(prefix)
    return [rows.read(index)["token_ids"].tolist() for index in range(len(rows))]


def arguments(sources: list[Path], world: Path, out: Path, *more: str) -> list[str]:
    return [
        "tokenize",
        *map(str, sources),
        "--tokenizer",
        str(world / "tokenizer"),
        "--out",
        str(out),
        *more,
    ]


@pytest.fixture
def texts(world: Path) -> list[str]:
    return [json.loads(line)["text"] for line in (world / "cpt.jsonl").read_text().splitlines()]


def test_every_kind_of_source_gives_the_same_documents_in_order(
    world, texts, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(module, "CHUNK_BYTES", 3000)  # many chunks
    jsonl, parquet, folder = tmp_path / "a.jsonl", tmp_path / "a.parquet", tmp_path / "folder"
    jsonl.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    pq.write_table(
        pa.table({"text": texts, "id": list(range(len(texts)))}), parquet, row_group_size=70
    )
    folder.mkdir()
    for index, text in enumerate(texts):
        (folder / f"{index:04d}.txt").write_text(text)
    tokenizer = load_tokenizer(world / "tokenizer")
    expected = [tokenizer.encode_document(text) for text in texts]
    for name, source in (("jsonl", jsonl), ("parquet", parquet), ("folder", folder)):
        assert main(arguments([source], world, tmp_path / name, "--workers", "3")) == 0
        assert documents(tmp_path / name) == expected
        assert json.loads((tmp_path / f"{name}.json").read_text())["tokens"] == sum(
            map(len, expected)
        )
        assert not (tmp_path / f"{name}.parts").exists()
    assert main(arguments([jsonl, parquet], world, tmp_path / "both")) == 0
    assert documents(tmp_path / "both") == expected * 2
    assert (
        f"{sum(map(len, expected)):,} tokens in {len(texts)} documents" in capsys.readouterr().out
    )


def test_unusable_rows_are_listed_and_too_many_stop(world, texts, tmp_path, capsys):
    lines = [json.dumps({"text": text}) for text in texts]
    lines[7], lines[20] = "{broken", json.dumps({"text": "a\0b"})
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert main(arguments([tmp_path / "a.jsonl"], world, tmp_path / "out")) == 0
    listed = [
        json.loads(line) for line in (tmp_path / "out.quarantine.jsonl").read_text().splitlines()
    ]
    assert [(entry["origin"], entry["reason"]) for entry in listed] == [
        (f"{tmp_path / 'a.jsonl'}:8", "bad_json"),
        (f"{tmp_path / 'a.jsonl'}:21", "nul_byte"),
    ]
    assert len(documents(tmp_path / "out")) == len(texts) - 2
    assert "2 rows left out" in capsys.readouterr().out
    lines[30:40] = ["{"] * 10
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    assert main(arguments([tmp_path / "b.jsonl"], world, tmp_path / "out2")) == 4
    assert not list(tmp_path.glob("out2.bin")) + list(tmp_path.glob("out2.idx"))
    assert "rows are unusable" in capsys.readouterr().err
    assert (
        main(
            arguments(
                [tmp_path / "b.jsonl"], world, tmp_path / "out2", "--max-quarantined-fraction=0.1"
            )
        )
        == 0
    )


def test_an_existing_output_and_parts_of_another_job_are_rejected(world, tmp_path):
    source = world / "cpt.jsonl"
    for suffix in ("idx", "bin"):
        (tmp_path / f"{suffix}.{suffix}").write_bytes(b"existing")
        with pytest.raises(OutputExistsError, match="exists already"):
            module.tokenize([source], world / "tokenizer", tmp_path / suffix)
        assert (tmp_path / f"{suffix}.{suffix}").read_bytes() == b"existing"
        assert len(list(tmp_path.glob(f"{suffix}.*"))) == 1
    (tmp_path / "out.parts").mkdir()
    (tmp_path / "out.parts/plan").write_text("another")
    with pytest.raises(ConfigError, match="belongs to another job"):
        module.tokenize([source], world / "tokenizer", tmp_path / "out")
    module.tokenize([source], world / "tokenizer", tmp_path / "tokens")
    with pytest.raises(DataError, match="is tokenized already"):
        module.tokenize([tmp_path / "tokens"], world / "tokenizer", tmp_path / "again")
    assert main(arguments([source], world, tmp_path / "x", "--workers=-1")) == 2


@pytest.mark.parametrize("out", [".", "/", ""])
def test_a_prefix_without_a_name_is_one_sentence(world, tmp_path, monkeypatch, capsys, out):
    monkeypatch.chdir(tmp_path)
    assert main(arguments([world / "cpt.jsonl"], world, Path(out))) == 2
    assert "name the files to write, such as" in capsys.readouterr().err


def test_a_kill_loses_no_finished_chunk(world, tmp_path, monkeypatch):
    """After SIGKILL no process is left; the next run reuses finished chunks, with equal output."""
    source = tmp_path / "big.jsonl"
    source.write_text((world / "cpt.jsonl").read_text() * 60)
    command = subprocess.Popen(
        [
            sys.executable,
            "-c",
            SMALL_CHUNKS,
            *arguments([source], world, tmp_path / "out", "--workers=2"),
        ]
    )
    parts = tmp_path / "out.parts"
    deadline = time.monotonic() + 60
    while len(list(parts.glob("*.npz"))) < 3:
        assert time.monotonic() < deadline
        assert command.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    children = Path(f"/proc/{command.pid}/task/{command.pid}/children").read_text().split()
    command.send_signal(signal.SIGKILL)
    command.wait()
    assert children
    assert gone([int(pid) for pid in children])
    before = {path.name: path.stat().st_mtime_ns for path in parts.glob("*.npz")}
    assert not list(tmp_path.glob("out.bin"))
    monkeypatch.setattr(module, "CHUNK_BYTES", 20_000)
    seen = {}
    join = module._join
    monkeypatch.setattr(
        module,
        "_join",
        lambda *a: (
            seen.update({path.name: path.stat().st_mtime_ns for path in parts.glob("*.npz")})
            or join(*a)
        ),
    )
    done = module.tokenize([source], world / "tokenizer", tmp_path / "out", workers=2)
    assert done.chunks_kept == len(before) >= 3
    assert len(seen) > len(before)
    assert {name: seen[name] for name in before} == before
    module.tokenize([source], world / "tokenizer", tmp_path / "uninterrupted", workers=1)
    for suffix in ("bin", "idx", "json"):
        assert (tmp_path / f"out.{suffix}").read_bytes() == (
            tmp_path / f"uninterrupted.{suffix}"
        ).read_bytes()


def test_a_full_disk_is_one_sentence_and_the_next_run_resumes(world, tmp_path):
    """A limit on file size stands in for a full disk: the parts fit, the joined file does not."""
    command = [
        sys.executable,
        "-c",
        SMALL_CHUNKS,
        *arguments([world / "cpt.jsonl"], world, tmp_path / "out"),
    ]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # noqa: E731
    full = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert full.returncode == 4
    assert full.stderr.startswith("infir2: error: ")
    assert "cannot be written" in full.stderr
    assert full.stderr.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["out.parts"]
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0
    assert "chunks kept of an earlier run" in again.stdout
