"""The process of the server's native engine: `python -m infir2.engines.server.engine_worker FD`.

FD is its end of the connection of `engine_process.ProcessEngine`. It ends when the other end is
closed, however the server ends.
"""

import contextlib
import marshal
import os
import queue
import sys
import threading
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from infir2.data import load_tokenizer
from infir2.engines.native import NativeEngine
from infir2.engines.types import Completion, Request, SamplingParams
from infir2.errors import ConfigError, UserError, system_error
from infir2.model import Decoder

CPU_CACHE_GIB = 1.0
Commands = queue.SimpleQueue[tuple[Any, ...]]


def open_engine(model: str, max_running_requests: int, cache_gib: float) -> NativeEngine:
    """Load a Hugging Face directory; `cache_gib` 0: a default. Raises UserError."""
    directory, has_gpu = Path(model), torch.cuda.is_available()
    decoder = Decoder.from_hf(directory).to("cuda" if has_gpu else "cpu")
    cache_gib = cache_gib or (0.0 if has_gpu else CPU_CACHE_GIB)
    decode = load_tokenizer(directory).decode
    engine = NativeEngine(decoder, max_running_requests, cache_gib, keep_cache=True, decode=decode)
    if not engine.cache_tokens:
        raise ConfigError(
            f"--cache-gib {cache_gib:g} holds no token of this model; allow more memory."
        )
    return engine


class EngineLoop:
    """Does what `commands` say: generates, and reports to `connection` after each step."""

    def __init__(self, engine: NativeEngine, connection: Connection, commands: Commands) -> None:
        self._engine, self._connection, self._commands = engine, connection, commands
        names = ("cache_tokens", "max_running_requests", "scale_format")
        self._replies = [("", {name: getattr(engine, name) for name in names})]
        self._failed: list[tuple[int, str]] = []

    def run(self) -> None:
        """Returns after the command "end"."""
        while True:
            self._report(self._engine.step())
            while not self._engine.num_unfinished or not self._commands.empty():
                name, *arguments = self._commands.get()
                if name == "end":
                    return
                getattr(self, f"_{name}")(*arguments)
                if not self._engine.num_unfinished:
                    self._report([])

    def _submit(self, number: int, token_ids: Any, params: Any, key: int, streams: bool) -> None:
        request = Request(str(number), token_ids, SamplingParams(**params), key, streams)
        try:
            self._engine.submit(request)
        except ValueError as error:
            self._failed.append((number, str(error)))

    def _cancel(self, numbers: list[int]) -> None:
        self._engine.cancel(map(str, numbers))

    def _update(self, directory: str, policy_version: int) -> None:
        update = partial(self._engine.update_from_directory, Path(directory), policy_version)
        self._replies.append(outcome(update))

    def _gauges(self) -> None:
        self._replies.append(("", self._engine.gauges()))

    def _digest(self) -> None:
        self._replies.append(outcome(self._engine.weights_digest))

    def _report(self, finished: list[Completion]) -> None:
        """Send what has happened, in one message; nothing if nothing has."""
        message = (
            [(int(name), *vars(new).values()) for name, new in self._engine.new_tokens().items()],
            [_fields(completion) for completion in finished],
            self._failed,
            self._replies,
            self._engine.policy_version,
        )
        if any(message[:4]):
            self._connection.send_bytes(marshal.dumps(message))
        self._failed, self._replies = [], []


def outcome(function: Callable[[], Any]) -> tuple[str, Any]:
    """("", its result), or the class and the sentence of a user's error."""
    try:
        return "", function()
    except (UserError, OSError) as error:
        known = error if isinstance(error, UserError) else system_error(error)
        if known is None:
            raise
        return type(known).__name__, str(known)


def _fields(completion: Completion) -> tuple[Any, ...]:
    return (
        int(completion.id),
        completion.token_ids,
        completion.rollout_logprobs.tolist(),
        completion.finish,
        completion.policy_version,
        list(completion.top_logprobs),
    )


def run_engine(
    connection: Connection,
    open_engine: Callable[..., NativeEngine] = open_engine,
    on_end: Callable[[], None] = lambda: None,
) -> None:
    """Serve a `ProcessEngine` until the connection is closed; `on_end` is called then at once."""
    commands = Commands()

    def read() -> None:  # in a thread: a step in progress never waits for the connection
        with contextlib.suppress(EOFError, OSError):
            while True:
                commands.put(marshal.loads(connection.recv_bytes()))
        commands.put(("end",))
        on_end()

    threading.Thread(target=read, name="infir2-commands", daemon=True).start()
    _, settings = commands.get()
    kind, value = outcome(lambda: open_engine(**settings))
    if kind:
        connection.send_bytes(marshal.dumps(([], [], [], [(kind, value)], 0)))
    else:
        with contextlib.suppress(BrokenPipeError):
            EngineLoop(value, connection, commands).run()


if __name__ == "__main__":
    run_engine(Connection(int(sys.argv[1])), on_end=lambda: os._exit(0))
