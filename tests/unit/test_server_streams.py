"""The work of streams, counted: one message and one wake-up per step, one event per reader's turn.

How fast that is depends on the machine (bench/streams.py); how much there is to do does not.
"""

import asyncio
import multiprocessing
import threading
from collections.abc import Iterable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from own_server import write_model

from infir2.engines.generate import generate_all
from infir2.engines.native import NativeEngine
from infir2.engines.response_text import ResponseText
from infir2.engines.server.driver import EngineDriver
from infir2.engines.server.engine_process import EngineWorker, ProcessEngine
from infir2.engines.server.engine_worker import run_engine
from infir2.engines.types import Completion, Request, RequestFailedError, SamplingParams, Tokens
from infir2.errors import CheckpointError, RankError
from infir2.model import Decoder

NUM_STREAMS, NUM_TOKENS = 64, 40


def streams(count: int = NUM_STREAMS, **params: Any) -> list[Request]:
    params = {"temperature": 1.0, "max_tokens": NUM_TOKENS, "stop_ids": ()} | params
    return [
        Request(f"r{n}", [5 + n % 90, 7], SamplingParams(**params), n, streams=True)
        for n in range(count)
    ]


class Script:
    """A `ServedEngine` that gives each request one more token per step, as often as it may."""

    policy_version, shared_by_ranks, max_request_tokens = 0, False, 1000

    def __init__(self) -> None:
        self.steps, self.num_steps = threading.Semaphore(1), 0  # one for the warm-up
        self._responses: dict[str, tuple[Request, list[int]]] = {}

    @property
    def num_unfinished(self) -> int:
        return len(self._responses)

    def gauges(self) -> dict[str, int]:
        return {}

    def submit(self, request: Request) -> None:
        self._responses[request.id] = request, []

    def cancel(self, request_ids: Iterable[str]) -> None:
        for name in request_ids:
            self._responses.pop(name, None)

    def step(self) -> list[Completion]:
        finished = list[Completion]()
        if not self._responses:
            return finished
        self.steps.acquire()
        self.num_steps += 1
        for name, (request, token_ids) in list(self._responses.items()):
            token_ids.append(len(token_ids))
            if len(token_ids) == request.params.max_tokens:
                del self._responses[name]
                values = np.zeros(len(token_ids), dtype=np.float32)
                finished.append(Completion(name, token_ids, values, "length", 0))
        return finished

    def new_tokens(self) -> dict[str, Tokens]:
        return {name: Tokens(ids[-1:], [0.0]) for name, (_, ids) in self._responses.items()}


async def started(engine: Script) -> EngineDriver[Script]:
    driver = EngineDriver(lambda: engine, 1000)
    driver.start()
    while not driver.is_ready:
        await asyncio.sleep(0.001)
    return driver


async def steps(engine: Script, count: int) -> None:
    """Let the engine do so many, until the event loop has all that it made."""
    before = engine.num_steps
    engine.steps.release(count)
    while engine.num_steps < before + count:
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.05)


