"""Hostile tokenizer.json files: what the tokenizer library cannot bear, then random mutants.

for name, data in itertools.islice(mutants(good, seed=0), 60): ...
"""

import json
from collections.abc import Iterator
from typing import Any

import mutate_config
from mutate_config import nested

_PADDING = {
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "x",
}


def _split(pattern: str) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def mutants(good: dict[str, Any], seed: int) -> Iterator[tuple[str, bytes]]:
    """Endless (name of the mutation, JSON file): the known cases, then those of `mutate_config`.

    Args:
        good: a tokenizer.json with added tokens and a vocabulary.
    """
    for name, changed in _cases(good).items():
        yield name, json.dumps({**good, **changed}).encode()
    yield from mutate_config.mutants(good, seed)


def _cases(good: dict[str, Any]) -> dict[str, dict[str, Any]]:
    added, model = good["added_tokens"], good["model"]
    token, size = added[0], len(model["vocab"]) + len(added)
    cases: dict[str, dict[str, Any]] = {
        "padding": {"padding": {**_PADDING, "strategy": {"Fixed": 10**9}}},
        "multiple": {
            "padding": {**_PADDING, "strategy": "BatchLongest", "pad_to_multiple_of": 10**9}
        },
        "100,000 added": {
            "added_tokens": [
                *added,
                *({**token, "id": size + i, "content": f"<|x{i}|>"} for i in range(100_000)),
            ]
        },
        "panic": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        "long text": {
            "normalizer": _replace({"String": ""}, "x" * 10**6),
        },
        "no regex": {"pre_tokenizer": _split("(")},
        "square of letters": {"pre_tokenizer": _split(r"\p{L}+$")},
        "square of spaces": {"normalizer": _replace({"Regex": r"\s+$"}, "x")},
        "doubled": {
            "normalizer": {
                "type": "Sequence",
                "normalizers": [_replace({"String": "a"}, "aa")] * 50,
            }
        },
        "decoder doubled": {
            "decoder": {"type": "Sequence", "decoders": [_replace({"String": " "}, "  ")] * 50}
        },
        "no chunks": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        "no vocabulary": {"model": {**model, "vocab": {}}, "added_tokens": []},
        "deep": {"normalizer": nested(400, 1)},
        "empty unigram": {"model": {"type": "Unigram", "unk_id": None, "vocab": []}},
    }
    for number in (10**9, 2**31, 2**32 - 1, 2**64, -1):
        cases[f"id {number}"] = {"added_tokens": [{**token, "id": number}, *added[1:]]}
        cases[f"vocabulary {number}"] = {
            "model": {**model, "vocab": {**model["vocab"], "zz": number}}
        }
    return cases
