"""Megatron's .bin/.idx files: format, parity with megatron-core, and training from them."""

import json
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from infir2.cli import main
from infir2.config.schema import DataSection, SourceSection
from infir2.data import Loader, load_tokenizer
from infir2.data.indexed import IndexedDocuments, token_dtype, write_index
from infir2.data.rows import document_tokens, open_source
from infir2.data.tokenize import tokenize
from infir2.data.types import RowError
from infir2.errors import DataError

DOCUMENTS = [[5, 6, 7, 2], [8], [9, 10, 11]]


def write_by_hand(
    prefix: Path, code: int = 8, kind: str = "H", bounds: tuple[int, ...] = (0, 1, 3)
) -> Path:
    """Write three sequences in two documents, byte by byte as the format defines."""
    tokens = [token for document in DOCUMENTS for token in document]
    size = struct.calcsize(kind)
    prefix.with_name(prefix.name + ".bin").write_bytes(
        struct.pack(f"<{len(tokens)}{kind}", *tokens)
    )
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, 3, len(bounds))
    index += (
        struct.pack("<3i", 4, 1, 3)
        + struct.pack("<3q", 0, 4 * size, 5 * size)
        + struct.pack(f"<{len(bounds)}q", *bounds)
    )
    prefix.with_name(prefix.name + ".idx").write_bytes(index)
    return prefix


@pytest.mark.parametrize(("code", "kind"), [(8, "H"), (4, "i"), (5, "q"), (1, "B")])
def test_files_packed_by_hand_are_read(tmp_path, code, kind):
    prefix = write_by_hand(tmp_path / "corpus.v1", code, kind)
    for path in (prefix, prefix.with_name("corpus.v1.bin"), prefix.with_name("corpus.v1.idx")):
        documents = IndexedDocuments(path)
        assert [documents.read(index)["token_ids"].tolist() for index in range(len(documents))] == [
            [5, 6, 7, 2],
            [8, 9, 10, 11],
        ]
        assert documents.num_bytes == 4 * 8


def test_written_bytes_equal_the_format(tmp_path):
    prefix = write_by_hand(tmp_path / "corpus", bounds=(0, 1, 2, 3))
    write_index(tmp_path / "ours.idx", np.uint16, np.asarray([4, 1, 3]))
    assert (tmp_path / "ours.idx").read_bytes() == prefix.with_name("corpus.idx").read_bytes()
    assert (token_dtype(65_499), token_dtype(65_500)) == (np.uint16, np.int32)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda index: index[:-1], "its header requires 94"),
        (lambda index: index[:20], "is not the index of a Megatron data set"),
        (lambda index: b"PK" + index[2:], "is not the index of a Megatron data set"),
        (lambda index: index[:9] + struct.pack("<Q", 2) + index[17:], "has version 2"),
        (lambda index: index[:17] + b"\x06" + index[18:], "dtype code 6"),
        (lambda index: index[:18] + struct.pack("<Q", 2**62) + index[26:], "its header requires"),
        (
            lambda index: index[:34] + struct.pack("<i", -4) + index[38:],
            "does not match corpus.bin",
        ),
        (lambda index: index[:34] + struct.pack("<i", 9) + index[38:], "does not match corpus.bin"),
        (
            lambda index: index[:46] + struct.pack("<q", 2**63 - 2) + index[54:],
            "does not match corpus.bin",
        ),
        (lambda index: index[:46] + struct.pack("<q", 1) + index[54:], "does not match corpus.bin"),
        (lambda index: index[:70] + struct.pack("<3q", 0, 4, 3), "does not match corpus.bin"),
        (lambda index: index[:70] + struct.pack("<3q", 0, 1, 2), "does not match corpus.bin"),
    ],
)
def test_a_damaged_index_is_one_sentence(tmp_path, damage, sentence):
    index = write_by_hand(tmp_path / "corpus").with_name("corpus.idx")
    index.write_bytes(damage(index.read_bytes()))
    with pytest.raises(DataError, match=sentence):
        IndexedDocuments(index)


def test_a_cut_or_missing_bin_is_one_sentence(tmp_path):
    binary = write_by_hand(tmp_path / "corpus").with_name("corpus.bin")
    binary.write_bytes(binary.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"does not match corpus\.bin"):
        IndexedDocuments(binary)
    binary.unlink()
    with pytest.raises(DataError, match=r"corpus\.bin is missing"):
        IndexedDocuments(tmp_path / "corpus")


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_megatron_core_reads_ours_and_we_read_its_own(tmp_path, dtype):
    with warnings.catch_warnings(action="ignore"):
        indexed = pytest.importorskip(
            "megatron.core.datasets.indexed_dataset", reason="needs megatron-core"
        )
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 60_000, size).astype(dtype) for size in (3, 1, 700, 0, 12)]

    np.concatenate(documents).tofile(tmp_path / "ours.bin")
    write_index(tmp_path / "ours.idx", dtype, np.asarray([len(document) for document in documents]))
    theirs = indexed.IndexedDataset(str(tmp_path / "ours"), mmap=True)
    assert len(theirs) == 5
    assert theirs.document_indices.tolist() == list(range(6))
    assert all(np.array_equal(theirs[index], document) for index, document in enumerate(documents))

    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    builder.add_document(
        np.concatenate(documents[:3]).tolist(), [3, 1, 700]
    )  # one document of three sequences
    builder.add_document(documents[4].tolist(), [12])
    builder.finalize(str(tmp_path / "theirs.idx"))
    ours = IndexedDocuments(tmp_path / "theirs")
    assert len(ours) == 2
    assert np.array_equal(ours.read(0)["token_ids"], np.concatenate(documents[:3]))
    assert np.array_equal(ours.read(1)["token_ids"], documents[4])


