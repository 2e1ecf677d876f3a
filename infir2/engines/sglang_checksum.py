"""The checksums of SGLang's `/weights_checker`, computed from our own weights.

SGLang (0.5.12 to 0.5.23, `utils/weight_checker.py`) hashes every parameter of its model. FP8
weights are dequantized to BF16 first; that is exact for power-of-two scales, so equal hashes then
prove equal values. q, k, v and gate, up are one parameter each, tensor parallelism splits them, and
the rows of the embedding are padded with zeros. The hash (`gpu_tensor_hash`) sums the mixed 32-bit
words of tiles, then the tiles.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from infir2.engines.remote import PublishedWeights
from infir2.engines.weight_buckets import WeightBuckets
from infir2.model.hf_names import SCALE_SUFFIX
from infir2.model.safetensors_io import HfWeights, read_json
from infir2.numerics import Fp8Tensor, dequantize

TILE_WORDS, CHUNK_TILES = 8192, 512
SEED = 0x243F6A88
SEEDS = (SEED, (SEED * 0x9E3779B1 ^ 0xDEADBEEF) & 0xFFFFFFFF)
POSITION = ((0x27D4EB2D, 15), (0x165667B1, 13))  # multiplier and rotation of a word's index
MIX = (0x85EBCA6B, 0xC2B2AE35)
VOCAB_MULTIPLE = 64
_FUSED = {
    "q_proj": ("qkv_proj", 0),
    "k_proj": ("qkv_proj", 1),
    "v_proj": ("qkv_proj", 2),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}
_SPLIT_COLUMNS = ("o_proj", "down_proj")


_CACHE: "WeakKeyDictionary[PublishedWeights, dict[tuple[int, int], Mapping[str, str]]]" = (
    WeakKeyDictionary()
)
_LOCK = threading.Lock()  # the servers of a pool are proved at once, by the same checksums


def checksums(weights: PublishedWeights, tp_rank: int, tp_size: int) -> Mapping[str, str]:
    """The checksum of each parameter of a rank of SGLang that has loaded `weights`."""
    with _LOCK:
        known = _CACHE.setdefault(weights, {})
        if (tp_rank, tp_size) not in known:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            parameters = fused_parameters(weights, tp_rank, tp_size, device)
            known[tp_rank, tp_size] = {
                name: tensor_hash(make()) for name, make in parameters.items()
            }
        return known[tp_rank, tp_size]


def differing(
    held: Mapping[str, str], weights: PublishedWeights, tp_rank: int, tp_size: int
) -> list[str]:
    """Names of the parameters that a rank does not hold as `weights` has them.

    `held` is what the rank answers; names of it that are neither weight nor bias do not count.
    """
    expected = checksums(weights, tp_rank, tp_size)
    names = {name for name in held if name.endswith((".weight", ".bias"))} | expected.keys()
    if held.get("lm_head.weight") == held.get("model.embed_tokens.weight"):
        names.discard("lm_head.weight" if "lm_head.weight" not in expected else "")
    return sorted(name for name in names if held.get(name) != expected.get(name))


def fused_parameters(
    weights: PublishedWeights, tp_rank: int, tp_size: int, device: torch.device
) -> dict[str, Callable[[], Tensor]]:
    """SGLang's parameters by name, each as a function that reads and computes it on `device`."""
    tensors, config = weights.tensors, read_json(weights.directory / "config.json")
    kv_parts = min(tp_size, int(config.get("num_key_value_heads") or tp_size))
    parts: dict[str, dict[int, Callable[[], Tensor]]] = {}
    for name in tensors.names():
        if name.endswith(SCALE_SUFFIX):
            continue
        *prefix, layer, leaf = name.split(".")
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        num_parts = kv_parts if layer in ("k_proj", "v_proj") else tp_size

        def part(name: str = name, layer: str = layer, num_parts: int = num_parts) -> Tensor:
            tensor = _read_bf16(tensors, name, device)
            return _shard(tensor, layer, tp_rank * num_parts // tp_size, num_parts)

        fused, place = _FUSED.get(layer, (layer, 0))
        parts.setdefault(".".join((*prefix, fused, leaf)), {})[place] = part
    return {name: _concatenation(found) for name, found in parts.items()}


def _concatenation(parts: dict[int, Callable[[], Tensor]]) -> Callable[[], Tensor]:
    return lambda: torch.cat([parts[place]() for place in sorted(parts)])


def _read_bf16(tensors: HfWeights | WeightBuckets, name: str, device: torch.device) -> Tensor:
    tensor = tensors.read(name).to(device)
    if tensor.dtype != torch.float8_e4m3fn:
        return tensor
    scale = tensors.read(name + SCALE_SUFFIX).to(device)
    return dequantize(Fp8Tensor(tensor, scale, (128, 128), "fp32"), torch.float32).bfloat16()


def _shard(tensor: Tensor, layer: str, index: int, count: int) -> Tensor:
    """Part `index` of `count` of a weight or bias; norms are whole on every rank."""
    if layer in ("embed_tokens", "lm_head"):
        padding = -len(tensor) % VOCAB_MULTIPLE
        tensor = torch.cat((tensor, tensor.new_zeros(padding, tensor.shape[1])))
    elif layer in _SPLIT_COLUMNS:
        return tensor.chunk(count, dim=1)[index] if tensor.dim() == 2 else tensor
    elif layer not in _FUSED:
        return tensor
    return tensor.chunk(count)[index]


def tensor_hash(tensor: Tensor) -> str:
    """SGLang's hash of a tensor's bytes, 16 hexadecimal digits."""
    words = tensor.contiguous().reshape(-1).view(torch.uint8)
    words = torch.nn.functional.pad(words, (0, -len(words) % 4)).view(torch.int32)
    total = sum(int(value) for value in _tile_sums(words)) if len(words) else 0
    return f"{_final_mix(total) if len(words) else 0:016x}"


def _tile_sums(words: Tensor) -> Iterator[np.uint64]:
    """The sum of the tiles' hashes modulo 2**64, of one chunk after another."""
    size = TILE_WORDS * CHUNK_TILES
    with np.errstate(over="ignore"):
        for start in range(0, len(words), size):
            chunk = words[start : start + size]
            sums = [_word_sums(chunk, start, which) for which in (0, 1)]
            high, low = (_mix_numpy(each ^ np.uint32(len(words) * 4 % 2**32)) for each in sums)
            tiles = (high.astype(np.uint64) << np.uint64(32)) | low.astype(np.uint64)
            yield tiles.sum(dtype=np.uint64)


def _word_sums(words: Tensor, start: int, which: int) -> np.ndarray:
    """uint32 [tiles]: sum of each tile's mixed words. Integers wrap, as in the kernel."""
    multiplier, rotation = POSITION[which]
    index = torch.arange(start, start + len(words), dtype=torch.int32, device=words.device)
    rotated = (index << rotation) | _shift_right(index, 32 - rotation)
    position = (index * _signed(multiplier) + _signed(SEEDS[which])) ^ rotated
    mixed = _mix(words ^ position)
    mixed = torch.nn.functional.pad(mixed, (0, -len(mixed) % TILE_WORDS)).view(-1, TILE_WORDS)
    return mixed.sum(dim=1, dtype=torch.int64).cpu().numpy().astype(np.uint32)


def _mix(x: Tensor) -> Tensor:
    """MurmurHash3's final mix of int32."""
    x = (x ^ _shift_right(x, 16)) * _signed(MIX[0])
    x = (x ^ _shift_right(x, 13)) * _signed(MIX[1])
    return x ^ _shift_right(x, 16)


def _mix_numpy(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint32(16))) * np.uint32(MIX[0])
    x = (x ^ (x >> np.uint32(13))) * np.uint32(MIX[1])
    mixed: np.ndarray = x ^ (x >> np.uint32(16))
    return mixed


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int32."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def _signed(value: int) -> int:
    return value - 2**32 if value >= 2**31 else value


def _final_mix(x: int) -> int:
    """splitmix64's final mix."""
    mask = 2**64 - 1
    x &= mask
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
    return x ^ (x >> 31)
