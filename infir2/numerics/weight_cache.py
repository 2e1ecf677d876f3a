"""What is computed once per version of a weight: FP8 codes, rounded copies, values for the emulated GEMMs.

A version ends when autograd's counter moves (`copy_`, `load_state_dict`, a step of any torch.optim.Optimizer), when the storage
is swapped (`.data =`, `to`, sharding) or when the tensor object is replaced. Writing through `.data` in place moves no counter;
whoever does that calls `forget(weight)`.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

Made = TypeVar("Made")


class _Version:
    """Everything made from one version of a tensor. Holds neither the tensor nor its memory."""

    def __init__(self, tensor: Tensor) -> None:
        self.made: dict[Hashable, Any] = {}
        self._counter = tensor._version
        self._pointer = tensor.data_ptr()
        self._shape = tensor.shape
        # Memory that was freed can be handed out again at the same address: a weak reference tells the two apart.
        self._storage = StorageWeakRef(tensor.untyped_storage())

    def is_of(self, tensor: Tensor) -> bool:
        return (
            self._counter == tensor._version
            and self._pointer == tensor.data_ptr()
            and self._shape == tensor.shape
            and not self._storage.expired()
        )


_versions: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def cached(tensor: Tensor, key: Hashable, make: Callable[[], Made]) -> Made:
    """`make()` the first time for this version of `tensor` and `key`; afterwards the same object again.

    `make` must depend on nothing but the tensor and the key. What it returns must not refer to the tensor object.
    """
    given = getattr(
        tensor, "made", None
    )  # a weight gathered as codes has no master to make anything from
    if given is not None:
        return given[key] if key in given else make()
    if tensor.is_inference():  # such tensors count no versions
        return make()
    version = _versions.get(tensor)
    if version is None or not version.is_of(tensor):
        version = _versions[tensor] = _Version(tensor)
    if key not in version.made:
        with (
            torch.inference_mode(False),
            torch.no_grad(),
        ):  # what is made outlives an inference block
            version.made[key] = make()
    return version.made[key]


def cached_together(tensors: Sequence[Tensor], key: Hashable, make: Callable[[], Made]) -> Made:
    """`make()` once for this combination of versions of several tensors, such as weights that are read as one matrix."""
    versions = tuple(cached(tensor, "version", object) for tensor in tensors)
    held = cached(tensors[0], (key, len(tensors)), dict[tuple[object, ...], Any])
    if versions not in held:
        held.clear()
        with torch.inference_mode(False), torch.no_grad():
            held[versions] = make()
    made: Made = held[versions]
    return made


def replace_cached(tensor: Tensor, key: Hashable, made: Any) -> None:
    """Put an equal object in the place of what `once_per_version` holds, such as a view of memory that is held anyway."""
    version = _versions.get(tensor)
    if version is not None and version.is_of(tensor):
        version.made[key] = made


def invalidate(tensor: Tensor) -> None:
    """Drop what was made from `tensor`: for whoever rewrites its memory without moving its version counter."""
    _versions.pop(tensor, None)


def local_tensor(parameter: Tensor) -> Tensor:
    """This rank's part of a sharded parameter or gradient, whose version counter is its own; any other tensor itself."""
    return getattr(parameter, "_local_tensor", parameter)


def _end_versions(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """A fused step moves no counter, and no step of a sharded parameter moves its local part's."""
    tensors = [
        local_tensor(parameter) for group in optimizer.param_groups for parameter in group["params"]
    ]
    torch.autograd.graph.increment_version(
        [tensor for tensor in tensors if not tensor.is_inference()]
    )


register_optimizer_step_post_hook(
    _end_versions
)  # of every optimizer, whoever owns it: codes of an old version train on in silence


def rounded(weight: Tensor, compute_dtype: torch.dtype, dtype: torch.dtype) -> Tensor:
    """The weight rounded to `compute_dtype`, given in `dtype`; made once per version when it differs from the weight."""
    if weight.dtype == compute_dtype == dtype:
        return weight.detach()
    return cached(
        weight,
        ("rounded", compute_dtype, dtype),
        lambda: weight.detach().to(compute_dtype).to(dtype),
    )
