"""SGLang's own HTTP server and tokenizer manager on a CPU, with a scripted scheduler behind them.

Runs in SGLang's environment with the arguments of `sglang.launch_server`. Route names, field names,
request models, keys and the form of answers are SGLang's; so are the checksums of weights, whose
Triton kernels run in the interpreter. Only what the GPU would compute is scripted: a response
follows from the prompt (`scripted_response` of tests/engine_servers.py).
"""

import dataclasses
import signal
import sys
import time
import types
from functools import partial
from pathlib import Path
from typing import Any

import stand_ins

stand_ins.install()

import torch  # noqa: E402
import zmq  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from sglang.srt.layers import multimodal  # noqa: E402
from sglang.srt.managers import io_struct  # noqa: E402
from sglang.srt.utils import weight_checker  # noqa: E402

FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
FUSED |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
ORDER = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
SECONDS_PER_TOKEN = 0.02
# Messages that ModelRunner answers: its method, and the message's fields that are its arguments.
RUNNER_METHODS = {
    "InitWeightsUpdateGroupReqInput": (
        "init_weights_update_group",
        ("master_address", "master_port", "rank_offset", "world_size", "group_name", "backend"),
    ),
    "DestroyWeightsUpdateGroupReqInput": ("destroy_weights_update_group", ("group_name",)),
    "UpdateWeightsFromDistributedReqInput": (
        "update_weights_from_distributed",
        ("names", "dtypes", "shapes", "group_name", "load_format"),
    ),
}
torch.cuda.synchronize = lambda *_: None
# Its asserts of a GPU are off (-O). Larger blocks give the same hash in fewer interpreted steps.
weight_checker.tensor_hash = partial(multimodal.gpu_tensor_hash, block_words=8192, reduce_chunk=16)


class ScriptedScheduler:
    """Answers what SGLang's tokenizer manager sends.

    A reload of a directory named "stale" does nothing, as a server that skipped it.
    """

    def __init__(self, ports: Any, model: str) -> None:
        context = zmq.Context()
        self._receive = context.socket(zmq.PULL)
        self._receive.connect(ports.scheduler_input_ipc_name)
        self._send = context.socket(zmq.PUSH)
        self._send.connect(ports.tokenizer_ipc_name)
        self._running: dict[str, tuple[Any, float]] = {}
        self._num_sent: dict[str, int] = {}  # tokens of those that stream
        self._cached: set[tuple[int, ...]] = set()
        self._tensors = read(Path(model))
        self._weights = fuse(self._tensors)
        self._runner: Any = None
        self._freed: list[str] = []

    def run(self) -> None:
        while True:
            if self._receive.poll(10):
                self._handle(self._receive.recv_pyobj())
            for rid, (request, begun) in list(self._running.items()):
                self._advance(rid, request, time.monotonic() - begun)

    def _handle(self, message: Any) -> None:
        kind = type(message).__name__
        self._move_memory(kind, message)
        if kind == "TokenizedGenerateReqInput":
            assert not self._freed, "a request while the memory is given up"
            self._running[message.rid] = message, time.monotonic()
        elif kind == "BatchTokenizedGenerateReqInput":
            for request in message:
                self._handle(request)
        elif kind == "AbortReq":
            for rid in [r for r in self._running if message.abort_all or r.startswith(message.rid)]:
                request = self._running.pop(rid)[0]
                reason = {"type": "abort", "message": "Abort in waiting queue"}
                self._answer(request, [], reason, self._num_sent.pop(rid, 0))
        elif kind == "UpdateWeightFromDiskReqInput":
            self._send.send_pyobj(self._update(message))
        elif kind == "CheckWeightsReqInput":
            payload = checker(self._weights).handle(message.action)
            self._send.send_pyobj(io_struct.CheckWeightsReqOutput(True, "Success.", payload))
        elif kind in RUNNER_METHODS:
            self._send.send_pyobj(self._run_for_broadcast(message, *RUNNER_METHODS[kind]))
        elif kind == "FlushCacheReqInput":
            self._cached.clear()
            self._send.send_pyobj(io_struct.FlushCacheReqOutput(success=not self._running))
        elif kind == "GetInternalStateReq":
            state = {"effective_max_running_requests_per_dp": 7, "running": len(self._running)}
            self._send.send_pyobj(io_struct.GetInternalStateReqOutput(internal_state=state))

    def _update(self, message: Any) -> Any:
        try:
            if Path(message.model_path).name != "stale":
                self._tensors = read(Path(message.model_path))
                self._weights = fuse(self._tensors)
        except Exception as error:
            return io_struct.UpdateWeightFromDiskReqOutput(False, f"Failed: {error}")
        return io_struct.UpdateWeightFromDiskReqOutput(True, "Succeeded to update model weights.")

    def _move_memory(self, kind: str, message: Any) -> None:
        if kind == "ReleaseMemoryOccupationReqInput":
            self._freed += message.tags
            self._send.send_pyobj(io_struct.ReleaseMemoryOccupationReqOutput())
        elif kind == "ResumeMemoryOccupationReqInput":
            for tag in message.tags:
                self._freed.remove(tag)  # ends this process if it was never given up, as SGLang
            self._send.send_pyobj(io_struct.ResumeMemoryOccupationReqOutput())

    def _run_for_broadcast(self, message: Any, method: str, names: tuple[str, ...]) -> Any:
        """What SGLang's own ModelRunner does with a group and with what it receives."""
        from sglang.srt.model_executor.model_runner import ModelRunner

        if self._runner is None:
            self._runner = types.SimpleNamespace(
                tp_rank=0, device="cpu", _model_update_group={}, model=self
            )
            bucketed = "_update_bucketed_weights_from_distributed"
            setattr(self._runner, bucketed, partial(getattr(ModelRunner, bucketed), self._runner))
        arguments = {name: getattr(message, name) for name in names}
        success, text = getattr(ModelRunner, method)(self._runner, **arguments)
        if success and getattr(message, "flush_cache", False):
            self._cached.clear()
        return getattr(io_struct, type(message).__name__.replace("Input", "Output"))(success, text)

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        """As the model's."""
        self._tensors |= {name: tensor.clone() for name, tensor in weights}
        self._weights = fuse(self._tensors)

    def _advance(self, rid: str, request: Any, seconds: float) -> None:
        params = request.sampling_params
        tokens = response(list(request.input_ids), params)
        done, sent = int(seconds / SECONDS_PER_TOKEN), self._num_sent.get(rid, 0)
        if done < len(tokens):
            if request.stream and done - sent >= (params.stream_interval or 1):
                self._num_sent[rid] = done
                self._answer(request, tokens[sent:done], None, sent)
            return
        del self._running[rid]
        self._num_sent.pop(rid, None)
        stopped = tokens[-1] in (params.stop_token_ids or ())
        reason = {"type": "stop", "matched": tokens[-1]}
        reason = reason if stopped else {"type": "length", "length": len(tokens)}
        self._answer(request, tokens[sent:], reason, sent)

    def _answer(
        self, request: Any, tokens: list[int], reason: dict[str, Any] | None, sent: int
    ) -> None:
        """The tokens after the `sent` that it has answered before."""
        prompt, num_top = tuple(request.input_ids), request.top_logprobs_num
        # SGLang turns temperature 0 into top_k 1 at temperature 1.
        scale = min(1.0, request.sampling_params.temperature)
        values = {
            "rids": [request.rid],
            "finished_reasons": [reason],
            "output_ids": [tokens],
            "decode_ids": [tokens],
            "decoded_texts": [""],
            "prompt_tokens": [len(prompt)],
            "completion_tokens": [sent + len(tokens)],
            "cached_tokens": [len(prompt) - 1 if prompt in self._cached else 0],
            "output_token_logprobs_val": [[logprob(token) * scale for token in tokens]],
            "output_token_logprobs_idx": [tokens],
            "output_top_logprobs_val": [[[logprob(n) for n in range(num_top)] for _ in tokens]],
            "output_top_logprobs_idx": [[list(range(num_top)) for _ in tokens]],
        }
        if request.return_logprob and request.logprob_start_len == 0:
            values["input_token_logprobs_val"] = [[None, *map(logprob, prompt[1:])]]
            values["input_token_logprobs_idx"] = [list(prompt)]
        self._cached.add(prompt)
        self._send.send_pyobj(io_struct.BatchTokenIDOutput(**(unused_fields() | values)))


