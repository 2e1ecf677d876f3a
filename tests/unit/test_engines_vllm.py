"""The client of vLLM against a scripted server; tests/engines has the real one."""

import asyncio
import hashlib
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import engine_servers
import numpy as np
import pytest
import torch
from engine_servers import FakeServer, Status, scripted_response

from infir2.config.schema import RolloutSection, ShapeSection
from infir2.engines.inside_vllm.infir2_require_key import RequireKey
from infir2.engines.remote import (
    BadAnswerError,
    EngineError,
    PublishedWeights,
    WeightProbe,
    WeightsDifferError,
)
from infir2.engines.server_process import Place
from infir2.engines.sglang_checksum import fused_parameters
from infir2.engines.types import Completion, Request, SamplingParams
from infir2.engines.vllm import VllmClient
from infir2.engines.vllm_command import vllm_command
from infir2.engines.vllm_proof import MAX_PROBE_DIFFERENCE
from infir2.engines.weight_probe import trainer_probe
from infir2.errors import ConfigError
from infir2.model import Decoder, exported_weights
from infir2.model.safetensors_io import write_hf
from infir2.parallel.parallel_model import single_process

PARAMS = SamplingParams(temperature=1.0, max_tokens=5, stop_ids=(96,))
REQUEST = Request("0/p/1", [3, 5, 8], PARAMS, key=2**64 - 1)


class FakeVllm(FakeServer):
    """vLLM 0.32.0's routes as they answered, and its traps.

    Attributes:
        broken: what does not work as it should: "scale_out", "dev_mode", "raw", "extension",
            "details" (a flag is missing), "reload" (fails), "stale" (reload does nothing),
            "cache" (is not reset), "held" (the cache cannot be reset), "head" (stays), "fp8" (its
            layers have no digests).
        served: the directory whose weights it computes with.
    """

    generate_route = "/inference/v1/generate"

    def __init__(self, broken: str = "", faults: Iterable[str] = (), api_key: str = "") -> None:
        super().__init__(faults, api_key)
        self.broken, self.label = broken, "default"
        self.served: PublishedWeights | None = None
        self.cached: set[str] = set()
        self.paused = False

    def read_request(self, body: Any) -> tuple[list[int], int, list[int]]:
        if self.broken == "scale_out":
            raise Status(403)
        params = body["sampling_params"]
        return body["token_ids"], params["max_tokens"], params.get("stop_token_ids", [])

    def format_answer(
        self, body: Any, token_ids: list[int], logprobs: list[float], policy_version: int
    ) -> Any:
        version = self.label if policy_version == 0 else "older"
        content = [{"token_id": t, "logprob": p} for t, p in zip(token_ids, logprobs, strict=False)]
        choice = {"token_ids": token_ids, "logprobs": {"content": content}, "finish_reason": "stop"}
        choice["weight_versions"] = [{"version": version, "start": 0, "end": len(token_ids)}]
        prompt, salt = str(body["token_ids"]), body.get("cache_salt", "")
        details = {"cached_tokens": 128 if prompt + salt in self.cached else None}
        self.cached.add(prompt + salt)
        usage = {"prompt_tokens_details": None if self.broken == "details" else details}
        answer = {"choices": [choice], "usage": usage, "prompt_logprobs": None}
        if "prompt_logprobs" in body["sampling_params"] and self.served and self.served.probe:
            probe = self.served.probe
            pairs = zip(probe.token_ids[1:], probe.logprobs.tolist(), strict=True)
            answer["prompt_logprobs"] = [None, *({str(t): {"logprob": p}} for t, p in pairs)]
        return answer

    def call(self, route: str, body: Any) -> Any:
        if self.broken == "dev_mode":
            raise Status(404)
        if route.startswith("/server_info"):
            return {"vllm_config": self._config()}
        if route == "/update_weight_version":
            self.label = body["new_version"]
        if route.startswith("/pause"):
            self.paused = True
        if route == "/resume":
            self.paused = False
        if route == "/reset_prefix_cache":
            if self.broken != "cache":
                self.cached.clear()
            return {"success": self.broken != "held"}
        if route == "/collective_rpc":
            return {"results": [self._rpc(body)]}
        return {
            "/version": {"version": "0.32.0"},
            "/weight_info": {"weight_version": self.label},
        }.get(route, {})

    def _config(self) -> Any:
        mode = "raw_logprobs" if self.broken == "raw" else "processed_logprobs"
        extension = "" if self.broken == "extension" else "infir2_worker.Infir2Worker"
        return {
            "model_config": {
                "logprobs_mode": mode,
                "quantization": None,
                "max_model_len": 256,
                "model": "/m",
            },
            "scheduler_config": {"max_num_seqs": 8},
            "parallel_config": {"worker_extension_cls": extension},
        }

    def _rpc(self, body: Any) -> Any:
        if body["method"] == "infir2_reload":
            if self.broken == "reload":
                raise Status(500)
            if self.broken != "stale":
                self.loaded = Path(body["kwargs"]["directory"])
            return None
        parameters = fused_parameters(
            PublishedWeights(self.loaded, 0, 0), 0, 1, torch.device("cpu")
        )
        digests = {name: sha256(make()) for name, make in parameters.items()}
        digests["lm_head.weight"] = digests["model.embed_tokens.weight"]
        if self.broken == "head":
            digests["lm_head.weight"] = "0" * 64
        if self.broken == "fp8":
            layers = {name for name in digests if name.endswith("_proj.weight")}
            digests |= dict.fromkeys(layers, "quantized")
        return {"tp_rank": 0, "tp_size": 1, "digests": digests}