def test_a_step_wakes_the_event_loop_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of streams."""

    async def run() -> None:
        engine = Script()
        driver, loop = await started(engine), asyncio.get_running_loop()
        names, original = list[str](), loop.call_soon_threadsafe

        def counted(function: Any, *arguments: Any, **options: Any) -> Any:
            names.append(threading.current_thread().name)
            return original(function, *arguments, **options)

        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
        first_step, events = engine.num_steps, driver.generate(streams())
        reading = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0.05)
        engine.steps.release(1000)
        found = [await reading] + [each async for each in events]
        assert sum(isinstance(event, Completion) for _, event in found) == NUM_STREAMS
        assert NUM_TOKENS <= engine.num_steps - first_step <= NUM_TOKENS + 2
        assert names.count("infir2-engine") <= NUM_TOKENS + 2
        assert driver.close(1)

    asyncio.run(run())


def test_a_reader_that_is_behind_gets_eight_tokens_in_one_event() -> None:
    async def run() -> None:
        engine = Script()
        driver = await started(engine)
        events = driver.generate(streams(2))
        reading = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0.05)
        await steps(engine, 1)
        assert [(await reading)[0], (await anext(events))[0]] == [0, 1]
        await steps(engine, 20)
        merged = [await anext(events) for _ in range(6)]
        assert [(number, event.token_ids) for number, event in merged] == [
            (number, list(range(start, min(start + 8, 21))))
            for start in (1, 9, 17)
            for number in (0, 1)
        ]
        assert all(event.logprobs == [0.0] * len(event.token_ids) for _, event in merged)
        await steps(engine, NUM_TOKENS - 21)
        rest = [each async for each in events]
        assert len(rest) == 2 * 4
        assert [(number, event.token_ids) for number, event in rest[-2:]] == [
            (number, list(range(NUM_TOKENS))) for number in (0, 1)
        ]
        assert driver.close(1)

    asyncio.run(run())


def test_tokens_that_arrive_together_are_decoded_together() -> None:
    calls = list[int]()

    def decode(token_ids: Any) -> str:
        calls.append(len(token_ids))
        return "".join(chr(97 + token_id % 26) for token_id in token_ids)

    text = ResponseText(decode, ["zz"])
    shown = "".join(text.extend(list(range(n, n + 100))) for n in range(0, 1000, 100))
    assert len(shown + text.finish()) == 1000
    assert len(calls) <= 2 * 10 + 1
    assert max(calls) <= 100 + 16


class Counting:
    """A connection that counts what it sends."""

    def __init__(self, connection: Connection) -> None:
        self.recv_bytes, self._send = connection.recv_bytes, connection.send_bytes
        self.sizes = list[int]()

    def send_bytes(self, data: bytes) -> None:
        self.sizes.append(len(data))
        self._send(data)


class Side:
    """A native engine at the other end of a connection, in a thread."""

    def __init__(self, model: Decoder) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        self.counting, self.native = Counting(theirs), NativeEngine(model, NUM_STREAMS, 0.01)
        run = partial(run_engine, self.counting, lambda: self.native)  # type: ignore[arg-type]
        threading.Thread(target=run, daemon=True).start()
        self.engine = ProcessEngine(self)

    def how_it_ended(self) -> str:
        return "code 0"


@pytest.fixture(scope="module")
def directory(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models"), world / "tokenizer")


@pytest.fixture
def side(directory: Path) -> Iterator[Side]:
    side = Side(Decoder.from_hf(directory))
    yield side
    side.connection.close()


def test_a_step_is_one_message(side: Side) -> None:
    """With the bits of the engine in process, and few bytes for each token."""
    requests = streams(16, top_logprobs=2)
    expected = generate_all(NativeEngine(side.native.model, 16), requests)
    num_steps, step = 0, side.native.step

    def counted() -> list[Completion]:
        nonlocal num_steps
        num_steps += 1
        return step()

    side.native.step = counted  # type: ignore[method-assign]
    side.counting.sizes.clear()
    seen = {each.id: Tokens([], []) for each in requests}
    for each in requests:
        side.engine.submit(each)
    completions = list[Completion]()
    while side.engine.num_unfinished:
        completions += side.engine.step()
        for name, tokens in side.engine.new_tokens().items():
            seen[name].extend(tokens)
    for one, other in zip(
        sorted(completions, key=lambda each: int(each.id[1:])), expected, strict=True
    ):
        assert one.id == other.id
        assert one.token_ids == other.token_ids
        assert one.rollout_logprobs.tobytes() == other.rollout_logprobs.tobytes()
        assert (one.finish, list(one.top_logprobs)) == (other.finish, list(other.top_logprobs))
        shown = len(seen[one.id].token_ids)
        assert seen[one.id].token_ids == one.token_ids[:shown]
        assert seen[one.id].logprobs == one.rollout_logprobs.tolist()[:shown]
    assert len(side.counting.sizes) <= num_steps + 1
    side.counting.sizes.clear()
    generate_all(side.engine, streams(16))
    assert sum(side.counting.sizes) < 100 * 16 * NUM_TOKENS


def test_what_was_canceled_is_not_taken_for_a_request_of_the_same_id(side: Side) -> None:
    (request,) = streams(1)
    expected = generate_all(side.engine, [request])[0].token_ids
    for _ in range(20):
        side.engine.submit(request)
        side.engine.cancel([request.id])
    other = Request(request.id, [9, 9, 9], request.params, 5, streams=True)
    wanted = generate_all(NativeEngine(side.native.model, 4), [other])[0].token_ids
    assert wanted != expected
    assert generate_all(side.engine, [other])[0].token_ids == wanted
    assert side.engine.gauges()["requests_running"] == 0


def test_a_request_that_does_not_fit_fails_alone(side: Side) -> None:
    engine = EngineDriver(lambda: side.engine, 10)
    too_long = Request("long", [1], SamplingParams(1.0, 10**9, ()), 0)
    short = Request("short", [1], SamplingParams(1.0, 5, ()), 0)

    async def run() -> None:
        engine.start()
        other = asyncio.ensure_future(engine.complete(short))
        with pytest.raises(RequestFailedError, match="KV cache"):
            await engine.complete(too_long)
        assert len((await other).token_ids) == 5
        assert engine.close(1)

    asyncio.run(run())


def test_errors_of_the_engine_are_those_of_the_server(side: Side, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing"):
        side.engine.update_from_directory(tmp_path / "nothing", 3)
    assert side.engine.policy_version == 0
    assert side.engine.weights_digest() == side.native.weights_digest()


def generate_until_it_ends(engine: ProcessEngine) -> None:
    while engine.num_unfinished:
        engine.step()


def test_the_process_of_an_engine(directory: Path) -> None:
    """Kill -9 is noticed; without a server it ends, whatever it does."""
    worker = EngineWorker()
    engine = ProcessEngine(worker, model=str(directory), max_running_requests=2, cache_gib=0.01)
    expected = NativeEngine(Decoder.from_hf(directory), 2)
    requests = streams(3, stop_texts=("~~",))[:1] + streams(3)[1:]
    assert [each.token_ids for each in generate_all(engine, requests[1:])] == [
        each.token_ids for each in generate_all(expected, requests[1:])
    ]
    assert len(generate_all(engine, requests[:1])[0].token_ids) <= NUM_TOKENS
    engine.submit(requests[0])
    worker.kill()
    with pytest.raises(RankError, match="signal 9"):
        generate_until_it_ends(engine)
    worker = EngineWorker()
    worker.connection.close()
    assert worker._process.wait(60) == 0