def unused_fields() -> dict[str, Any]:
    """A value for every field of an answer that has no default."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(io_struct.BatchTokenIDOutput):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            is_list = "logprobs" in field.name or "entropy" in field.name
            values[field.name] = [[]] if is_list else [0]
    nothing = ("output_hidden_states", "routed_experts", "indexer_topk")
    return values | {name: None for name in nothing if name in values}


def logprob(token: int) -> float:
    return -0.25 - token / 128


def response(prompt: list[int], params: Any) -> list[int]:
    stops = set(params.stop_token_ids or ())
    tokens: list[int] = []
    while len(tokens) < params.max_new_tokens and not (tokens and tokens[-1] in stops):
        tokens.append((sum(prompt) * 31 + 7 * len(tokens)) % 97)
    return tokens


def read(directory: Path) -> dict[str, torch.Tensor]:
    """The tensors of a directory by name."""
    paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"{directory} has no weights")
    return {name: tensor for path in paths for name, tensor in load_file(path).items()}


def fuse(tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The weights with SGLang's names: q, k, v and gate, up are one parameter each."""
    parts: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for name, tensor in tensors.items():
        *prefix, layer, leaf = name.split(".")
        place = ORDER.index(layer) if layer in ORDER else 0
        fused = ".".join((*prefix, FUSED.get(layer, layer), leaf))
        parts.setdefault(fused, []).append((place, tensor))
    model = torch.nn.Module()
    for name, found in parts.items():
        tensor = torch.cat([t for _, t in sorted(found, key=lambda pair: pair[0])])
        if name.startswith("model.embed_tokens"):
            tensor = torch.nn.functional.pad(tensor, (0, 0, 0, -len(tensor) % 64))
        add(model, name.split("."), tensor)
    return model


def add(module: torch.nn.Module, path: list[str], tensor: torch.Tensor) -> None:
    for name in path[:-1]:
        if name not in dict(module.named_children()):
            module.add_module(name, torch.nn.Module())
        module = module.get_submodule(name)
    module.register_parameter(path[-1], torch.nn.Parameter(tensor, requires_grad=False))


def checker(model: torch.nn.Module) -> Any:
    ranks = {"tp_rank": 0, "tp_size": 1, "dp_rank": 0, "dp_size": 1, "pp_rank": 0, "pp_size": 1}
    return weight_checker.WeightChecker(types.SimpleNamespace(model=model, **ranks))


def run_scheduler(server_args: Any, port_args: Any, *rest: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    scheduler = ScriptedScheduler(port_args, server_args.model_path)
    length = server_args.context_length or 256
    info = {"status": "ready", "max_total_num_tokens": 65536, "max_req_input_len": length - 6}
    rest[-1].send(info)
    scheduler.run()


def main() -> None:
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.server_args import prepare_server_args

    launch_server(prepare_server_args(sys.argv[1:]), run_scheduler_process_func=run_scheduler)


if __name__ == "__main__":
    main()
