"""verify-weights --engine: right and wrong weights behind a server, and a server that refuses."""

import http.server
import json
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar

import pytest

from infir2.cli import main
from infir2.config.schema import ShapeSection
from infir2.convert import selfcheck
from infir2.data import load_tokenizer
from infir2.engines import http_client
from infir2.engines.generate import generate_all
from infir2.engines.http_client import KEY_VARIABLE, ask_once
from infir2.engines.native import NativeEngine
from infir2.engines.probe import check_engine
from infir2.engines.types import Request, SamplingParams
from infir2.errors import CheckFailedError, ConfigError
from infir2.model import Decoder, exported_weights, write_hf


@contextmanager
def serve(directory: Path, as_ids: bool):
    """An OpenAI-style server on loopback whose answers are our engine's."""
    engine = NativeEngine(Decoder.from_hf(directory), 4)
    tokenizer = load_tokenizer(directory)

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self, content: object) -> None:
            allowed = self.headers["Authorization"] == "Bearer secret"
            self.send_response(200 if allowed else 401)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(content if allowed else {}).encode())

        def do_GET(self) -> None:
            self.answer({"data": [{"id": "model"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert body["model"] == "model"
            params = SamplingParams(temperature=0.0, max_tokens=body["max_tokens"], stop_ids=())
            done = generate_all(engine, [Request("0", body["prompt"], params, key=0)])[0]
            texts = [
                f"token_id:{token}" if as_ids else tokenizer.decode([token])
                for token in done.token_ids
            ]
            self.answer(
                {
                    "choices": [
                        {
                            "logprobs": {
                                "tokens": texts,
                                "token_logprobs": done.rollout_logprobs.tolist(),
                            }
                        }
                    ]
                }
            )

        def log_message(self, *words: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def fp8_model(world, tmp_path, monkeypatch):
    monkeypatch.setattr(selfcheck, "SMALL_MODEL_PARAMETERS", 0)

    def make(seed: int) -> Path:
        tokenizer = world / "tokenizer"
        shape = ShapeSection(
            hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1, ffn_size=128
        )
        decoder = Decoder.from_shape(
            shape, vocab_size=load_tokenizer(tokenizer).vocab_size, seed=seed
        )
        write_hf(
            tmp_path / f"bf16-{seed}", exported_weights(decoder), decoder.config.to_hf(), tokenizer
        )
        assert (
            main(
                [
                    "export",
                    "fp8",
                    str(tmp_path / f"bf16-{seed}"),
                    "--to",
                    str(tmp_path / f"fp8-{seed}"),
                ]
            )
            == 0
        )
        return tmp_path / f"fp8-{seed}"

    return make


@pytest.mark.parametrize("as_ids", [True, False])
def test_right_and_wrong_servers(fp8_model, monkeypatch, as_ids):
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    right, wrong = fp8_model(0), fp8_model(1)
    with serve(right, as_ids) as url:
        assert "100% of 48 greedy tokens agree" in check_engine(f"{url}/v1", right)
        with pytest.raises(CheckFailedError, match="does not compute what") as caught:
            check_engine(url, wrong)
        assert caught.value.exit_code == 1
        monkeypatch.delenv(KEY_VARIABLE)
        with pytest.raises(ConfigError, match=KEY_VARIABLE):
            check_engine(url, right)
    with pytest.raises(ConfigError, match="returned no completions"):
        check_engine(url, right)


class Answer(http.server.BaseHTTPRequestHandler):
    """Sends what a test has set, and keeps the keys that it received."""

    keys: ClassVar[list[str]] = []
    status, headers_sent, parts = 200, (), ()

    def do_GET(self) -> None:
        self.keys.append(self.headers["Authorization"])
        self.send_response(self.status)
        self.send_header("Content-Type", "application/json")
        for name, value in self.headers_sent:
            self.send_header(name, value)
        self.end_headers()
        with suppress(OSError):
            for part in self.parts:
                self.wfile.write(part)

    def log_message(self, *words: object) -> None:
        pass


@contextmanager
def answering(status: int = 200, headers=(), parts=()):
    handler = type(
        "Sent", (Answer,), {"keys": [], "status": status, "headers_sent": headers, "parts": parts}
    )
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.keys
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_key_does_not_follow_a_redirect(monkeypatch, tmp_path, status):
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    with answering() as (other, other_keys):
        location = (("Location", f"{other}/v1/models"),)
        with answering(status, location) as (url, keys):
            with pytest.raises(ConfigError, match="redirects"):
                check_engine(url, tmp_path)
            assert keys == ["Bearer secret"]
        assert other_keys == []


def test_a_key_does_not_go_to_a_proxy(monkeypatch):
    with answering(parts=[b"1"]) as (proxy, proxy_keys), answering(parts=[b"2"]) as (url, _):
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy)
        assert ask_once(url, "secret", "/") == 2
        assert proxy_keys == []


@pytest.mark.parametrize(
    "url",
    [
        *("file:///etc/passwd", "ftp://127.0.0.1/x", "data:,{}", "127.0.0.1:1", "http://", "x"),
        *("http://[", "http://127.0.0.1:99999", "http://127.0.0.1:x", "http://a b/", "http://\0"),
        *("http://" + "a" * 70 + ".invalid", "http://name:secret@127.0.0.1:1"),
    ],
)
def test_an_address_that_is_no_server_is_one_sentence(tmp_path, url):
    with pytest.raises(ConfigError) as caught:
        check_engine(url, tmp_path)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("key", ["se\ncret", "se\r\ncret", "secr\u00e9t"])
def test_a_key_that_cannot_be_sent_is_not_printed(monkeypatch, tmp_path, key):
    monkeypatch.setenv(KEY_VARIABLE, key)
    with answering() as (url, keys):
        with pytest.raises(ConfigError, match="the key has characters") as caught:
            check_engine(url, tmp_path)
        assert keys == []
    assert "cr" not in str(caught.value).replace("characters", "")


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ((b" " * 2**20 for _ in range(640)), "more than 67,108,864 bytes"),
        ([b"[" * 2**20], "recursion"),
        ([b'{"data": [{"id": ' + b"9" * 10_000 + b"}]}"], "no JSON"),
        ([b'{"data": {}}'], "0"),
        ([b"\xff"], "no JSON"),
        ([b""], "returned no completions"),
    ],
)
def test_a_bad_answer_is_one_sentence(tmp_path, parts, sentence):
    with answering(parts=parts) as (url, _), pytest.raises(ConfigError, match=sentence):
        check_engine(url, tmp_path)


def test_an_answer_is_bounded_in_time(monkeypatch, tmp_path):
    monkeypatch.setattr(http_client, "TIMEOUT_SECONDS", 0.5)

    def slow():
        for _ in range(100):
            time.sleep(0.1)
            yield b" "

    started = time.perf_counter()
    with answering(parts=slow()) as (url, _), pytest.raises(ConfigError, match="no completions"):
        check_engine(url, tmp_path)
    assert time.perf_counter() - started < 5
