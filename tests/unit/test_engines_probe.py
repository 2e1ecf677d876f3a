"""verify-weights --engine: right and wrong weights behind a server, and a server that refuses."""

import http.server
import json
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from infir2.cli import main
from infir2.config.schema import ShapeSection
from infir2.convert import selfcheck
from infir2.data import load_tokenizer
from infir2.engines.generate import generate_all
from infir2.engines.native import NativeEngine
from infir2.engines.probe import KEY_VARIABLE, check_engine
from infir2.engines.types import Request, SamplingParams
from infir2.errors import CheckFailedError, ConfigError
from infir2.model import Decoder, exported_weights, write_hf


@contextmanager
def serve(directory: Path, as_ids: bool):
    """An OpenAI-style server on loopback whose answers are our engine's."""
    engine = NativeEngine.from_hf(directory, 4, torch.bfloat16, torch.device("cpu"))
    tokenizer = load_tokenizer(directory)

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self, content: object) -> None:
            allowed = self.headers["Authorization"] == "Bearer secret"
            self.send_response(200 if allowed else 401)
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
