"""Saving while training goes on: from a copy, one save at a time."""

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

SaveFunction = Callable[[int, Mapping[str, Tensor], Mapping[str, Any]], object]


class BackgroundSaver:
    """Calls `save` (that of a `Store`) in a thread, with copies in host memory that are used again by the next save.

    Nothing may change a tensor before `await_copy` has returned: the trainer calls it right before its update, so the copy
    is made during the next step's forward and backward, and sees one version of everything.
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
        """Begin a save; the future has the time (monotonic) when it was published, or its error.

        The caller has waited for the one before, and changes `state` no more.
        """
        self._copied.clear()
        return self._thread.submit(self._run, step, dict(tensors), state, _side_stream(tensors))

    def await_copy(self) -> None:
        """Return when the tensors may change."""
        self._copied.wait()

    def close(self) -> None:
        """Wait for the save in flight."""
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
                for name, tensor in tensors.items():
                    copy = self._copies.get(name)
                    if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                        copy = self._copies[name] = torch.empty_like(
                            tensor, device="cpu", pin_memory=tensor.is_cuda
                        )
                    copy.copy_(tensor, non_blocking=True)
                if stream is not None:
                    stream.synchronize()
            for name in self._copies.keys() - tensors.keys():
                del self._copies[name]
        finally:
            self._copied.set()
        self._save(step, self._copies, state)
        return time.monotonic()


def _side_stream(tensors: Mapping[str, Tensor]) -> "torch.cuda.Stream | None":
    """A stream for the copies that begins after what the step has queued; None without a GPU."""
    device = next((tensor.device for tensor in tensors.values() if tensor.is_cuda), None)
    if device is None:
        return None
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream
