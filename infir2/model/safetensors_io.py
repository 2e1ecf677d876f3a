"""Reading and writing the files of a Hugging Face model directory: safetensors, sharded or not.

Reading checks everything: an index may not name a file outside its directory, every tensor that it
lists must exist, and any defect of a file becomes one CheckpointError. Writing streams: a shard is
on disk before the next one is gathered, and the directory gets its final name by one rename after
all of its files are synced.
"""

import json
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from infir2.directories import new_directory
from infir2.errors import CheckpointError, first_line
from infir2.files import open_regular, read_json_object
from infir2.model.config import ModelConfig

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
SCALES_FILE = "fp8_scales.st"  # safetensors; no engine loads a file of this suffix as weights
TOKENIZER_FILES = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
)
_LFS = b"version https://git-lfs"
_CHUNK_WORDS = 2**17  # stays in a core's cache
_ONES, _SEVEN_BITS = 0x0101010101010101, 0x7F7F7F7F7F7F7F7F
_SIGN_BITS = -0x7F7F7F7F7F7F7F80  # 0x8080808080808080 as int64
SIDE_FILES = (*TOKENIZER_FILES, "chat_template*", "generation_config.json")


class HfWeights:
    """The tensors of a model directory, read one at a time.

    Example: `HfWeights("Qwen2.5-1.5B").read("model.norm.weight")` -> BF16 [1536].

    Raises CheckpointError when the directory has no safetensors, or when its index or a file is
    invalid.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise CheckpointError(
                f"{self.directory} is not a directory; give a Hugging Face model directory"
            )
        self._files: dict[str, Any] = {}
        index = self.directory / INDEX_FILE
        if index.exists():
            self._shards = self._read_index(index)
        elif (self.directory / SINGLE_FILE).exists():
            self._shards = dict.fromkeys(self._open(SINGLE_FILE).keys(), SINGLE_FILE)
        else:
            raise CheckpointError(_no_weights(self.directory))

    def names(self) -> list[str]:
        """Names of all tensors, in the order of the file or of the index."""
        return list(self._shards)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, without reading its values."""
        return tuple(self._open(self._shard(name)).get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """The tensor on the CPU, in the dtype of the file."""
        file = self._open(self._shard(name))
        try:
            tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{self.directory / self._shards[name]}: tensor {name} cannot be read "
                f"({first_line(error)}); copy the model again"
            ) from error
        return tensor

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name in self._shards:
            yield name, self.read(name)

    def _shard(self, name: str) -> str:
        if name not in self._shards:
            raise CheckpointError(
                f"{self.directory} has no tensor {name}; "
                "it is not the model that its config.json describes"
            )
        return self._shards[name]

    def _open(self, file_name: str) -> Any:
        if file_name not in self._files:
            path = self.directory / file_name
            if not path.is_file():
                raise CheckpointError(f"{path} is missing; copy the model again")
            try:
                self._files[file_name] = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError, ValueError) as error:
                if _is_lfs_pointer(path):
                    raise CheckpointError(
                        f"{path} is a pointer of Git LFS, not the weights; run git lfs pull in "
                        f"{self.directory}, or download the model with hf download"
                    ) from error
                raise CheckpointError(
                    f"{path} is not a complete safetensors file ({first_line(error)}); "
                    "copy the model again"
                ) from error
        return self._files[file_name]

    def _read_index(self, index: Path) -> dict[str, str]:
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise CheckpointError(f"{index} has no weight_map; copy the model again")
        for name, file_name in shards.items():
            if (
                not isinstance(file_name, str)
                or file_name != os.path.basename(file_name)
                or not file_name.endswith(".safetensors")
            ):
                raise CheckpointError(
                    f"{index}: {file_name!r} of {name} is not a .safetensors file of this "
                    "directory; do not use it"
                )
        present = {
            file_name: set(self._open(file_name).keys())
            for file_name in sorted(set(shards.values()))
        }
        for name, file_name in shards.items():
            if name not in present[file_name]:
                raise CheckpointError(
                    f"{self.directory / file_name} has no tensor {name}, which the index lists; "
                    "copy the model again"
                )
        return shards


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of at most 64 MiB. Raises CheckpointError naming the file."""
    return read_json_object(
        path,
        lambda problem: CheckpointError(f"{problem}; name a complete Hugging Face model directory"),
    )


def read_config(directory: Path) -> ModelConfig:
    """The shape that a directory's config.json describes. Raises CheckpointError naming the file.

    Example: `read_config(Path("Qwen2.5-1.5B")).num_layers` -> 28.
    """
    path = directory / "config.json"
    if not path.exists() and (directory / "adapter_config.json").exists():
        raise CheckpointError(
            f"{directory} is a LoRA adapter, not a model; merge it into its base model "
            "(merge_and_unload of peft), save that, and name its directory"
        )
    raw = read_json(path)
    try:
        return ModelConfig.from_hf(raw)
    except CheckpointError as error:
        raise CheckpointError(f"{directory}/{error}") from error


def write_hf(
    directory: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    config: dict[str, Any],
    side_files_from: str | Path | None = None,
    max_shard_bytes: int = 5 * 2**30,
    scales: dict[str, Tensor] | None = None,
    side_files: Mapping[str, dict[str, Any]] | None = None,
    num_writers: int = 1,
) -> None:
    """Write a model directory; it gets its name only after everything is on disk.

    Args:
        directory: must not exist.
        tensors: weights with their exported names, consumed one at a time.
        config: the `config.json`.
        side_files_from: directory to copy tokenizer, chat template and generation config from.
        max_shard_bytes: largest shard; a larger tensor gets a shard of its own.
        scales: tensors to store in SCALES_FILE.
        side_files: JSON objects by file name; they replace the copied files of these names.
        num_writers: shards that are written at a time, each of them in memory.

    Raises:
        OutputExistsError: `directory` exists.
        CheckpointError: a tensor is non-finite or occurs twice, or the disk rejects the data.
    """
    try:
        with new_directory(Path(directory)) as work:
            _write_shards(work, tensors, max_shard_bytes, num_writers)
            if side_files_from is not None:
                _copy_side_files(Path(side_files_from), work)
            for name, value in (side_files or {}).items():
                _write_json(work / name, value)
            if scales:
                save_file(scales, work / SCALES_FILE)
            _write_json(work / "config.json", config)
    except SafetensorError as error:  # safetensors' form of an I/O error, such as a full disk
        raise CheckpointError(
            f"{directory} cannot be written: {first_line(error)}; name another directory, or make "
            "room."
        ) from error


def _write_shards(
    work: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int, num_writers: int
) -> None:
    shards: list[list[str]] = []
    total = 0
    seen: set[str] = set()
    writes: deque[Future[None]] = deque()
    with ThreadPoolExecutor(num_writers) as writers:
        for shard in _shards(tensors, max_shard_bytes):
            if repeated := seen & shard.keys():
                raise CheckpointError(
                    f"tensor {min(repeated)} occurs twice; every weight must have its own name"
                )
            total += sum(tensor.numel() * tensor.element_size() for tensor in shard.values())
            seen |= shard.keys()
            path = work / f"shard-{len(shards)}"
            writes.append(writers.submit(save_file, shard, path, {"format": "pt"}))
            shards.append(list(shard))
            del shard
            if len(writes) >= num_writers:
                writes.popleft().result()
        while writes:
            writes.popleft().result()
    _name_shards(work, shards, total)


def _name_shards(work: Path, shards: list[list[str]], total: int) -> None:
    """Give the files the names by which Hugging Face finds them."""
    if len(shards) <= 1:
        if not shards:
            raise CheckpointError("the model has no weights to write")
        (work / "shard-0").rename(work / SINGLE_FILE)
        return
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file_name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (work / f"shard-{i}").rename(work / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    _write_json(work / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(
    tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int
) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        num_bytes = tensor.numel() * tensor.element_size()
        if shard and (name in shard or size + num_bytes > max_shard_bytes):
            yield shard
            shard, size = {}, 0
        check_finite(name, tensor)  # where the tensor is: a GPU does it in no time
        shard[name] = _to_host(tensor.detach())
        size += num_bytes
    if shard:
        yield shard


def _to_host(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor.contiguous()
    # Pinned memory is kept by torch and used again: no page is touched for the first time.
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise CheckpointError for a value that is not finite."""
    if tensor.dtype == torch.float8_e4m3fn:
        finite = not has_nan_code(tensor)
    else:
        finite = not tensor.is_floating_point() or all_finite(tensor)
    if not finite:
        raise CheckpointError(
            f"tensor {name} has values that are not finite; go back to an earlier checkpoint"
        )


