"""Clients of servers: what is an answer, what is none, and where a key may go."""

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

import engine_servers
import numpy as np
import pytest
import torch
from engine_servers import FakeServer, scripted_response

from infir2.engines.http_client import HttpClient, check_url
from infir2.engines.infir2_server import Infir2Client
from infir2.engines.remote import (
    BadAnswerError,
    EngineError,
    PublishedWeights,
    WeightsDifferError,
    checked_completion,
)
from infir2.engines.types import Completion, Request, SamplingParams
from infir2.errors import ConfigError
from infir2.model.hf_names import weights_digest
from infir2.model.safetensors_io import write_hf

PARAMS = SamplingParams(temperature=1.0, max_tokens=5, stop_ids=(96,))
REQUEST = Request("0/p/1", [3, 5, 8], PARAMS, key=2**63 + 1)


ask = partial(engine_servers.ask, Infir2Client)


def generate(server: FakeServer, policy_version: int = 0) -> Completion:
    completion: Completion = ask(server, lambda client: client.generate(REQUEST, policy_version))
    return completion


def test_a_request_arrives_whole_and_its_completion_comes_back() -> None:
    with FakeServer(api_key="k") as server:
        completion = generate(server)
    expected = scripted_response([3, 5, 8], 5, [96])
    assert (completion.id, completion.token_ids) == ("0/p/1", expected[0])
    assert completion.rollout_logprobs.tolist() == expected[1]
    assert completion.rollout_logprobs.dtype == np.float32
    assert completion.policy_version == 0
    route, body = server.calls[-1]
    assert route == "/infir2/generate"
    assert body["key"] == "9223372036854775809"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        *engine_servers.BAD_ANSWERS,
        ("die", "gone"),
    ],
)
def test_a_bad_answer_is_none_and_says_what_is_wrong(fault: str, reason: str) -> None:
    with FakeServer([fault]) as server, pytest.raises(EngineError) as caught:
        generate(server)
    assert caught.value.reason == reason


def test_other_weights_and_no_server() -> None:
    with FakeServer() as server, pytest.raises(BadAnswerError) as caught:
        generate(server, policy_version=3)
    assert caught.value.reason == "version"
    with pytest.raises(EngineError) as gone:
        generate(server)
    assert gone.value.reason == "gone"


def test_a_refused_key_is_the_user_s_to_repair() -> None:
    with FakeServer(api_key="right") as server:
        server.api_key, wrong = "right", Infir2Client(server.url, "wrong")
        with pytest.raises(ConfigError, match="refuses the key"):
            asyncio.run(wrong.check_health())


@pytest.mark.parametrize(
    ("tokens", "logprobs", "reason"),
    [
        ([], [], "tokens"),
        ([1, 2, 3, 4, 5, 6], [-1.0] * 6, "tokens"),
        ([1, 2, 3, 4, 5], [-1.0] * 4, "logprobs"),
        ([1, 2, 3, 4, 5], [[-1.0]] * 5, "logprobs"),
        ([1, 2, 3, 4, 5], [-1.0, -1.0, float("inf"), -1.0, -1.0], "not_finite"),
        ([1, 2, 3, 4, 5], [-1.0, -1.0, 0.5, -1.0, -1.0], "not_finite"),
        ([1, 2, 3], [-1.0] * 3, "finish"),
        ([1, 96, 3], [-1.0] * 3, "finish"),
    ],
)
def test_what_is_no_completion(tokens: list[int], logprobs: list[Any], reason: str) -> None:
    with pytest.raises(BadAnswerError) as caught:
        checked_completion(REQUEST, tokens, logprobs, 0)
    assert caught.value.reason == reason


def test_a_stop_token_at_the_last_place_stops() -> None:
    assert checked_completion(REQUEST, [1, 2, 3, 4, 96], [-1.0] * 5, 0).finish == "stop"
    assert checked_completion(REQUEST, [1, 2, 3, 4, 5], [-1.0] * 5, 0).finish == "length"


def test_weights_are_proved_by_their_digests(tmp_path: Path) -> None:
    tensors = [("w", torch.ones(2, 3)), ("v", torch.zeros(1))]
    write_hf(tmp_path / "1", tensors, {})
    weights = PublishedWeights(tmp_path / "1", 1, 28)
    with FakeServer() as server:
        server.digest = weights_digest(tensors)
        ask(server, lambda client: client.update_weights(weights))
        ask(server, lambda client: client.prove_weights(weights))
        assert server.policy_version == 1
        server.digest["v"] = "1" * 64
        with pytest.raises(WeightsDifferError, match="v is not the trainer's"):
            ask(server, lambda client: client.prove_weights(weights))


def test_an_answer_of_another_form_is_a_bad_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    for answer in (None, [], {"token_ids": 3}, {"policy_version": 0, "token_ids": 3}):
        monkeypatch.setattr(FakeServer, "format_answer", lambda *_, answer=answer: answer)
        with FakeServer() as server, pytest.raises(BadAnswerError):
            generate(server)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("ftp://127.0.0.1:1", "form"),
        ("127.0.0.1:30000", "form"),
        ("http://127.0.0.1:port", "no URL"),
        ("http://name:secret@127.0.0.1:1", "the URL of 127.0.0.1 has a key"),
        ("http://10.0.0.7:30000", "there is no key"),
        ("http://127.0.0.1.example.com", "there is no key"),
    ],
)
def test_addresses_that_are_refused(url: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        check_url("rollout.urls", url, "")
    assert "secret" not in str(caught.value)


def test_addresses_that_are_allowed() -> None:
    for url in ("http://127.0.0.1:1", "http://localhost:30000/", "http://[::1]:30000"):
        check_url("rollout.urls", url, "")
    check_url("rollout.urls", "https://engines.example.com", "key")


def test_a_sentence_without_a_content_type_is_text() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"{}")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 14\r\n\r\nCache flushed.")
        writer.close()

    async def run() -> Any:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        client = HttpClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        try:
            return await client.post("/flush_cache", {})
        finally:
            await client.close()
            server.close()

    assert asyncio.run(asyncio.wait_for(run(), 20)) == "Cache flushed."