def sha256(tensor: torch.Tensor) -> str:
    rows = tensor.t() if tensor.dim() == 2 else tensor
    return hashlib.sha256(rows.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


ask = partial(engine_servers.ask, VllmClient)


def generate(server: FakeServer, request: Request = REQUEST) -> Completion:
    completion: Completion = ask(server, lambda client: client.generate(request, 0))
    return completion


def test_a_request_arrives_whole_and_its_completion_comes_back() -> None:
    with FakeVllm(api_key="k") as server:
        server.label = "0"
        completion = generate(server)
    tokens, logprobs = scripted_response([3, 5, 8], 5, [96])
    assert (completion.token_ids, completion.rollout_logprobs.tolist()) == (tokens, logprobs)
    body = server.calls[-1][1]
    params = body["sampling_params"]
    assert (body["request_id"], body["cache_salt"]) == ("0/p/1", "0")
    assert (params["seed"], params["stop_token_ids"], params["ignore_eos"]) == (
        2**63 - 1,
        [96],
        True,
    )


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        *engine_servers.BAD_ANSWERS,
        ("die", "gone"),
    ],
)
def test_a_bad_answer_is_none(fault: str, reason: str) -> None:
    with FakeVllm(faults=[fault]) as server:
        server.label = "0"
        with pytest.raises(EngineError) as caught:
            generate(server)
    assert caught.value.reason == reason


def test_a_version_that_the_server_never_got_is_refused() -> None:
    with FakeVllm() as server, pytest.raises(BadAnswerError, match="weights default"):
        generate(server)


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        ("scale_out", "--enable-scale-out"),
        ("dev_mode", "VLLM_SERVER_DEV_MODE=1"),
        ("raw", "--logprobs-mode processed_logprobs"),
        ("extension", "--worker-extension-cls infir2_worker.Infir2Worker"),
    ],
)
def test_a_missing_flag_is_named(broken: str, sentence: str) -> None:
    async def begin(client: VllmClient) -> None:
        await client.check_health()
        await client.info()

    with FakeVllm(broken) as server, pytest.raises(ConfigError, match=sentence):
        ask(server, begin)


def test_a_temperature_that_vllm_refuses_is_no_failure_of_the_server() -> None:
    hot = Request("a", [1], SamplingParams(temperature=2.5, max_tokens=2, stop_ids=()), key=1)
    with FakeVllm() as server, pytest.raises(ConfigError, match="at 2 at most"):
        generate(server, hot)


def test_only_prefixed_ids_are_ended_and_never_all() -> None:
    async def cancel(client: VllmClient) -> None:
        await client.cancel([])
        await client.cancel(["a", "b"])

    with FakeVllm() as server:
        ask(server, cancel)
    assert server.calls == [
        ("/abort_requests", {"request_ids": ["generate-tokens-a", "generate-tokens-b"]})
    ]


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[PublishedWeights]:
    """Two versions of a small model with their probes."""
    directory = tmp_path_factory.mktemp("versions")
    shape = ShapeSection(hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1, ffn_size=128)
    made = []
    for version in (1, 2):
        decoder = Decoder.from_shape(shape, vocab_size=156, seed=version)
        path = directory / str(version)
        write_hf(path, exported_weights(decoder), decoder.config.to_hf())
        probe = trainer_probe(single_process(decoder))
        made.append(PublishedWeights(path, version, 0, probe))
    return made


def publish(server: FakeVllm, versions: Iterable[PublishedWeights]) -> None:
    async def run(client: VllmClient) -> None:
        for weights in versions:
            await client.update_weights(weights)
            server.served = weights if server.broken != "stale" else server.served or weights
            await client.prove_weights(weights)

    ask(server, run)


