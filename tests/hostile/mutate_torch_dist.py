"""Hostile `torch_dist` directories, made from a good one by mutation of its files."""

import argparse
import copy
import dataclasses
import io
import itertools
import pickle
import random
import struct
import warnings
import zipfile
from collections.abc import Iterator
from typing import Any

import mutate_pickles
import torch

Files = dict[str, bytes]  # content by name

NUMBERS = (None, True, -1, 0, 1, 7, 10**6, 10**9, 2**31, 2**63, 2**64, 10**30, 10**5000)
OTHERS = (1.5, float("nan"), float("inf"), 1e308, "", "7", "x" * 100_000, b"7", [], (2,), {}, "\0")
NAMES = ("../../escape", "/etc/passwd", "..", ".", "", "a\0b", "x" * 5000, "\ud800", "/dev/zero")
SHAPES = ((2**62, 2**62), (2**63,), (-1, 4), (0,), (0, 2**40), (1,) * 100, (2**40,))
ITERATIONS = (b"", b"-1", b"9" * 10_000, b"../..", b"release\0", b"\xff\xfe", b"\xc2\xb2", b"7 8")


def mutants(good: Files, seed: int) -> Iterator[tuple[str, Files]]:
    """Yield (name, files) without end; `good` is the directory that `export megatron` writes.

    The first ones are chosen values of each argument and file, in random order.
    """
    generator = random.Random(seed)
    chosen = [*_arguments(good), *_commons(good), *_indexes(good), *bombs(good), *_trackers(good)]
    chosen += overlaps(good)
    generator.shuffle(chosen)
    yield from chosen
    indexes = mutate_pickles.mutants(good[".metadata"], seed)
    commons = mutate_pickles.mutants(_member(good["common.pt"], "data.pkl"), seed)
    while True:
        label, data = next(indexes)
        yield f"metadata-{label}", good | {".metadata": data}
        label, data = next(commons)
        yield f"common-{label}", good | {"common.pt": _archive({"data.pkl": data})}
        name = generator.choice(sorted(good))
        yield f"bits-{name}", good | {name: _changed_bytes(good[name], generator)}


def _member(data: bytes, suffix: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith(suffix)))


def _archive(
    members: Files, compression: int = zipfile.ZIP_STORED, stored: Files | None = None
) -> bytes:
    """A zip archive of `members`, and of those of `stored` that are not among them."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(f"archive/{name}", content)
        for name in (stored or {}).keys() - members.keys():
            archive.writestr(f"archive/{name}", (stored or {})[name], zipfile.ZIP_STORED)
    return buffer.getvalue()


def _bomb(name: str) -> bytes:
    """An archive of 2 KB with a tensor whose member `name` claims 3 GiB."""
    size = 2**20 + 77
    members = {"data.pkl": _member(_saved(torch.zeros(4)), "data.pkl"), "data/0": bytes(16)}
    data = _archive({name: bytes(size)}, zipfile.ZIP_DEFLATED, members)
    return data.replace(struct.pack("<I", size), struct.pack("<I", 3 * 2**30))


def _saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _arguments(good: Files) -> Iterator[tuple[str, Files]]:
    """Each of Megatron's arguments with each unusual value, and missing."""
    common = torch.load(io.BytesIO(good["common.pt"]), weights_only=False)  # our own export
    names = sorted(vars(common["args"]))
    for name, value in itertools.product(names, (*NUMBERS, *OTHERS)):
        arguments = argparse.Namespace(**vars(common["args"]) | {name: value})
        label = f"argument-{name}-{str(value)[:20] if not _is_long(value) else '10**5000'}"
        yield label, good | {"common.pt": _saved(common | {"args": arguments})}
    for name in names:
        arguments = argparse.Namespace(**vars(common["args"]))
        delattr(arguments, name)
        yield f"argument-{name}-missing", good | {"common.pt": _saved({"args": arguments})}


def _is_long(value: object) -> bool:
    return isinstance(value, int) and value.bit_length() > 1000


def _commons(good: Files) -> Iterator[tuple[str, Files]]:
    for value in (*OTHERS, None, {"args": None}, {"args": {}}, {"args": argparse.Namespace()}):
        yield f"common-{str(value)[:20]}", good | {"common.pt": _saved(value)}
    pickled = _member(good["common.pt"], "data.pkl")
    for label, data in {
        "compressed": _archive({"data.pkl": pickled}, zipfile.ZIP_DEFLATED),
        "bomb": _bomb("data.pkl"),
        "twice": _archive({"data.pkl": pickled, "a/data.pkl": pickled}),
        "no-pickle": _archive({"version": b"3"}),
        "escape": _archive({"../../escape": b"", "data.pkl": pickled}),
        "many-members": _archive({"data.pkl": pickled} | {f"{n}": b"" for n in range(5000)}),
        "encrypted": good["common.pt"].replace(b"PK\1\2\0\0\0\0\0\0", b"PK\1\2\0\0\0\0\1\0"),
        "empty": b"",
        "no-zip": b"\x80\x02N.",
        "truncated": good["common.pt"][:-30],
    }.items():
        yield f"common-{label}", good | {"common.pt": data}
    yield "common-missing", {name: data for name, data in good.items() if name != "common.pt"}