def has_nan_code(codes: Tensor) -> bool:
    """Whether one of these E4M3 codes is NaN (0x7F or 0xFF)."""
    raw = codes.contiguous().view(-1).view(torch.uint8)
    is_aligned = not raw.is_cuda and raw.storage_offset() % 8 == 0
    end = len(raw) // 8 * 8 if is_aligned else 0
    # Eight codes at a time: adding 1 to seven bits carries into the eighth only if all are 1.
    for words in raw[:end].view(torch.int64).split(_CHUNK_WORDS) if end else ():
        if ((words & _SEVEN_BITS).add_(_ONES).bitwise_and_(_SIGN_BITS)).count_nonzero():
            return True
    return end < len(raw) and bool((raw[end:] & 0x7F).max() == 0x7F)


def all_finite(tensor: Tensor) -> bool:
    """Whether a floating tensor has no NaN and no Inf; unlike `isfinite` it allocates no memory."""
    low, high = tensor.aminmax() if tensor.numel() else (tensor.new_zeros(()), tensor.new_zeros(()))
    return bool(low.isfinite() & high.isfinite())


def _copy_side_files(source: Path, work: Path) -> None:
    if not source.is_dir():
        raise CheckpointError(
            f"{source} is not a directory; give the directory with the model's tokenizer"
        )
    for pattern in SIDE_FILES:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, work / path.name)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _is_lfs_pointer(path: Path) -> bool:
    with open_regular(path) as file:
        return file.read(len(_LFS)) == _LFS


def _no_weights(directory: Path) -> str:
    if any(any(directory.glob(pattern)) for pattern in ("*.bin", "*.pt", "*.pth")):
        return (
            f"{directory} has only pickled weights (.bin, .pt), which can run code and are not "
            "read; save the model as safetensors"
        )
    return (
        f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}; "
        "give a Hugging Face model directory"
    )
