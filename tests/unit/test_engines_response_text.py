"""The text of a response as it grows: whole characters, nothing of a stop text."""

import random
from collections.abc import Sequence

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from infir2.engines.response_text import Decode, ResponseText

TEXT = "It's 3/4 – naïve Größe 数学 текст 👩‍🔬 fin.\n\n" * 3


def byte_level() -> Tokenizer:
    """As Qwen's, but without merges: a token is a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Llama 2's: characters, and the bytes of those that are unknown."""
    words = [f"<0x{byte:02X}>" for byte in range(256)] + list("▁It's3/4ïGrößefin.текст")
    vocab = {word: i for i, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return tokenizer


@pytest.fixture(scope="module", params=[byte_level, byte_fallback])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.param()


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text).ids


def pieces(decode: Decode, token_ids: Sequence[int], stops: Sequence[str] = ()) -> list[str]:
    text = ResponseText(decode, stops)
    return [*(text.add(token_id) for token_id in token_ids), text.finish()]


def batches(decode: Decode, token_ids: Sequence[int], stops: Sequence[str] = ()) -> list[str]:
    """As `pieces`, of up to seven tokens each."""
    text, rng, start, found = ResponseText(decode, stops), random.Random(1), 0, list[str]()
    while start < len(token_ids):
        end = start + rng.randint(1, 7)
        found.append(text.extend(token_ids[start:end]))
        start = end
    return [*found, text.finish()]


def visible(text: str, stops: Sequence[str]) -> str:
    """The text before the stop text that is complete first."""
    ends = [n for n in range(len(text)) if any(text[: n + 1].endswith(stop) for stop in stops)]
    if not ends:
        return text
    text = text[: ends[0] + 1]
    return min((text[: text.find(stop)] for stop in stops if stop in text), key=len)


def test_pieces_are_whole_characters(tokenizer: Tokenizer) -> None:
    token_ids = encode(tokenizer, TEXT)
    assert len(token_ids) > len(TEXT)  # characters of several tokens
    found = pieces(tokenizer.decode, token_ids)
    assert "".join(found) == TEXT
    assert not any("\ufffd" in piece for piece in found)
    assert sum(map(bool, found)) > 100  # as they come
    found = batches(tokenizer.decode, token_ids)
    assert "".join(found) == TEXT
    assert not any("\ufffd" in piece for piece in found)


@pytest.mark.parametrize("seed", range(20))
def test_any_bytes_give_the_text_of_all(seed: int) -> None:
    """Also bytes that are no characters, and a cut character at the end."""
    tokenizer, rng = byte_level(), random.Random(seed)
    token_ids = [rng.randrange(256) for _ in range(200)]
    text = encode(tokenizer, "数👩")
    token_ids[50:50] = text
    token_ids += text[: rng.randrange(len(text))]
    for cut in (pieces, batches):
        assert "".join(cut(tokenizer.decode, token_ids)) == tokenizer.decode(token_ids)


def test_a_long_run_of_broken_bytes_is_not_held_back_for_ever() -> None:
    tokenizer = byte_level()
    emoji = encode(tokenizer, "👩")
    token_ids = emoji[1:2] * 60 + emoji
    found = pieces(tokenizer.decode, token_ids)
    assert "".join(found) == "\ufffd" * 60 + "👩"
    assert any(found[:30])


STOPS = (
    ["\n\n"],
    ["学 т", "fin"],
    ["zzz", "👩‍🔬"],
    ["\n", "\n\n"],
    ["e naï", "naïve Grö", "öße"],
    ["It's 3/4 – naïve Größe 数学 текст 👩‍🔬 fin.\n\nIt's 3/4 – X", "\n\nIt's 3/4 – n"],
    ["never"],
)


@pytest.mark.parametrize("stops", STOPS)
def test_nothing_of_a_stop_text_is_shown(tokenizer: Tokenizer, stops: list[str]) -> None:
    expected = visible(TEXT, stops)
    for cut in (pieces, batches):
        assert "".join(cut(tokenizer.decode, encode(tokenizer, TEXT), stops)) == expected
    text = ResponseText(tokenizer.decode, stops)
    for token_id in encode(tokenizer, TEXT):
        text.add(token_id)
    assert text.stopped == (expected != TEXT)


def test_a_token_may_complete_two_stop_texts() -> None:
    words = ["a", "xEN", "D Eb", "c"]
    decode = lambda token_ids: "".join(words[token_id] for token_id in token_ids)  # noqa: E731
    for stops, expected in (
        (["D", "EN"], "ax"),
        (["END", "D E"], "ax"),
        (["NDX", "b"], "axEND E"),
        (["Ec"], "axEND Ebc"),
        (["bc", "cc"], "axEND E"),
    ):
        for cut in (pieces, batches):
            assert "".join(cut(decode, range(4), stops)) == expected
