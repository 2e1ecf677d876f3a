"""Values that are computed once per version of a weight: FP8 codes, rounded copies.

A version ends when autograd's version counter moves (`copy_`, `load_state_dict`, most optimizers),
when the storage is replaced (`.data =`, `to`, sharding), or when the tensor object is replaced. Two
writes move no counter:

- A step of a fused optimizer, such as `torch.optim.AdamW(fused=True)` on a CPU, and any optimizer's
  step on the local shard of a DTensor. The first weight that is cached therefore registers a hook
  on torch's optimizers, which moves the counters of cached weights (`watch_optimizer_steps`); no
  other parameter is touched, and importing this package registers nothing.
- A write in place through `.data`. The caller has to call `invalidate(weight)`, or
  `invalidate(model)`.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

Value = TypeVar("Value")


class _Version:
    """Values computed from one version of a tensor. Holds neither the tensor nor its memory."""

    def __init__(self, tensor: Tensor) -> None:
        self.values: dict[Hashable, Any] = {}
        self._counter = tensor._version
        self._pointer = tensor.data_ptr()
        self._shape = tensor.shape
        # The allocator may reuse a freed address; the weak reference detects that.
        self._storage = StorageWeakRef(tensor.untyped_storage())

    def matches(self, tensor: Tensor) -> bool:
        return (
            self._counter == tensor._version
            and self._pointer == tensor.data_ptr()
            and self._shape == tensor.shape
            and not self._storage.expired()
        )


_versions: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_watched: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def cached(weight: Tensor, key: Hashable, compute: Callable[[], Value]) -> Value:
    """Return `compute()`, evaluated once per version of `weight` and `key`.

    `compute` must depend on nothing but the weight and the key, and its result must not refer to
    the weight object (the cache would keep the weight alive).

    A weight with an attribute `precomputed` (a dict, as FSDP2's gathered weights have) has no
    master: its entries are returned as they are, and other keys are not cached.
    """
    precomputed = getattr(weight, "precomputed", None)
    if precomputed is not None:
        return precomputed[key] if key in precomputed else compute()
    if weight.is_inference():  # inference tensors have no version counter
        return compute()
    version = _versions.get(weight)
    if version is None or not version.matches(weight):
        watch_optimizer_steps(weight)
        version = _versions[weight] = _Version(weight)
    if key not in version.values:
        # The value outlives an inference_mode block around this call: it must be a normal tensor.
        with torch.inference_mode(False), torch.no_grad():
            version.values[key] = compute()
    return version.values[key]


def cached_jointly(weights: Sequence[Tensor], key: Hashable, compute: Callable[[], Value]) -> Value:
    """Return `compute()`, evaluated once per combination of versions of several weights."""
    versions = tuple(cached(weight, "version", object) for weight in weights)
    by_versions = cached(weights[0], (key, len(weights)), dict[tuple[object, ...], Any])
    if versions not in by_versions:
        by_versions.clear()
        with torch.inference_mode(False), torch.no_grad():
            by_versions[versions] = compute()
    value: Value = by_versions[versions]
    return value


def is_missing(weight: Tensor, key: Hashable) -> bool:
    """Whether `cached` would compute the value of a whole weight and keep it."""
    if (
        hasattr(weight, "precomputed")
        or weight.is_inference()
        or local_tensor(weight) is not weight
    ):
        return False
    cached(weight, "version", object)  # ends what belongs to an earlier version, and its memory
    return key not in _versions[weight].values


def replace_cached(weight: Tensor, key: Hashable, value: Any) -> None:
    """Set a cached value of the current version, such as a view of memory that is kept anyway."""
    version = _versions.get(weight)
    if version is not None and version.matches(weight):
        version.values[key] = value


CachedValues = list[dict[Hashable, Any]]


def cached_values(weights: Sequence[Tensor]) -> CachedValues:
    """All values of the weights' current versions."""
    for weight in weights:
        cached(weight, "version", object)
    return [dict(_versions[weight].values) for weight in weights]


def restore(weights: Sequence[Tensor], values: CachedValues) -> None:
    """Give the weights' current versions `cached_values` of an earlier one.

    The caller writes their memory anew.
    """
    for weight, of_weight in zip(weights, values, strict=True):
        cached(weight, "version", object)
        _versions[weight].values = dict(of_weight)


def invalidate(changed: Tensor | nn.Module) -> None:
    """Drop the cached values of a weight, or of a module's weights.

    Call it after a write that moved no version counter, such as `weight.data += delta`.
    """
    for weight in (changed,) if isinstance(changed, Tensor) else changed.parameters():
        _versions.pop(local_tensor(weight), None)
        _versions.pop(weight, None)


def rounded(weight: Tensor, compute_dtype: torch.dtype, dtype: torch.dtype) -> Tensor:
    """The weight rounded to `compute_dtype` and stored in `dtype`, cached; or the weight itself."""
    if weight.dtype == compute_dtype == dtype:
        return weight.detach()
    return cached(
        weight,
        ("rounded", compute_dtype, dtype),
        lambda: weight.detach().to(compute_dtype).to(dtype),
    )


def local_tensor(parameter: Tensor) -> Tensor:
    """The local shard of a DTensor, with a version counter of its own; other tensors unchanged."""
    return getattr(parameter, "_local_tensor", parameter)


def watch_optimizer_steps(tensor: Tensor) -> None:
    """Move the version counter of `tensor` after each step of any torch optimizer that holds it.

    A local shard is moved with the DTensor that the optimizer holds.
    """
    _register_hook()
    _watched[tensor] = True


def end_versions(parameters: Iterable[Tensor]) -> None:
    """Move the version counters of parameters, of DTensors' local shards, after their update."""
    tensors = [local_tensor(parameter) for parameter in parameters]
    torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


@cache
def _register_hook() -> None:
    register_optimizer_step_post_hook(_end_watched_versions)


def _end_watched_versions(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    end_versions(p for p in parameters if local_tensor(p) in _watched)
