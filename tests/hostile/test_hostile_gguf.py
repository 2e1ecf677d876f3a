"""A hostile GGUF file is refused in one sentence before transformers reads it."""

import itertools
import struct
import time

import pytest
from mutate_gguf import good_gguf, mutants

from infir2.cli import main
from infir2.convert.gguf_header import check_gguf_header
from infir2.errors import CheckpointError


def test_a_good_header_passes_and_each_absurd_count_is_named(tmp_path, capsys):
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    path, good = tmp_path / "m.gguf", good_gguf()
    path.write_bytes(good)
    check_gguf_header(path)
    for place, count, sentence in (
        (8, 2**60, "tensors and"),
        (16, 2**60, "settings"),
        (24, 2**40, "a name of"),
        (good.index(struct.pack("<Q3B", 3, 7, 8, 9)), 2**60, "arrays claim"),
        (good.index(struct.pack("<QQ", 4, 2)), 2**40, "claims a tensor of shape"),
        (0, 0, "does not begin as GGUF"),
    ):
        path.write_bytes(good[:place] + struct.pack("<Q", count) + good[place + 8 :])
        assert main(["import", "hf", str(path), "--to", str(tmp_path / "out")]) == 3
        assert sentence in capsys.readouterr().err


def test_mutants_are_read_or_refused_at_once(tmp_path):
    path, refused = tmp_path / "m.gguf", 0
    began = time.process_time()
    for _, data in itertools.islice(mutants(good_gguf(), 3), 1000):
        path.write_bytes(data)
        try:
            check_gguf_header(path)
        except CheckpointError:
            refused += 1
    assert refused > 500
    assert time.process_time() - began < 10