def documents_section(path: Path, **changes: object) -> DataSection:
    sizes = {"batch_sequences": 4, "sequence_tokens": 128, "micro_batch_tokens": 256}
    return DataSection(sources=(SourceSection(path=str(path)),), **(sizes | changes))


def steps(loader: Loader, count: int) -> list[list[torch.Tensor]]:
    return [[batch.token_ids for batch in loader.next_step()] for _ in range(count)]


def equal(first: list[list[torch.Tensor]], second: list[list[torch.Tensor]]) -> bool:
    return all(
        torch.equal(a, b)
        for one, other in zip(first, second, strict=True)
        for a, b in zip(one, other, strict=True)
    )


def test_the_loader_makes_the_same_steps_of_text_and_of_its_tokens_and_resumes(world, tmp_path):
    tokenize([world / "cpt.jsonl"], world / "tokenizer", tmp_path / "cpt", workers=2)
    tokenizer = load_tokenizer(world / "tokenizer")
    text = steps(Loader(documents_section(world / "cpt.jsonl"), "documents", tokenizer, 5), 8)
    loader = Loader(documents_section(tmp_path / "cpt"), "documents", tokenizer, 5)
    first = steps(loader, 4)
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = Loader(documents_section(tmp_path / "cpt.bin"), "documents", tokenizer, 5)
    resumed.load_state_dict(state)
    second = steps(resumed, 4)
    assert equal(first + second, text)
    halves = [
        Loader(documents_section(tmp_path / "cpt.idx"), "documents", tokenizer, 5, rank, 2)
        for rank in range(2)
    ]
    both_ranks = [
        [*one, *other] for one, other in zip(*(steps(half, 4) for half in halves), strict=True)
    ]
    for one, other in zip(both_ranks, first, strict=True):
        assert torch.equal(torch.cat(one).sort().values, torch.cat(other).sort().values)


def test_tokens_of_another_tokenizer_and_other_uses_are_rejected(world, tmp_path):
    tokenize([world / "cpt.jsonl"], world / "tokenizer", tmp_path / "cpt", workers=1)
    tokenizer = load_tokenizer(world / "tokenizer")
    side = tmp_path / "cpt.json"
    side.write_text(json.dumps(json.loads(side.read_text()) | {"tokenizer": "0" * 64}))
    with pytest.raises(DataError, match="tokenized with another tokenizer"):
        Loader(documents_section(tmp_path / "cpt"), "documents", tokenizer, 5)
    side.write_text("{")
    with pytest.raises(DataError, match="not readable JSON"):
        Loader(documents_section(tmp_path / "cpt"), "documents", tokenizer, 5)
    side.unlink()
    Loader(documents_section(tmp_path / "cpt"), "documents", tokenizer, 5)
    with pytest.raises(DataError, match="only `infir2 cpt` trains on"):
        Loader(
            documents_section(tmp_path / "cpt", batch_sequences=0, batch_samples=2),
            "messages",
            tokenizer,
            5,
        )


def test_megatrons_documents_get_an_end_token_and_no_token_outside_the_vocabulary(world, tmp_path):
    tokenizer = load_tokenizer(world / "tokenizer")
    section = SourceSection(path=str(write_by_hand(tmp_path / "corpus")))
    source = open_source(section, "documents")
    assert document_tokens(source.read(1), section, tokenizer).tolist() == [
        8,
        9,
        10,
        11,
        tokenizer.eod_token_id,
    ]
    with pytest.raises(RowError, match="tokens 7 to 70000") as caught:
        document_tokens({"token_ids": np.asarray([7, 70_000])}, section, tokenizer)
    assert caught.value.reason == "bad_token"


def test_a_run_trains_from_tokens(world, tmp_path):
    """Training on a directory of indexed files gives the losses of training on the text."""
    (tmp_path / "tokens").mkdir()
    assert (
        main(
            [
                "tokenize",
                str(world / "cpt.jsonl"),
                "--tokenizer",
                str(world / "tokenizer"),
                "--out",
                str(tmp_path / "tokens/cpt"),
            ]
        )
        == 0
    )
    losses = []
    for name, source in (("text", world / "cpt.jsonl"), ("tokens", tmp_path / "tokens")):
        options = [
            f"--run.dir={tmp_path / f'run-{name}'}",
            f"--data.sources.0.path={source}",
            f"--data.tokenizer={world / 'tokenizer'}",
        ]
        options += [
            "--schedule.total_steps=2",
            "--schedule.decay_steps=0",
            "--schedule.warmup_steps=0",
            "--data.validation_sources=[]",
        ]
        recipe = Path(__file__).parents[2] / "recipes/demo/cpt.toml"
        assert main(["cpt", str(recipe), *options]) == 0
        lines = [
            json.loads(line)
            for line in (tmp_path / f"run-{name}" / "metrics.jsonl").read_text().splitlines()
        ]
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2