def _indexes(good: Files) -> Iterator[tuple[str, Files]]:
    """Each attribute in the index with each unusual value."""
    values = (*NUMBERS, *OTHERS, *NAMES, *SHAPES, *map(torch.Size, SHAPES[3:]))
    for path in _PATHS:
        for value in values:
            metadata = pickle.loads(good[".metadata"])  # our own export
            with warnings.catch_warnings(action="ignore"):
                if not _replace(metadata, path, value):
                    continue
                data = pickle.dumps(metadata)
            label = "10**5000" if _is_long(value) else str(value)[:20]
            yield f"index-{path}-{label}", good | {".metadata": data}
    yield "index-missing", {name: data for name, data in good.items() if name != ".metadata"}


_PATHS = (
    *("metadata.state_dict_metadata", "metadata.storage_data", "metadata.version"),
    *("info.relative_path", "info.offset", "info.length", "info.transform_descriptors"),
    *("index.fqn", "index.offset", "tensor.size", "tensor.chunks", "tensor.properties"),
    *("properties.dtype", "chunk.offsets", "chunk.sizes", "name.name", "entry.entry"),
)


def _replace(metadata: Any, path: str, value: object) -> bool:
    """Set one attribute of the index; False if the value has no place there."""
    owner, attribute = path.split(".")
    name = "embedding.word_embeddings.weight"
    tensor = metadata.state_dict_metadata[name]
    index = next(key for key in metadata.storage_data if key.fqn == name)
    if owner == "name":
        if value.__hash__ is None:
            return False
        metadata.state_dict_metadata[value] = metadata.state_dict_metadata.pop(name)
        return True
    if owner == "entry":
        metadata.state_dict_metadata[name] = value
        return True
    target = {
        "metadata": metadata,
        "info": metadata.storage_data[index],
        "index": copy.copy(index),
        "tensor": tensor,
        "properties": tensor.properties,
        "chunk": tensor.chunks[0],
    }[owner]
    object.__setattr__(target, attribute, value)
    if owner == "index":
        if (attribute == "fqn" and value.__hash__ is None) or isinstance(value, list | dict):
            return False
        metadata.storage_data[target] = metadata.storage_data.pop(index)
    return True


def bombs(good: Files) -> Iterator[tuple[str, Files]]:
    """A piece of a tensor whose zip archive unpacks to more than it is."""
    shard = next(name for name in good if name.endswith(".distcp"))
    tensor_pickle = _member(_saved(torch.zeros(4)), "data.pkl")
    huge = tensor_pickle.replace(b"K\4", b"\x8a\x08" + b"\0" * 7 + b"\x40")
    for label, data in {
        "storage": _bomb("data/0"),
        "pickle": _bomb("data.pkl"),
        "shape": _archive({"data.pkl": huge, "data/0": bytes(16)}),
        "bytearray": _archive(
            {"data.pkl": b"\x80\x04" + mutate_pickles.SNIPPETS["new-bytearray"] + b"."}
        ),
        "no-storage": _archive({"data.pkl": tensor_pickle}),
        "big-endian": _archive(
            {"data.pkl": tensor_pickle, "data/0": bytes(16), "byteorder": b"big"}
        ),
        "deep": _archive({"data.pkl": b"\x80\x04" + mutate_pickles.SNIPPETS["deep-tuple"] + b"."}),
    }.items():
        metadata = pickle.loads(good[".metadata"])
        for index, info in metadata.storage_data.items():
            if index.fqn == "embedding.word_embeddings.weight":
                info.offset, info.length = len(good[shard]), len(data)
                info.relative_path = shard
        files = {".metadata": pickle.dumps(metadata), shard: good[shard] + data}
        yield f"piece-{label}", good | files


def overlaps(good: Files) -> Iterator[tuple[str, Files]]:
    """Two pieces that hold as many values as their tensor, but share some and leave others out."""
    shard = next(name for name in good if name.endswith(".distcp"))
    name = "embedding.word_embeddings.weight"
    for gap in (1, 2):
        metadata = pickle.loads(good[".metadata"])
        tensor = metadata.state_dict_metadata[name]
        index = next(key for key in metadata.storage_data if key.fqn == name)
        chunk, info, data = tensor.chunks[0], metadata.storage_data.pop(index), good[shard]
        half = torch.Size((tensor.size[0] // 2, *tensor.size[1:]))
        piece = _saved(torch.zeros(half, dtype=tensor.properties.dtype))
        tensor.chunks = []
        for offset in (0, half[0] - gap):
            offsets = torch.Size((offset, *index.offset[1:]))
            tensor.chunks.append(dataclasses.replace(chunk, offsets=offsets, sizes=half))
            metadata.storage_data[dataclasses.replace(index, offset=offsets)] = dataclasses.replace(
                info, offset=len(data), length=len(piece), relative_path=shard
            )
            data += piece
        yield f"overlap-{gap}", good | {".metadata": pickle.dumps(metadata), shard: data}


def _trackers(good: Files) -> Iterator[tuple[str, Files]]:
    for iteration in ITERATIONS:
        files = {name: data for name, data in good.items() if name != ".metadata"}
        label = iteration[:20].decode("latin-1")
        yield f"tracker-{label!r}", files | {"latest_checkpointed_iteration.txt": iteration}


def _changed_bytes(data: bytes, generator: random.Random) -> bytes:
    changed = bytearray(data)
    kind = generator.randrange(3)
    if kind == 0:
        return bytes(changed[: generator.randrange(len(changed) + 1)])
    for _ in range(generator.randint(1, 8)):
        position = generator.randrange(len(changed))
        size = 1 if kind == 1 else 8
        changed[position : position + size] = generator.choice(
            (b"\0", b"\xff", bytes([generator.randrange(256)]))
        ) * len(changed[position : position + size])
    return bytes(changed)
