"""SGLang or vLLM behind our server when it fails; test_server_openai.py has what goes well."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from own_server import OwnServer, write_model

from infir2.engines import remote_engine
from infir2.engines.types import Completion
from infir2.errors import RankError

LONG: Any = {"prompt": "Compute", "max_tokens": 400, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models"), world / "tokenizer", fp8=False)


@pytest.fixture(scope="module", params=["sglang", "vllm"])
def server(model: Path, request: pytest.FixtureRequest) -> Iterator[OwnServer]:
    with OwnServer(model, kind=request.param).run() as server:
        yield server


def ask(server: OwnServer, body: Any, answers: list[tuple[int, Any]]) -> threading.Thread:
    """Send it, and return once the server behind ours generates it."""
    thread = threading.Thread(
        target=lambda: answers.append(server.call("/v1/completions", body, parse=False))
    )
    thread.start()
    while not server.engine.num_unfinished:
        time.sleep(0.001)
    return thread


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_the_engine_drops(server: OwnServer, stream: bool) -> None:
    """It alone fails, with a status that clients try again, and says so in a stream, too."""
    answers: list[tuple[int, Any]] = []
    thread = ask(server, LONG | {"stream": stream}, answers)
    time.sleep(0.1)
    server.back.cancel(list(server.back._waiters))
    thread.join()
    ((status, text),) = answers
    if stream:
        assert status == 200
        events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        assert events[-1] == "[DONE]"
        content = json.loads(events[-2])
    else:
        assert status == 503
        content = json.loads(text)
    assert content["error"]["code"] == "engine_failed"
    assert "send it again" in content["error"]["message"]
    assert server.call("/v1/completions", LONG | {"max_tokens": 3})[0] == 200
    server.wait_until_idle()


def test_a_stop_text_ends_the_request_at_the_server(server: OwnServer) -> None:
    """It would go on to its 400 tokens."""
    text = server.call("/v1/completions", LONG | {"seed": 4})[1]["choices"][0]["text"]
    before = server.back.counts["canceled"]
    body = LONG | {"seed": 4, "stop": text[20:23]}
    choice = server.call("/v1/completions", body)[1]["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (text[: text.find(text[20:23])], "stop")
    server.wait_until_idle()
    assert server.back.counts["canceled"] == before + 1


def test_a_server_that_hangs_is_the_end(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Silent about a request and without an answer to a health check; slow alone is no hang."""
    for name, seconds in (("WATCH", 0.05), ("SILENCE", 0.3), ("HEALTH", 5.0)):
        monkeypatch.setattr(remote_engine, f"{name}_SECONDS", seconds)
    hung, answers = threading.Event(), list[tuple[int, Any]]()
    with OwnServer(model, kind="vllm").run() as server:
        step = server.engine.step

        def slow_step() -> list[Completion]:
            hung.wait(0.01)
            while hung.is_set():
                time.sleep(0.01)
            return step()

        monkeypatch.setattr(server.engine, "step", slow_step)
        assert server.call("/v1/completions", LONG | {"max_tokens": 100})[0] == 200
        thread = ask(server, LONG, answers)
        hung.set()
        thread.join(30)
        hung.clear()
        assert answers[0][0] == 503
        assert isinstance(server.driver.failure, RankError)
        assert "hangs" in str(server.driver.failure)
