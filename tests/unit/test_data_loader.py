"""The loader: the same steps on any number of ranks, exact resume, each token a target once."""

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from infir2.config.schema import DataSection, SourceSection
from infir2.data import Batch, ChatTokenizer, Loader, load_tokenizer, validation_batches
from infir2.data.rows import Quarantine
from infir2.data.streams import DocumentWindows, SampleStream
from infir2.demo.world import DemoWorld, make_demo_world
from infir2.errors import DataError

WORLD = DemoWorld(
    cpt_tokens=12_000, validation_documents=24, sft_rows=48, rl_rows=(8, 8), held_out_rows=9
)
SETTINGS = {
    "documents": (
        "documents",
        {"batch_sequences": 4, "sequence_tokens": 128, "micro_batch_tokens": 256},
    ),
    "samples": (
        "messages",
        {"batch_samples": 10, "sequence_tokens": 128, "micro_batch_tokens": 256},
    ),
    "windows": (
        "messages",
        {
            "batch_sequences": 2,
            "sequence_tokens": 128,
            "micro_batch_tokens": 128,
            "pack_window_samples": 13,
        },
    ),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data") / "world"
    make_demo_world(directory, 0, WORLD)
    return directory


@pytest.fixture(scope="module")
def tokenizer(world: Path) -> ChatTokenizer:
    return load_tokenizer(world / "tokenizer")


def section_for(world: Path, setting: str, **changes: object) -> DataSection:
    kind, keys = SETTINGS[setting]
    names = ("cpt",) if kind == "documents" else ("sft1", "sft2")
    sources = tuple(
        SourceSection(path=str(world / f"{name}.jsonl"), weight=1.0 + index)
        for index, name in enumerate(names)
    )
    return DataSection(**({"sources": sources} | keys | changes))  # type: ignore[arg-type]


def loader_for(
    world: Path,
    tokenizer: ChatTokenizer,
    setting: str,
    rank: int = 0,
    world_size: int = 1,
    **changes: object,
) -> Loader:
    return Loader(
        section_for(world, setting, **changes), SETTINGS[setting][0], tokenizer, 5, rank, world_size
    )  # type: ignore[arg-type]


def sequences(batches: list[Batch]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for batch in batches:
        if batch.sample_indices:
            for start, end in zip(
                batch.cu_seqlens.tolist(), batch.cu_seqlens.tolist()[1:], strict=False
            ):
                yield (
                    tuple(batch.token_ids[start:end].tolist()),
                    tuple(batch.labels[start:end].tolist()),
                )


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(getattr(a, name), getattr(b, name))
        for a, b in zip(first, second, strict=True)
        for name in ("token_ids", "positions", "labels", "loss_mask", "cu_seqlens")
    )


@pytest.mark.parametrize("setting", SETTINGS)
def test_interrupted_three_times_gives_the_same_steps(
    world: Path, tokenizer: ChatTokenizer, setting: str
) -> None:
    straight = loader_for(world, tokenizer, setting)
    expected = [straight.next_step() for _ in range(16)]
    loader, found = loader_for(world, tokenizer, setting), []
    for stop in (3, 4, 11, 16):
        found += [loader.next_step() for _ in range(stop - len(found))]
        state = json.loads(json.dumps(loader.state_dict()))
        loader = loader_for(world, tokenizer, setting)
        loader.load_state_dict(state)
        assert loader.state_dict() == state
    assert all(same(a, b) for a, b in zip(expected, found, strict=True))
    loader.load_state_dict(
        json.loads(json.dumps(state))
    )  # also in a loader that has already prepared a step
    assert same(loader.next_step(), straight.next_step())


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_steps_of_one_process(
    world: Path, tokenizer: ChatTokenizer, setting: str, world_size: int
) -> None:
    single = loader_for(world, tokenizer, setting)
    ranks = [loader_for(world, tokenizer, setting, rank, world_size) for rank in range(world_size)]
    for step in range(8):
        if step == 4:  # resumed with one more rank
            world_size += 1
            state = ranks[0].state_dict()
            assert all(rank.state_dict() == state for rank in ranks)
            assert state == single.state_dict()
            ranks = [
                loader_for(world, tokenizer, setting, rank, world_size)
                for rank in range(world_size)
            ]
            for rank in ranks:
                rank.load_state_dict(state)
        expected = sorted(sequences(single.next_step()))
        dealt = [rank.next_step() for rank in ranks]
        assert len({len(batches) for batches in dealt}) == 1
        assert sorted(pair for batches in dealt for pair in sequences(batches)) == expected


def test_every_token_of_a_document_but_its_first_is_a_target_once(
    world: Path, tokenizer: ChatTokenizer
) -> None:
    section = section_for(world, "documents")
    documents = [
        tokenizer.encode_document(json.loads(line)["text"])
        for line in (world / "cpt.jsonl").read_text().splitlines()
    ]
    for length in (16, 48, 128):  # shorter and longer than a document
        stream = SampleStream(section.sources, section, "documents", tokenizer, 5, Quarantine(0.0))
        windows = DocumentWindows(stream, length)
        targets: dict[str, list[int]] = defaultdict(list)
        while stream.position < len(documents):
            pieces = windows.next_pack()
            assert length - 1 <= sum(piece.num_tokens for piece in pieces) <= length
            for piece in pieces:
                assert not piece.loss_mask[0]
                targets[piece.origin] += piece.token_ids[piece.loss_mask].tolist()
        unfinished = 0  # the document that the last window cuts
        for number, ids in enumerate(documents):
            found = targets[f"{world / 'cpt.jsonl'}:{number + 1}"]
            assert found == (ids[1:] * 2)[: len(found)]  # the last window may begin the next pass
            unfinished += len(found) < len(ids) - 1
        assert unfinished <= 1


def test_windows_are_full(world: Path, tokenizer: ChatTokenizer) -> None:
    loader = loader_for(world, tokenizer, "documents")
    for _ in range(10):
        lengths = [len(batch.token_ids) for batch in loader.next_step()]
        assert len(lengths) == 2  # two windows fit into a micro-batch
        assert 4 * 127 <= sum(lengths) <= 4 * 128


def test_shares_of_documents_are_shares_of_bytes(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    for name, text, rows in (("short", "2+3=5;" * 20, 400), ("long", "2+3=5;" * 200, 20)):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps({"text": text}) + "\n") * rows)
    sources = tuple(
        SourceSection(path=str(tmp_path / f"{name}.jsonl")) for name in ("short", "long")
    )
    section = DataSection(
        sources=sources, sequence_tokens=256, batch_sequences=1, micro_batch_tokens=256
    )
    stream = SampleStream(sources, section, "documents", tokenizer, 0, Quarantine(0.0))
    samples = [stream.next_sample() for _ in range(1024)]
    share = sum(sample.num_tokens for sample in samples if "long" in sample.origin) / sum(
        sample.num_tokens for sample in samples
    )
    assert 0.45 < share < 0.6  # of tokens: the braces of a row count as bytes too


