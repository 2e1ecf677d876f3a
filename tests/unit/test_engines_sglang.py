"""SGLang's client: its routes and values, and checksums as SGLang's own kernels compute them."""

import asyncio
import json
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import engine_servers
import numpy as np
import pytest
import torch
from engine_servers import FakeServer, Status, scripted_response
from safetensors.torch import load_file

from infir2.config.schema import RolloutSection, ShapeSection
from infir2.engines.remote import (
    BadAnswerError,
    EngineError,
    PublishedWeights,
    WeightProbe,
    WeightsDifferError,
)
from infir2.engines.server_process import Place
from infir2.engines.sglang import ROUTES, SglangClient, sglang_command
from infir2.engines.sglang_checksum import checksums, tensor_hash
from infir2.engines.types import Completion, Request, SamplingParams
from infir2.errors import ConfigError
from infir2.model import Decoder
from infir2.model.hf_names import exported_fp8_weights
from infir2.model.safetensors_io import write_hf
from infir2.numerics import convert_to_fp8

PARAMS = SamplingParams(temperature=0.7, max_tokens=5, stop_ids=(96,), top_p=0.9)
REQUEST = Request("0/p/1", [3, 5, 8], PARAMS, key=1)


class FakeSglang(FakeServer):
    """The routes of SGLang 0.5.12, as its http_server.py defines them."""

    generate_route = "/generate"
    aborts = False
    paths = ROUTES
    checksums: Any = None
    refusal = ""
    ignores_temperature = False
    cached_tokens = 0
    prompt_logprob = -2.0

    def read_request(self, body: Any) -> tuple[list[int], int, list[int]]:
        params = body["sampling_params"]
        return body["input_ids"], params["max_new_tokens"], params.get("stop_token_ids", [])

    def format_answer(
        self, body: Any, token_ids: list[int], logprobs: list[float], policy_version: int
    ) -> Any:
        if body["sampling_params"]["temperature"] == 0.02 and not self.ignores_temperature:
            logprobs = [-0.001] * len(logprobs)
        pairs = [[p, token, None] for p, token in zip(logprobs, token_ids, strict=False)]
        prompt = [[self.prompt_logprob, token, None] for token in body["input_ids"]]
        reason = {"type": "abort" if self.aborts else "length", "length": len(token_ids)}
        meta = {"weight_version": str(policy_version), "finish_reason": reason}
        meta |= {"cached_tokens": self.cached_tokens, "input_token_logprobs": prompt}
        return {"output_ids": token_ids, "meta_info": meta | {"output_token_logprobs": pairs}}

    def encode_answer(self, body: Any, fault: str) -> bytes:
        """A batch is a stream: of each request its first token, then, in reverse order, its end."""
        if not body.get("stream"):
            return super().encode_answer(body, fault)
        names = ("rid", "input_ids", "sampling_params")
        events = []
        for values in zip(*(body[name] for name in names), strict=True):
            one = dict(zip(names, values, strict=True))
            answer = self.answer_request(one, fault)
            answer["meta_info"]["id"] = one["rid"]
            first = {"output_ids": answer["output_ids"][:1]}
            first["meta_info"] = answer["meta_info"] | {"finish_reason": None}
            events = [first, *events, answer]
        text = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
        return f"{text}data: [DONE]\n\n".encode()

    def call(self, route: str, body: Any) -> Any:
        if route == "/openapi.json":
            return {"paths": {path: {} for path in self.paths}}
        if route == "/server_info":
            info = {"version": "0.5.12.post1", "model_path": "/m", "max_req_input_len": 4090}
            return info | {"internal_states": [{"effective_max_running_requests_per_dp": 64}]}
        if route == "/update_weights_from_disk":
            if not self.refusal:
                self.policy_version = int(body["weight_version"])
            return {"success": not self.refusal, "message": self.refusal}
        if route == "/weights_checker":
            ranks = [
                {
                    "checksums": held,
                    "parallelism_info": {"tp_rank": i, "tp_size": len(self.checksums)},
                }
                for i, held in enumerate(self.checksums)
            ]
            return {"success": True, "message": "", "ranks": ranks}
        if route in ("/health_generate", "/abort_request", "/flush_cache"):
            return {}
        raise Status(404)


ask = partial(engine_servers.ask, SglangClient)


def generate(server: FakeServer, policy_version: int = 0) -> Completion:
    completion: Completion = ask(server, lambda client: client.generate(REQUEST, policy_version))
    return completion


def test_a_request_names_everything_that_changes_the_distribution() -> None:
    with FakeSglang() as server:
        completion = generate(server)
    assert completion.token_ids == scripted_response([3, 5, 8], 5, [96])[0]
    assert completion.rollout_logprobs.tolist() == scripted_response([3, 5, 8], 5, [96])[1]
    body = server.calls[-1][1]
    assert body["rid"][0].startswith("0/p/1#")
    assert body["return_logprob"] is True
    assert body["sampling_params"][0] | {"stream_interval": 0} == {
        **{"temperature": 0.7, "top_p": 0.9, "top_k": -1, "min_p": 0.0, "max_new_tokens": 5},
        **{"stop_token_ids": [96], "frequency_penalty": 0.0, "presence_penalty": 0.0},
        **{"repetition_penalty": 1.0, "ignore_eos": False, "stream_interval": 0},
    }


