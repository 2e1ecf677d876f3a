"""The trainer's routes of our own server: the engine's bits over HTTP, cancel, new weights."""

import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own_server import KEY, OwnServer, write_model
from safetensors.torch import load_file, save_file

from infir2.cli import main
from infir2.engines.generate import generate_all
from infir2.engines.native import NativeEngine
from infir2.engines.types import Request, SamplingParams
from infir2.model import Decoder


@pytest.fixture(scope="module")
def models(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("models")
    tokenizer = world / "tokenizer"
    return {
        "old": write_model(directory, tokenizer, seed=3),
        "new": write_model(directory, tokenizer, seed=4),
        "bf16": write_model(directory, tokenizer, seed=3, fp8=False),
    }


@pytest.fixture
def server(models: dict[str, Path]) -> Iterator[OwnServer]:
    with OwnServer(models["old"]).run(weight_updates=True) as server:
        yield server


def request(number: int, max_tokens: int = 24, **params: Any) -> Request:
    rng = np.random.default_rng(number)
    prompt = rng.integers(0, 100, 3 + number).tolist()
    how = SamplingParams(**{"temperature": 1.0, "stop_ids": (7, 9)} | params, max_tokens=max_tokens)
    return Request(f"r{number}", prompt, how, key=2**64 - 1 - number)


def body(each: Request, policy_version: int = 0) -> dict[str, Any]:
    params = asdict(each.params)
    return {
        "id": each.id,
        "token_ids": each.token_ids,
        **{name: params[name] for name in ("temperature", "top_p", "max_tokens", "stop_ids")},
        "key": str(each.key),
        "policy_version": policy_version,
    }


REQUESTS = [
    request(0),
    request(1, temperature=0.0),
    request(2, temperature=0.7, top_p=0.8),
    *(request(number, 5 * number) for number in range(3, 14)),
]


def test_responses_have_the_bits_of_the_engine_in_process(
    server: OwnServer, models: dict[str, Path]
) -> None:
    engine = NativeEngine(Decoder.from_hf(models["old"]), 4)
    expected = generate_all(engine, REQUESTS)
    with ThreadPoolExecutor(len(REQUESTS)) as pool:
        answers = list(pool.map(lambda each: server.call("/infir2/generate", body(each)), REQUESTS))
    for (status, answer), completion in zip(answers, expected, strict=True):
        assert status == 200
        assert answer["token_ids"] == completion.token_ids
        assert answer["finish"] == completion.finish
        logprobs = np.array(answer["logprobs"], dtype=np.float32)
        assert np.array_equal(logprobs, completion.rollout_logprobs)


def test_another_version_and_bad_requests_are_refused(server: OwnServer) -> None:
    good = body(REQUESTS[0])
    for change, status, word in (
        ({"policy_version": 1}, 409, "policy_version 0, not 1"),
        ({"token_ids": []}, 400, "token_ids"),
        ({"token_ids": [5, 10**6]}, 400, "token 1000000"),
        ({"token_ids": [5, -1]}, 400, "token -1"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 510}, 400, "512 tokens"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": float("nan")}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"key": str(2**64)}, 400, "64 bits"),
        ({"key": "-1"}, 400, "key"),
        ({"presence_penalty": 1}, 400, "presence_penalty"),
    ):
        found, answer = server.call("/infir2/generate", good | change)
        assert (found, word in answer["error"]["message"]) == (status, True), answer
    assert server.call("/infir2/generate", good)[0] == 200


def test_nobody_without_the_key(server: OwnServer) -> None:
    for path, content in (("generate", body(REQUESTS[0])), ("info", None), ("update_weights", {})):
        assert server.call(f"/infir2/{path}", content, key="")[0] == 401
        assert server.call(f"/infir2/{path}", content, key=KEY + "x")[0] == 401
    assert server.call("/health", key="")[0] == 200


def test_routes_are_absent_without_the_option(models: dict[str, Path]) -> None:
    with OwnServer(models["old"]).run() as server:
        assert server.call("/infir2/info")[0] == 404


def test_info(server: OwnServer) -> None:
    status, info = server.call("/infir2/info")
    assert status == 200
    assert info["model"] == "tiny"
    assert info["policy_version"] == 0
    assert info["scale_format"] == "pow2"
    assert (info["max_positions"], info["max_running_requests"]) == (512, 8)
    assert len(info["tokenizer_sha256"]) == 64


LONG = request(20, max_tokens=450, stop_ids=())


def start(server: OwnServer, each: Request) -> "tuple[threading.Thread, list[Any]]":
    """A request in a thread, once the engine works on it; its answer is appended to the list."""
    answers: list[Any] = []
    thread = threading.Thread(
        target=lambda: answers.append(server.call("/infir2/generate", body(each)))
    )
    thread.start()
    while not server.engine.num_unfinished:
        time.sleep(0.001)
    return thread, answers


def test_cancel(server: OwnServer) -> None:
    thread, answers = start(server, LONG)
    assert server.call("/infir2/cancel", {"ids": ["other", LONG.id]}) == (200, {})
    thread.join()
    ((status, answer),) = answers
    assert (status, answer["error"]["code"]) == (503, "canceled")
    server.wait_until_idle()


def test_a_client_that_goes_away_cancels(server: OwnServer) -> None:
    content = json.dumps(body(LONG)).encode()
    head = (
        f"POST /infir2/generate HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    address = server.url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1]))) as connection:
        connection.sendall(head.encode() + content)
        while not server.engine.num_unfinished:
            time.sleep(0.001)
    server.wait_until_idle(seconds=1)


def test_new_weights(server: OwnServer, models: dict[str, Path]) -> None:
    thread, answers = start(server, LONG)
    update = {"directory": str(models["new"]), "policy_version": 5}
    status, answer = server.call("/infir2/update_weights", update)
    thread.join()
    assert answers[0][0] == 503  # canceled first
    expected = NativeEngine(Decoder.from_hf(models["new"]), 4)
    assert (status, answer["digest"]) == (200, expected.weights_digest())
    assert server.call("/infir2/weights_digest")[1] == expected.weights_digest()
    assert server.call("/infir2/info")[1]["policy_version"] == 5
    each = REQUESTS[0]
    assert server.call("/infir2/generate", body(each))[0] == 409
    _, answer = server.call("/infir2/generate", body(each, policy_version=5))
    assert answer["token_ids"] == generate_all(expected, [each])[0].token_ids


def damaged(models: dict[str, Path], kind: str, directory: Path) -> Path:
    """A copy of the new weights with one defect, or another directory."""
    if kind in ("bf16", "missing"):
        return models.get(kind, directory)
    shutil.copytree(models["new"], directory)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    name, scale = "model.norm.weight", "model.layers.1.mlp.up_proj.weight_scale_inv"
    changes = {
        "another name": {"model.norm2.weight": tensors[name].clone()},
        "shape": {name: tensors[name][:-1].clone()},
        "dtype": {name: tensors[name].float()},
        "not finite": {name: torch.full_like(tensors[name], torch.nan)},
        "scale": {scale: -tensors[scale]},
    }
    if kind == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif kind == "scale format":
        config = json.loads((directory / "config.json").read_text())
        config["quantization_config"]["scale_fmt"] = "float"
        (directory / "config.json").write_text(json.dumps(config))
    else:
        save_file(tensors | changes[kind], file)
    return directory


KINDS = (
    *("bf16", "missing", "another name", "shape", "dtype", "not finite", "scale", "cut"),
    "scale format",
)


def test_a_bad_directory_keeps_the_old_weights(
    server: OwnServer, models: dict[str, Path], tmp_path: Path
) -> None:
    before = server.call("/infir2/weights_digest")
    for number, kind in enumerate(KINDS):
        directory = damaged(models, kind, tmp_path / str(number))
        update = {"directory": str(directory), "policy_version": 6}
        status, answer = server.call("/infir2/update_weights", update)
        assert (status, "the old weights stay" in answer["error"]["message"]) == (400, True), kind
    update["directory"] = "relative"
    assert server.call("/infir2/update_weights", update)[0] == 400
    assert server.call("/infir2/weights_digest") == before
    assert server.call("/infir2/generate", body(REQUESTS[0]))[0] == 200


def test_weight_updates_need_a_key(
    models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(models["old"]), "--weight-updates"]) == 2
    assert "--weight-updates needs --api-key-file" in capsys.readouterr().err