def test_each_version_is_loaded_and_proved(versions: list[PublishedWeights]) -> None:
    with FakeVllm() as server:
        publish(server, versions)
        assert (server.label, server.paused) == ("2", False)
        server.broken = "fp8"
        publish(server, versions)
    routes = [route for route in server.routes_called() if route != "/collective_rpc"][:4]
    assert routes == [
        "/pause?mode=abort",
        "/reset_prefix_cache",
        "/update_weight_version",
        "/resume",
    ]


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        ("stale", "are not those of"),
        ("head", "lm_head.weight and 0 more"),
        ("cache", "it was not reset"),
    ],
)
def test_other_weights_are_found(
    broken: str, problem: str, versions: list[PublishedWeights]
) -> None:
    with FakeVllm() as server:
        publish(server, versions[:1])
        server.broken = broken
        with pytest.raises(WeightsDifferError, match=problem):
            publish(server, versions[1:])


@pytest.mark.parametrize(("broken", "reason"), [("reload", "reload"), ("held", "cache")])
def test_a_failed_update_is_an_error_and_the_server_resumes(
    broken: str, reason: str, versions: list[PublishedWeights]
) -> None:
    with FakeVllm(broken) as server, pytest.raises(EngineError) as caught:
        publish(server, versions)
    assert caught.value.reason == reason
    assert not server.paused


def test_no_proof_of_the_cache_without_the_flag(versions: list[PublishedWeights]) -> None:
    with FakeVllm("details") as server, pytest.raises(ConfigError, match="prompt-tokens-details"):
        publish(server, versions)


def test_the_probe_finds_other_log_probabilities(versions: list[PublishedWeights]) -> None:
    """Digests leave FP8 layers out: then only the probe speaks."""
    first = versions[0]
    assert first.probe is not None
    off = WeightProbe(
        first.probe.token_ids, first.probe.logprobs + np.float32(MAX_PROBE_DIFFERENCE)
    )
    moved = WeightProbe(first.probe.token_ids, first.probe.logprobs + np.float32(1e-3))

    async def prove(client: VllmClient, probe: WeightProbe) -> None:
        server.cached.clear()
        await client._proof._check_probe(probe)

    with FakeVllm() as server:
        server.served, probe = first, first.probe

        async def run(client: VllmClient) -> None:
            with pytest.raises(WeightsDifferError, match="on average"):
                await prove(client, WeightProbe(off.token_ids, off.logprobs + np.float32(0.01)))
            await prove(client, probe)
            await prove(client, probe)
            with pytest.raises(WeightsDifferError, match="the weights before"):
                await prove(client, moved)

        ask(server, run)


def test_the_command_shows_no_key_and_opens_every_route_that_is_used(
    versions: list[PublishedWeights],
) -> None:
    rollout = RolloutSection(
        engine="vllm",
        python="/env/bin/python",
        model=str(versions[0].directory),
        cache_gib=2.6,
        server_options=("--max-model-len=64",),
    )
    command = vllm_command(rollout, Place(8123, "the-key", Path("/nowhere")))
    assert "the-key" not in " ".join(command.arguments) + str(command.variables)
    assert command.secrets == {"VLLM_API_KEY": "the-key"}
    assert command.arguments[-1] == "--max-model-len=64"
    assert {"--enable-scale-out", "--enable-prompt-tokens-details"} <= set(command.arguments)
    assert command.variables["VLLM_SERVER_DEV_MODE"] == "1"
    assert command.variables["VLLM_CPU_KVCACHE_SPACE"] == "3"


def test_fp8_without_a_gpu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')
    rollout = RolloutSection(engine="vllm", python="/env/bin/python", model=str(tmp_path))
    with pytest.raises(ConfigError, match="is FP8, which vLLM does not compute on a CPU"):
        vllm_command(rollout, Place(8123, "k", tmp_path))


def test_the_middleware_asks_for_the_key_on_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "k")
    reached: list[str] = []

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        reached.append(scope["path"])

    async def call(path: str, key: bytes, kind: str = "http") -> list[Any]:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": kind, "path": path, "headers": [(b"authorization", key)]}
        await RequireKey(app)(scope, send, send)
        return sent

    for path in ("/collective_rpc", "/health", "/metrics", "/v1/models"):
        assert asyncio.run(call(path, b"Bearer other"))[0]["status"] == 401
    assert asyncio.run(call("/v1/realtime", b"Bearer k", "websocket"))[0]["code"] == 1008
    assert reached == []
    asyncio.run(call("/collective_rpc", b"Bearer k"))
    asyncio.run(call("startup", b"", "lifespan"))
    assert reached == ["/collective_rpc", "startup"]
