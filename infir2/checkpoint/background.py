"""Saving in a background thread, from a copy of the tensors, while training continues."""

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

SaveFunction = Callable[[int, Mapping[str, Tensor], Mapping[str, Any]], object]


class BackgroundSaver:
    """Calls `save` (`Store.save`) in a thread; one save at a time.

    The thread copies the tensors to host memory, which the next save reuses. Nothing may change a
    tensor before `await_copy` returns. The trainer calls it right before the optimizer step, so
    the copy overlaps with forward and backward of the next step.
    """

    def __init__(self, save: SaveFunction) -> None:
        self._save = save
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="infir2-save")
        self._copies: dict[str, Tensor] = {}
        self._copied = threading.Event()
        self._copied.set()

    def start(
        self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]
    ) -> Future[float]:
        """Start a save. The future returns the time (time.monotonic) of its end, or its error.

        The previous save must be finished, and the caller may not change `state` afterwards.
        """
        self._copied.clear()
        return self._thread.submit(self._run, step, dict(tensors), state, _copy_stream(tensors))

    def await_copy(self) -> None:
        """Block until the tensors may be changed."""
        self._copied.wait()

    def close(self) -> None:
        """Wait for a running save."""
        self._thread.shutdown()

    def _run(
        self,
        step: int,
        tensors: dict[str, Tensor],
        state: Mapping[str, Any],
        stream: "torch.cuda.Stream | None",
    ) -> float:
        try:
            with torch.no_grad(), torch.cuda.stream(stream):
                self._copy(tensors)
                if stream is not None:
                    stream.synchronize()
        finally:
            self._copied.set()
        self._save(step, self._copies, state)
        return time.monotonic()

    def _copy(self, tensors: dict[str, Tensor]) -> None:
        """Enqueue copies to host memory; allocate it only for new names, shapes and dtypes."""
        for name, tensor in tensors.items():
            copy = self._copies.get(name)
            if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                copy = self._copies[name] = torch.empty_like(
                    tensor, device="cpu", pin_memory=tensor.is_cuda
                )
            copy.copy_(tensor, non_blocking=True)
        for name in self._copies.keys() - tensors.keys():
            del self._copies[name]


def _copy_stream(tensors: Mapping[str, Tensor]) -> "torch.cuda.Stream | None":
    """A stream that waits for the work that is enqueued now; None without a GPU."""
    device = next((tensor.device for tensor in tensors.values() if tensor.is_cuda), None)
    if device is None:
        return None
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream
