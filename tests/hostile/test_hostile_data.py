"""Hostile recipes and files of data end in rows or in a sentence, in bounded time and memory.

INFIR2_HOSTILE_CASES sets the number of cases of each kind, for a longer campaign.
"""

import itertools
import os
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mutate_data import mutate_bytes, mutate_index, mutate_json, mutate_parquet, mutate_recipe
from readers import RECIPES, ROWS, compressed_file, json_file, read_all, write_tokens

from infir2.config.load import load
from infir2.config.schema import RlRecipe
from infir2.data.indexed import IndexedDocuments
from infir2.data.json_rows import JsonRows
from infir2.data.parquet import ParquetConverter, ParquetRows
from infir2.data.types import RowError
from infir2.errors import ConfigError, DataError

CASES = int(os.environ.get("INFIR2_HOSTILE_CASES", "150"))
SECONDS, BYTES = 5.0, 300 << 20  # of one case


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
    good = json_file(form)
    path = tmp_path / "rows.jsonl"
    for case, data in itertools.islice(mutate_json(good, 2), CASES):
        path.write_bytes(data)
        with bounded(case):
            read_all(JsonRows(path))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.jsonl{suffix}"
    good = compressed_file(suffix)
    for case, data in itertools.islice(mutate_bytes(good, 3), CASES):
        path.write_bytes(data)
        with bounded(case):
            read_all(JsonRows(path))


def test_a_row_of_many_values_is_unusable(tmp_path: Path) -> None:
    """A boolean takes a bit of a file, and an object in Python."""
    values = pa.repeat(True, 5_000_000)
    flags = pa.ListArray.from_arrays([0, len(values) - 1, len(values)], values)
    table = pa.table({"text": ["a", "b"], "flags": flags})
    pq.write_table(table, tmp_path / "rows.parquet")
    with ParquetConverter() as converter:
        source = ParquetRows(tmp_path / "rows.parquet", {"text", "flags"}, converter)
    with pytest.raises(RowError, match="values, more than"):
        source.read(0)
    assert source.read(1) == {"text": "b", "flags": [True]}


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=4)
    with ParquetConverter() as converter:
        for case, data in itertools.islice(mutate_parquet(path.read_bytes(), 4), CASES):
            path.write_bytes(data)
            with bounded(case):
                read_all(ParquetRows(path, {"text", "messages"}, converter))


def test_indexed_tokens(tmp_path: Path) -> None:
    path = write_tokens(tmp_path)
    for case, data in itertools.islice(mutate_index(path.read_bytes(), 5), CASES):
        path.write_bytes(data)
        with bounded(case):
            documents = IndexedDocuments(path)
            assert sum(len(documents.read(n)["token_ids"]) for n in range(len(documents))) <= 16
    path.unlink()
    good = write_tokens(tmp_path)
    about = b'{"tokenizer": "abc", "documents": 4, "tokens": 16, "source_bytes": 64}'
    for case, data in itertools.islice(mutate_json(about, 6), CASES):
        good.with_suffix(".json").write_bytes(data)
        with bounded(case):
            assert IndexedDocuments(good).num_bytes >= 0
