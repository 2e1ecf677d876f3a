"""Tokenizers that need the square of a text's length, or make it far longer, are refused."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infir2.data import load_tokenizer
from infir2.errors import ConfigError

Write = Callable[[dict[str, Any]], Path]
SLOW = {
    "letters": r"\p{L}+$",
    "small letters, then what never comes": "[a-z]+!",
    "spaces": r"\s+$",
    "digits": r"\d+x",
    "line feeds": r"\n+\S",
    "letters of one script": r"[\p{Thai}]+1",
    "a word of the pattern": "(?:qvz)+$",
    "letters of the pattern": "[xyz]+q",
    "lists": r"(\w+,)+$",
    "escaped letters": r"[\x{10A0}-\x{10A5}]+$",
    "cubic": r"\p{L}+\p{L}+$",
    "exponential": "(a+)+$",
}
# Patterns of GPT-2, Llama 3, GPT-4o and DeepSeek-V3.
REAL = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "[一-龥぀-ゟ゠-ヿ]+",
)
SHARED = Path(__file__).resolve().parents[3] / "shared/data/tokenizers"


@pytest.fixture
def write(demo_dir: Path, tmp_path: Path) -> Write:
    """Writes the demo's tokenizer with a changed tokenizer.json."""

    def write(changed: dict[str, Any]) -> Path:
        directory = tmp_path / "changed"
        shutil.copytree(demo_dir, directory)
        path = directory / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))
        return directory

    return write


def step(kind: str, pattern: dict[str, str], content: str = "x") -> dict[str, Any]:
    """A part of tokenizer.json that consists of a step with a pattern."""
    replace = {"type": "Replace", "pattern": pattern, "content": content}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    return {
        "normalizer": {"normalizer": replace},
        "pre_tokenizer": {"pre_tokenizer": split},
        "decoder": {"decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"}, replace]}},
    }[kind]


def refused(directory: Path) -> str:
    started = time.thread_time()
    with pytest.raises(ConfigError) as raised:
        load_tokenizer(directory)
    assert time.thread_time() - started < 15  # most take one second
    said = str(raised.value)
    assert said.startswith("data.tokenizer: ")
    assert "\n" not in said
    assert len(said) < 500
    return said


@pytest.mark.parametrize("pattern", SLOW.values(), ids=SLOW)
def test_a_slow_pattern_is_refused(write: Write, pattern: str) -> None:
    said = refused(write(step("pre_tokenizer", {"Regex": pattern})))
    assert "a long row would take minutes" in said or "gives up on the text" in said


@pytest.mark.parametrize("kind", ["normalizer", "decoder"])
def test_a_slow_pattern_is_refused_wherever_it_stands(write: Write, kind: str) -> None:
    said = refused(write(step(kind, {"Regex": r"\p{L}+$"})))
    assert "a long row would take minutes" in said


def test_a_slow_model_is_refused(write: Write) -> None:
    """WordPiece tries every end of a word; it is meant for words of at most 100 characters."""
    model = {
        "type": "WordPiece",
        "unk_token": "a",
        "continuing_subword_prefix": "",
        "vocab": {"a": 0},
    }
    changed = {"model": model | {"max_input_chars_per_word": 10**6}, "pre_tokenizer": None}
    assert "a long row would take minutes" in refused(write(changed))


@pytest.mark.parametrize("key", ["normalizer", "decoder"])
@pytest.mark.parametrize(
    ("pattern", "content"),
    [({"String": "a"}, "aa"), ({"Regex": "x*"}, "y")],
    ids=["twice", "between all characters"],
)
def test_steps_that_double_a_text_are_refused(
    write: Write, key: str, pattern: dict[str, str], content: str
) -> None:
    steps = [{"type": "Replace", "pattern": pattern, "content": content}] * 60
    sequence = {"type": "Sequence", f"{key}s": steps}
    assert "1,000 times longer" in refused(write({key: sequence}))


def test_one_step_that_writes_pages_is_refused(write: Write) -> None:
    refused(write(step("normalizer", {"String": ""}, "x" * 9999)))


@pytest.mark.parametrize("pattern", REAL)
def test_patterns_of_real_tokenizers_are_used(write: Write, pattern: str) -> None:
    tokenizer = load_tokenizer(write(step("pre_tokenizer", {"Regex": pattern})))
    assert tokenizer.encode_text("2 + 3 = 5")


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3"])
def test_real_tokenizers_are_used(name: str) -> None:
    if not (SHARED / name).is_dir():
        pytest.skip("needs ../shared")
    assert load_tokenizer(SHARED / name).vocab_size > 150_000


@pytest.mark.parametrize(
    "changed",
    [
        {
            "truncation": {
                "direction": "Right",
                "max_length": 8,
                "strategy": "LongestFirst",
                "stride": 0,
            }
        },
        {
            "padding": {
                **{"strategy": {"Fixed": 1000}, "direction": "Right", "pad_to_multiple_of": None},
                **{"pad_id": 0, "pad_type_id": 0, "pad_token": "x"},
            }
        },
    ],
    ids=["truncation", "padding"],
)
def test_a_file_that_asks_for_truncation_or_padding_does_not_change_documents(
    write: Write, demo_dir: Path, changed: dict[str, Any]
) -> None:
    text = "2 + 3 = 5 " * 20
    expected = load_tokenizer(demo_dir).encode_document(text)
    tokenizer = load_tokenizer(write(changed))
    assert tokenizer.encode_document(text) == expected
    assert tokenizer.encode_documents([text, "2"])[0] == expected
