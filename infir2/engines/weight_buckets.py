"""The trainer's weights in flat buffers on its GPU, from which they are broadcast into servers.

FP8 stays FP8: a bucket has codes and scales under their exported names, and travels as bytes.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BUCKET_BYTES = 2**28  # a server needs twice as much beside its cache while it loads a bucket


@dataclass(frozen=True)
class Bucket:
    """Tensors one after another in one buffer.

    Attributes:
        data: uint8 [sum of the tensors' bytes].
        names: of the tensors, in their order in `data`.
        dtypes: of the tensors.
        shapes: of the tensors.
    """

    data: Tensor
    names: list[str]
    dtypes: list[torch.dtype]
    shapes: list[tuple[int, ...]]


class WeightBuckets:
    """One version of the weights. The buffers are copies, which a training step does not change.

    Example: `WeightBuckets.of(exported, torch.device("cuda")).read("model.norm.weight")`.
    """

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self.buckets = tuple(buckets)
        self._tensors = {name: view for each in buckets for name, view in _views(each)}

    @classmethod
    def of(cls, weights: Iterable[tuple[str, Tensor]], device: torch.device) -> "WeightBuckets":
        """Copy tensors, which are consumed one after another, to `device`."""
        return cls(list(_fill(weights, device)))

    @property
    def num_bytes(self) -> int:
        return sum(bucket.data.numel() for bucket in self.buckets)

    def names(self) -> list[str]:
        """As `HfWeights`."""
        return list(self._tensors)

    def read(self, name: str) -> Tensor:
        """As `HfWeights`, on the device of the buckets."""
        return self._tensors[name]


def _fill(weights: Iterable[tuple[str, Tensor]], device: torch.device) -> Iterator[Bucket]:
    pending: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in weights:
        num_bytes = tensor.numel() * tensor.element_size()
        if pending and size + num_bytes > BUCKET_BYTES:
            yield _make_bucket(pending)
            pending, size = [], 0
        pending.append((name, tensor.detach().to(device)))
        size += num_bytes
    if pending:
        yield _make_bucket(pending)


def _make_bucket(tensors: Sequence[tuple[str, Tensor]]) -> Bucket:
    # A view of bytes as a wider dtype must be aligned to it, so the widest come first.
    ordered = sorted(tensors, key=lambda pair: -pair[1].element_size())
    return Bucket(
        torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for _, tensor in ordered]),
        [name for name, _ in ordered],
        [tensor.dtype for _, tensor in ordered],
        [tuple(tensor.shape) for _, tensor in ordered],
    )


def _views(bucket: Bucket) -> Iterator[tuple[str, Tensor]]:
    start = 0
    for name, dtype, shape in zip(bucket.names, bucket.dtypes, bucket.shapes, strict=True):
        end = start + torch.Size(shape).numel() * dtype.itemsize
        yield name, bucket.data[start:end].view(dtype).view(shape)
        start = end