def test_an_epoch_of_samples_is_every_row_once(world: Path, tokenizer: ChatTokenizer) -> None:
    sources = (SourceSection(path=str(world / "sft1.jsonl")),)
    loader = loader_for(world, tokenizer, "samples", sources=sources, batch_samples=12)
    assert loader.steps_per_epoch == 4
    epochs = [
        sorted(ids for _ in range(4) for ids, _ in sequences(loader.next_step())) for _ in range(2)
    ]
    assert epochs[0] == epochs[1]
    assert len(epochs[0]) == 48
    assert loader_for(world, tokenizer, "documents").steps_per_epoch is None


def test_documents_are_tokenized_on_demand(
    world: Path, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    encode = tokenizer.encode_document
    monkeypatch.setattr(
        tokenizer, "encode_document", lambda text: calls.append(text) or encode(text)
    )
    loader = loader_for(world, tokenizer, "documents")
    assert not calls
    loader.next_step()
    loader._pending.result()  # type: ignore[union-attr]
    assert 0 < len(calls) < 60  # two steps of four windows of three documents


def test_a_file_shorter_than_a_step_wraps(
    world: Path, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    (tmp_path / "few.jsonl").write_text(
        "".join((world / "sft1.jsonl").read_text().splitlines(keepends=True)[:3])
    )
    sources = (SourceSection(path=str(tmp_path / "few.jsonl")),)
    loader = loader_for(world, tokenizer, "samples", sources=sources, batch_samples=7)
    assert loader.steps_per_epoch == 1
    assert [len(list(sequences(loader.next_step()))) for _ in range(3)] == [7, 7, 7]


def test_bad_rows_are_counted_once_and_lose_no_neighbor(
    world: Path, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    lines = (world / "sft1.jsonl").read_text().splitlines()
    long = {
        "messages": [
            {"role": "user", "content": "2+3=?"},
            {"role": "assistant", "content": "5" * 400},
        ]
    }
    lines[5:5] = ["{broken", json.dumps(long)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    sources = (SourceSection(path=str(tmp_path / "rows.jsonl")),)
    keys = {"sources": sources, "batch_samples": 12, "max_quarantined_fraction": 0.04}
    section = section_for(world, "samples", **keys)
    loader = Loader(section, "messages", tokenizer, 5, quarantine=tmp_path / "quarantine.jsonl")
    good = sorted(ids for _ in range(4) for ids, _ in sequences(loader.next_step()))
    clean = loader_for(
        world,
        tokenizer,
        "samples",
        sources=(SourceSection(path=str(world / "sft1.jsonl")),),
        batch_samples=12,
    )
    assert good == sorted(ids for _ in range(4) for ids, _ in sequences(clean.next_step()))
    for _ in range(8):
        loader.next_step()
    assert loader.quarantined == {str(tmp_path / "rows.jsonl"): {"bad_json": 1, "too_long": 1}}
    rows = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert sorted((row["origin"].rsplit(":")[-1], row["reason"]) for row in rows) == [
        ("6", "bad_json"),
        ("7", "too_long"),
    ]
    strict = loader_for(world, tokenizer, "samples", **(keys | {"max_quarantined_fraction": 0.03}))
    with pytest.raises(DataError, match="rows are unusable"):
        [strict.next_step() for _ in range(5)]


def test_truncation_keeps_the_end(world: Path, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    long = {
        "messages": [
            {"role": "user", "content": "1+" * 100 + "1=?"},
            {"role": "assistant", "content": "9"},
        ]
    }
    (tmp_path / "long.jsonl").write_text(json.dumps(long))
    loader = loader_for(
        world,
        tokenizer,
        "samples",
        sources=(SourceSection(path=str(tmp_path / "long.jsonl")),),
        on_too_long="truncate",
        sequence_tokens=32,
        batch_samples=1,
    )
    ((ids, labels),) = sequences(loader.next_step())
    assert len(ids) == 32
    assert ids[-1] in tokenizer.eos_token_ids
    assert labels[-3:] == (ids[-2], ids[-1], 0)
    assert sum(label > 0 for label in labels) == 2


def test_no_usable_row_ends_immediately(
    world: Path, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    (tmp_path / "bad.jsonl").write_text("x\n" * 5)
    sources = (SourceSection(path=str(tmp_path / "bad.jsonl")),)
    loader = loader_for(world, tokenizer, "samples", sources=sources, max_quarantined_fraction=1.0)
    with pytest.raises(DataError, match=r"no row of data\.sources can be used"):
        loader.next_step()


def test_other_data_than_the_checkpoints_is_rejected(world: Path, tokenizer: ChatTokenizer) -> None:
    state = loader_for(world, tokenizer, "samples").state_dict()
    with pytest.raises(DataError, match="seed was 6, is 5"):
        loader_for(world, tokenizer, "samples").load_state_dict(state | {"seed": 6})
    with pytest.raises(DataError, match="rows was"):
        loader_for(world, tokenizer, "samples").load_state_dict(state | {"rows": [48, 47]})


def test_validation_batches_are_the_same_data_on_any_number_of_ranks(
    world: Path, tokenizer: ChatTokenizer
) -> None:
    sources = (SourceSection(path=str(world / "cpt_validation.jsonl")),)
    section = section_for(world, "documents", validation_sources=sources)
    all_batches = validation_batches(section, "documents", tokenizer, limit=100)
    assert all(len(batch.token_ids) <= 256 for batch in all_batches)
    documents = [
        tokenizer.encode_document(json.loads(line)["text"])
        for line in (world / "cpt_validation.jsonl").read_text().splitlines()
    ]
    assert sum(batch.num_trained_tokens for batch in all_batches) == sum(
        len(ids) - 1 for ids in documents
    )
    assert len(validation_batches(section, "documents", tokenizer, limit=2)) == 2
    ranks = [validation_batches(section, "documents", tokenizer, 100, rank, 3) for rank in range(3)]
    assert len({len(batches) for batches in ranks}) == 1
    assert sum(batch.num_trained_tokens for batches in ranks for batch in batches) == sum(
        batch.num_trained_tokens for batch in all_batches
    )
    assert validation_batches(section_for(world, "documents"), "documents", tokenizer, 10) == []
