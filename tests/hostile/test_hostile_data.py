"""Hostile recipes and files of data end in rows or in a sentence, in bounded time and memory.

INFIR2_HOSTILE_CASES sets the number of cases of each kind, for a longer campaign.
"""

import itertools
import json
import os
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mutate_data import mutate_bytes, mutate_index, mutate_json, mutate_parquet, mutate_recipe

from infir2.config.load import load
from infir2.config.schema import RlRecipe, SourceSection
from infir2.data.indexed import IndexedDocuments, write_index
from infir2.data.json_rows import JsonRows
from infir2.data.parquet import ParquetConverter, ParquetRows
from infir2.data.rows import parse_conversation, parse_document, parse_prompt
from infir2.data.types import RowError, Rows
from infir2.errors import ConfigError, DataError

CASES = int(os.environ.get("INFIR2_HOSTILE_CASES", "150"))
SECONDS, BYTES = 5.0, 300 << 20  # of one case
RECIPES = Path(__file__).parents[2] / "recipes" / "demo"
CHAT = [{"role": "user", "content": "2+3=?"}, {"role": "assistant", "content": "5"}]
ROWS = [
    {"text": f'a "{n}"', "messages": CHAT, "prompt": "2+3", "label": 5, "difficulty": n}
    for n in range(6)
]


@contextmanager
def bounded(name: str) -> Iterator[None]:
    """Only an error that a command prints as a sentence may end a case."""
    tracemalloc.start()
    begin = time.process_time()
    try:
        with suppress(DataError, ConfigError):
            yield
    except Exception as error:
        raise AssertionError(f"{name} ends in {error!r}") from error
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert time.process_time() - begin < SECONDS, name
    assert peak < BYTES, name


def json_text(row: object, indent: int | None) -> str:
    return json.dumps(row, indent=indent)


def read_all(rows: Rows) -> None:
    section = SourceSection(path="x")
    for index in range(min(len(rows), 1000)):
        assert rows.number(index) > 0
        for parse in (parse_document, parse_conversation, parse_prompt):
            with suppress(RowError):
                parse(rows.read(index), section)


@pytest.mark.parametrize("name", ["cpt.toml", "rl1.toml"])
def test_recipes(name: str, tmp_path: Path) -> None:
    good = (RECIPES / name).read_bytes().replace(b'extends = "', f'extends = "{RECIPES}/'.encode())
    path = tmp_path / "recipe.toml"
    for case, data in itertools.islice(mutate_recipe(good, 1), CASES):
        path.write_bytes(data)
        with bounded(case):
            load(RlRecipe, [path])


@pytest.mark.parametrize("form", ["lines", "array", "pretty"])
def test_json(form: str, tmp_path: Path) -> None:
    lines = [json_text(row, None) for row in ROWS]
    good = {
        "lines": "\n".join(lines),
        "array": f"[{', '.join(lines)}]",
        "pretty": "\n".join(json_text(row, 2) for row in ROWS),
    }[form].encode()
    path = tmp_path / "rows.jsonl"
    for case, data in itertools.islice(mutate_json(good, 2), CASES):
        path.write_bytes(data)
        with bounded(case):
            read_all(JsonRows(path))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.jsonl{suffix}"
    good = pa.Codec("gzip" if suffix == ".gz" else "zstd").compress(
        "\n".join(json_text(row, None) for row in ROWS).encode(), asbytes=True
    )
    for case, data in itertools.islice(mutate_bytes(good, 3), CASES):
        path.write_bytes(data)
        with bounded(case):
            read_all(JsonRows(path))


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=4)
    with ParquetConverter() as converter:
        for case, data in itertools.islice(mutate_parquet(path.read_bytes(), 4), CASES):
            path.write_bytes(data)
            with bounded(case):
                read_all(ParquetRows(path, {"text", "messages"}, converter))


def test_indexed_tokens(tmp_path: Path) -> None:
    path = tmp_path / "tokens.idx"
    lengths = np.array([4, 0, 3, 9])
    write_index(path, np.uint16, lengths)
    (tmp_path / "tokens.bin").write_bytes(bytes(2 * int(lengths.sum())))
    for case, data in itertools.islice(mutate_index(path.read_bytes(), 5), CASES):
        path.write_bytes(data)
        with bounded(case):
            documents = IndexedDocuments(path)
            assert sum(len(documents.read(n)["token_ids"]) for n in range(len(documents))) <= 16
    write_index(tmp_path / "good.idx", np.uint16, lengths)
    (tmp_path / "good.bin").write_bytes(bytes(2 * int(lengths.sum())))
    about = b'{"tokenizer": "abc", "documents": 4, "tokens": 16, "source_bytes": 64}'
    for case, data in itertools.islice(mutate_json(about, 6), CASES):
        (tmp_path / "good.json").write_bytes(data)
        with bounded(case):
            assert IndexedDocuments(tmp_path / "good").num_bytes >= 0