@pytest.mark.parametrize("faults", [[], ["500"]])
def test_requests_that_come_together_share_a_connection(faults: list[str]) -> None:
    """A batch that is refused is sent one by one: only the request to blame fails."""
    requests = [Request(f"r{n}", [n, 7], PARAMS, key=n) for n in range(40)]

    async def all_of(client: SglangClient) -> list[Completion]:
        return await asyncio.gather(*(client.generate(each, 0) for each in requests))

    with FakeSglang(faults) as server:
        completions = ask(server, all_of)
        calls = len(server.calls)
    assert [each.id for each in completions] == [each.id for each in requests]
    for request, completion in zip(requests, completions, strict=True):
        assert completion.token_ids == scripted_response(list(request.token_ids), 5, [96])[0]
    assert calls in ([2] if not faults else [2 + 32, 2 + 8])


@pytest.mark.parametrize(
    ("fault", "reason"),
    engine_servers.BAD_ANSWERS,
)
def test_bad_answers(fault: str, reason: str) -> None:
    with FakeSglang([fault]) as server, pytest.raises(EngineError) as caught:
        generate(server)
    assert caught.value.reason == reason


def test_an_aborted_request_is_no_response() -> None:
    with FakeSglang() as server:
        server.aborts = True
        with pytest.raises(BadAnswerError) as caught:
            generate(server)
    assert caught.value.reason == "aborted"


def test_cancel_ends_the_request_under_the_id_that_the_server_knows() -> None:
    async def start_and_cancel(client: SglangClient) -> None:
        task = asyncio.create_task(client.generate(REQUEST, 0))
        while not server.calls:
            await asyncio.sleep(0.01)
        task.cancel()
        await client.cancel(["0/p/1", "unknown"])

    with FakeSglang(["hang"]) as server:
        ask(server, start_and_cancel)
    started = server.calls[0][1]["rid"][0]
    assert [body for route, body in server.calls if route == "/abort_request"] == [{"rid": started}]


def test_what_the_server_is() -> None:
    with FakeSglang() as server:
        info = ask(server, lambda client: client.info())
        assert (info.release, info.max_positions, info.max_running_requests) == (
            "sglang 0.5.12.post1",
            4094,
            64,
        )
        server.paths = ROUTES - {"/weights_checker"}
        with pytest.raises(ConfigError, match="has no route /weights_checker; install"):
            ask(server, lambda client: client.info())


def test_log_probabilities_before_the_temperature_are_refused() -> None:
    with FakeSglang() as server:
        server.ignores_temperature = True
        with pytest.raises(ConfigError, match="SGLANG_RETURN_ORIGINAL_LOGPROB"):
            ask(server, lambda client: client.info())


def test_a_probe_finds_an_old_cache_and_other_weights(exported: PublishedWeights) -> None:
    probe = WeightProbe([4, 5, 6], np.array([-2.1, -1.9], dtype=np.float32))
    weights = replace(exported, probe=probe)
    with FakeSglang() as server:
        server.checksums = [dict(checksums(exported, 0, 1))]
        ask(server, lambda client: client.prove_weights(weights))
        server.cached_tokens = 2
        with pytest.raises(WeightsDifferError, match="cache still has 2 old tokens"):
            ask(server, lambda client: client.prove_weights(weights))
        server.cached_tokens, server.prompt_logprob = 0, -4.0
        with pytest.raises(WeightsDifferError, match="differ by 2 on average"):
            ask(server, lambda client: client.prove_weights(weights))


def test_the_command_line_has_no_key(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 4096}')
    rollout = RolloutSection(
        **{"model": str(tmp_path), "engine": "sglang", "python": "/env/bin/python"},
        **{"memory_fraction": 0.4, "server_options": ("--x", "1"), "kv_cache_dtype": "fp8_e4m3"},
    )
    command = sglang_command(rollout, Place(31000, "s3cret", tmp_path))
    assert "s3cret" not in " ".join(command.arguments)
    assert command.arguments[:3] == ["/env/bin/python", "-m", "sglang.launch_server"]
    assert command.arguments[-2:] == ["--x", "1"]
    assert command.variables["SGLANG_GRPC_PORT"] == "1"  # valid whatever the port is
    pairs = dict(pairwise(command.arguments))
    assert (pairs["--host"], pairs["--port"]) == ("127.0.0.1", "31000")
    assert (pairs["--mem-fraction-static"], pairs["--kv-cache-dtype"]) == ("0.4", "fp8_e4m3")
    options = Path(pairs["--config"])
    assert json.loads(options.read_text()) == {"api-key": "s3cret"}
    assert options.stat().st_mode & 0o077 == 0


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> PublishedWeights:
    """A model whose dimensions SGLang takes, in FP8; the vocabulary is no multiple of 64."""
    shape = ShapeSection(
        hidden_size=256, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=64, ffn_size=384
    )
    model = convert_to_fp8(Decoder.from_shape(shape, 101, seed=3))
    directory = tmp_path_factory.mktemp("exported") / "fp8"
    config = {"num_key_value_heads": 2, "tie_word_embeddings": True}
    write_hf(directory, exported_fp8_weights(model), config)
    return PublishedWeights(directory, 4, 1)


