"""The demo world: right answers, balanced difficulty, lossless tokens, a clean held-out split."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from infir2.demo.tokenizer import pre_tokens
from infir2.demo.world import DemoWorld, held_out, make_demo_world
from infir2.errors import OutputExistsError

FILES = ("cpt", "cpt_validation", "sft1", "sft2", "rl1", "rl2", "heldout")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo") / "world"
    make_demo_world(directory, seed=0)
    return directory


def rows(world: Path, name: str) -> list[dict]:
    return [
        json.loads(line)
        for line in (world / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def row_text(row: dict) -> str:
    if "messages" in row:
        return "\n".join(message["content"] for message in row["messages"])
    return row.get("text") or row["prompt"]


def asked(text: str) -> tuple[int, tuple[int, ...]]:
    """Parse a question, independently of its generator: the start value and the signed steps."""
    first = text.split("\n")[0]
    formula = re.search(r"(\d+)((?:[+-]\d)+)", first)
    if formula:
        return int(formula[1]), tuple(int(step) for step in re.findall(r"[+-]\d", formula[2]))
    start = int(re.search(r"has (\d+)", first)[1])  # type: ignore[index]
    steps = re.findall(r"(finds|gets|buys|loses|sells|gives away) (\d)", first)
    return start, tuple(
        int(value) if verb in ("finds", "gets", "buys") else -int(value) for verb, value in steps
    )


def chains_in(text: str) -> list[tuple[int, tuple[int, ...]]]:
    """Every chain of steps in a text: questions, stories, equations that continue each other."""
    chains = [asked(text)]
    for line in text.split("\n"):
        linked: list[int] = []
        start = end = -1
        for before, step, after in re.findall(r"(\d+)([+-]\d)=(\d+)", line):
            if int(before) != end:
                chains.append((start, tuple(linked)))
                start, linked = int(before), []
            linked.append(int(step))
            end = int(after)
        chains.append((start, tuple(linked)))
    return chains


def parts(start: int, steps: tuple[int, ...]) -> list[tuple[int, tuple[int, ...]]]:
    found = []
    for first in range(len(steps)):
        value = start + sum(steps[:first])
        found += [(value, steps[first:last]) for last in range(first + 2, len(steps) + 1)]
    return found


def test_no_training_text_contains_a_held_out_chain(world: Path) -> None:
    questions = {asked(row["prompt"]) for row in rows(world, "heldout")}
    assert len(questions) == 360
    assert all(held_out(*chain) for chain in questions)
    for name in FILES[:-1]:
        for row in rows(world, name):
            for chain in chains_in(row_text(row)):
                for part in parts(*chain):
                    assert part not in questions, (
                        f"{name}: {row_text(row)!r} shows the held-out {part}"
                    )
                    assert not held_out(*part)


def test_answers_and_every_equation_are_right(world: Path) -> None:
    for name in ("rl1", "rl2", "heldout"):
        for row in rows(world, name):
            start, steps = asked(row["prompt"])
            assert row["label"] == str(start + sum(steps))
            assert row["difficulty"] == len(steps)
    for name in ("sft1", "sft2"):
        for row in rows(world, name):
            start, steps = asked(row["messages"][0]["content"])
            thought, answer = re.fullmatch(
                r"<think>(.*)</think>\\boxed\{(\d+)\}", row["messages"][1]["content"]
            ).groups()  # type: ignore[union-attr]
            assert int(answer) == start + sum(steps)
            assert not thought or [
                int(step) for step in re.findall(r"\d+([+-]\d)=", thought)
            ] == list(steps)
    for name in FILES:
        for row in rows(world, name):
            for before, step, after in re.findall(r"(\d+)([+-]\d)=(\d+)", row_text(row)):
                assert int(before) + int(step) == int(after)
                assert 0 <= int(after) <= 49


def test_sizes_and_proportions(world: Path) -> None:
    for name, empty, difficulty in (
        ("sft1", 0.65, (0.5, 0.35, 0.15)),
        ("sft2", 0.4, (0.25, 0.35, 0.4)),
    ):
        table = rows(world, name)
        assert len(table) == 4096
        assert sum("<think></think>" in row_text(row) for row in table) == round(empty * 4096)
        counts = Counter(row["difficulty"] for row in table)
        assert [counts[steps] / 4096 for steps in (2, 3, 4)] == pytest.approx(difficulty, abs=0.001)
        formulas = sum(bool(re.search(r"\d[+-]\d", row["messages"][0]["content"])) for row in table)
        assert formulas / 4096 == pytest.approx(0.5, abs=0.03)
    assert Counter(row["difficulty"] for row in rows(world, "heldout")) == {2: 120, 3: 120, 4: 120}
    corpus = {row["text"] for row in rows(world, "cpt")}
    assert not corpus & {row["text"] for row in rows(world, "cpt_validation")}


def test_every_text_round_trips_and_numbers_are_one_token(world: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(world / "tokenizer")
    assert 140 <= len(tokenizer) <= 180
    assert all(
        len(tokenizer.encode(str(number), add_special_tokens=False)) == 1 for number in range(100)
    )
    for name in FILES:
        texts = [row_text(row) for row in rows(world, name)][:: 10 if name == "cpt" else 1]
        encoded = [
            encoding.ids
            for encoding in tokenizer.backend_tokenizer.encode_batch(
                texts, add_special_tokens=False
            )
        ]
        assert tokenizer.backend_tokenizer.decode_batch(encoded, skip_special_tokens=False) == texts
        assert not any(tokenizer.unk_token_id in ids for ids in encoded)
    documents = [pre_tokens(row["text"]) for row in rows(world, "cpt")]
    assert 1_638_400 <= sum(len(document) + 1 for document in documents) < 1_638_500
    assert max(len(document) for document in documents) < 64
    assert {piece for document in documents for piece in document} <= tokenizer.get_vocab().keys()
    conversation = tokenizer.apply_chat_template(rows(world, "sft1")[0]["messages"], tokenize=False)
    assert (
        tokenizer.decode(tokenizer.encode(conversation, add_special_tokens=False)) == conversation
    )


def test_same_seed_same_bytes_and_no_overwrite(tmp_path: Path) -> None:
    small = DemoWorld(
        cpt_tokens=20_000, validation_documents=8, sft_rows=64, rl_rows=(32, 32), held_out_rows=30
    )
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_demo_world(tmp_path / name, seed, small)
    files = sorted(
        path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()
    )
    assert len(files) == 9
    assert all(
        (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
        for file in files
    )
    assert (tmp_path / "a" / "cpt.jsonl").read_bytes() != (
        tmp_path / "c" / "cpt.jsonl"
    ).read_bytes()
    with pytest.raises(OutputExistsError, match="already holds files"):
        make_demo_world(tmp_path / "a", 1, small)