def sglang_parameters(directory: Path) -> dict[str, torch.Tensor]:
    """What SGLang's Qwen2 holds after loading and dequantizing, without parallelism."""
    stored = load_file(directory / "model.safetensors")

    def plain(name: str) -> torch.Tensor:
        if f"{name}_scale_inv" not in stored:
            return stored[name]
        scale = stored[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
        tensor = stored[name].float()
        return (tensor * scale[: tensor.shape[0], : tensor.shape[1]]).bfloat16()

    layer = "model.layers.0."
    parameters = {
        name: plain(name)
        for name in stored
        if not name.endswith("_scale_inv") and ("norm" in name or "o_proj" in name)
    }
    parameters[f"{layer}mlp.down_proj.weight"] = plain(f"{layer}mlp.down_proj.weight")
    for leaf in ("weight", "bias"):
        qkv = [plain(f"{layer}self_attn.{part}_proj.{leaf}") for part in "qkv"]
        parameters[f"{layer}self_attn.qkv_proj.{leaf}"] = torch.cat(qkv)
    gate_up = [plain(f"{layer}mlp.{part}_proj.weight") for part in ("gate", "up")]
    parameters[f"{layer}mlp.gate_up_proj.weight"] = torch.cat(gate_up)
    embedding = plain("model.embed_tokens.weight")
    parameters["model.embed_tokens.weight"] = torch.cat((embedding, embedding.new_zeros(27, 256)))
    return parameters


def test_the_checksums_are_those_of_sglang_s_fused_parameters(exported: PublishedWeights) -> None:
    expected = {n: tensor_hash(t) for n, t in sglang_parameters(exported.directory).items()}
    assert dict(checksums(exported, 0, 1)) == expected


def test_the_hash_is_that_of_sglang_s_kernels() -> None:
    """Values of hash_tiles32_kernel_blocked and add_tree_reduce_u64_kernel of both releases."""
    golden = {3: "9331854fcb107f49", 30_000: "330ad9583a93a387"}
    for count, value in golden.items():
        assert tensor_hash(torch.arange(count).bfloat16()) == value


def test_tensor_parallel_ranks_hold_parts(exported: PublishedWeights) -> None:
    whole = sglang_parameters(exported.directory)
    ranks = [dict(checksums(exported, rank, 2)) for rank in range(2)]
    layer = "model.layers.0."
    for rank in range(2):
        q, k, v = whole[f"{layer}self_attn.qkv_proj.weight"].split((256, 128, 128))
        mine = torch.cat([part.chunk(2)[rank] for part in (q, k, v)])
        assert ranks[rank][f"{layer}self_attn.qkv_proj.weight"] == tensor_hash(mine)
        down = whole[f"{layer}mlp.down_proj.weight"].chunk(2, dim=1)[rank]
        assert ranks[rank][f"{layer}mlp.down_proj.weight"] == tensor_hash(down)
        assert ranks[rank]["model.norm.weight"] == tensor_hash(whole["model.norm.weight"])


def test_an_update_names_its_version_and_is_proved(exported: PublishedWeights) -> None:
    def held() -> dict[str, str]:
        extra = {"model.layers.0.self_attn.attn.k_scale": "0" * 16}
        return dict(checksums(exported, 0, 1)) | extra

    with FakeSglang() as server:
        server.checksums = [held()]
        ask(server, lambda client: client.update_weights(exported))
        ask(server, lambda client: client.prove_weights(exported))
        assert generate(server, policy_version=4).policy_version == 4
        assert server.routes_called()[1:3] == ["/update_weights_from_disk", "/flush_cache"]
        assert server.calls[1][1]["model_path"] == str(exported.directory)
        server.checksums[0]["model.norm.weight"] = "1" * 16
        with pytest.raises(WeightsDifferError, match="norm"):
            ask(server, lambda client: client.prove_weights(exported))
        server.checksums = [held() | {"model.extra.weight": "1" * 16}]
        with pytest.raises(WeightsDifferError, match="extra"):
            ask(server, lambda client: client.prove_weights(exported))
        del server.checksums[0]["model.norm.weight"]
        with pytest.raises(WeightsDifferError):
            ask(server, lambda client: client.prove_weights(exported))


def test_a_refused_update_is_an_error(exported: PublishedWeights) -> None:
    with FakeSglang() as server:
        server.refusal = "no such tensor"
        with pytest.raises(EngineError, match="no such tensor"):
            ask(server, lambda client: client.update_weights(exported))
