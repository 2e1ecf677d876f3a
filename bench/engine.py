"""Tokens/s of the native engine on one GPU, beside transformers' continuous batching.

    python bench/engine.py --out engine.json [--shape 1.5B] [--requests 256] [--peer]

Weights are random: FP8 codes and BF16 for ours, BF16 for `--peer`. Every request has --prompt
random tokens and samples --response tokens at temperature 1, all submitted at once. The first round
compiles and captures, the second is timed. `decode_ms` is the GPU's time of one captured decode
pass over all requests, `host_ms` the host's time of a step without waiting. The floor of a decode
pass is its bytes (weights, head, keys and values) at the bandwidth of a copy, measured here.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from infir2.config.schema import ShapeSection
from infir2.engines.generate import generate
from infir2.engines.native import NativeEngine
from infir2.engines.types import Completion, Request, SamplingParams
from infir2.model import Decoder, ModelConfig
from infir2.numerics import Fp8Linear, convert_to_fp8, token_logprobs

SHAPES: dict[str, dict[str, Any]] = {
    "1.5B": {
        "hidden_size": 1536, "num_layers": 28, "num_heads": 12, "num_kv_heads": 2,
        "ffn_size": 8960, "tie_embeddings": True,
    },
    "7B": {
        "hidden_size": 3584, "num_layers": 28, "num_heads": 28, "num_kv_heads": 4,
        "ffn_size": 18944, "tie_embeddings": False,
    },
}  # fmt: skip
VOCABULARY = 151936


def build(shape: str, fp8: bool, vocabulary: int = VOCABULARY, **changes: Any) -> Decoder:
    """A model with random weights; with FP8, codes without masters, as an engine loads them."""
    config = ModelConfig.from_shape(ShapeSection(**(SHAPES[shape] | changes)), vocabulary)
    with torch.device("meta"):
        model = Decoder(config)
    model.to_empty(device="cuda")
    generator = torch.Generator("cuda").manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    if fp8:
        convert_to_fp8(model)
        for layer in [each for each in model.modules() if isinstance(each, Fp8Linear)]:
            codes = layer.quantized_weight()
            layer.load_codes(codes.codes, codes.scale)
    return model


def requests(arguments: argparse.Namespace) -> list[Request]:
    generator = torch.Generator().manual_seed(2)
    size = (arguments.requests, arguments.prompt)
    prompts = torch.randint(0, VOCABULARY, size, generator=generator).tolist()
    params = SamplingParams(1.0, arguments.response, stop_ids=())
    return [Request(str(i), prompt, params, key=i) for i, prompt in enumerate(prompts)]


def ours(arguments: argparse.Namespace, fp8: bool) -> dict[str, Any]:
    model = build(arguments.shape, fp8)
    engine = NativeEngine(model, arguments.requests, cache_gib=40.0, keep_cache=True)
    seconds, completions = [], list[Completion]()
    for _ in range(arguments.rounds):
        engine._scheduler.forget_weights()  # or the second round would share the first's prompts
        torch.cuda.synchronize()
        start = time.perf_counter()
        completions = list(generate(engine, requests(arguments)))
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    tokens = sum(len(each.token_ids) for each in completions)
    return {
        "first_round_s": seconds[0],
        "seconds": min(seconds[1:]),
        "tokens_per_s": tokens / min(seconds[1:]),
        **step_times(engine, arguments),
        **mismatch(model, completions, requests(arguments)),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "floor_ms": floor_ms(model, arguments, fp8),
    }


def step_times(engine: NativeEngine, arguments: argparse.Namespace) -> dict[str, float]:
    """The GPU's time of the largest decode graph, and the host's time of a step."""
    for request in requests(arguments):
        engine.submit(request)
    for _ in range(arguments.response // 2):
        engine.step()
    torch.cuda.synchronize()
    runner = engine._scheduler._runner
    graphs = getattr(runner, "_graphs", {})
    host = []
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        engine.step()
        host.append(time.perf_counter() - start)
    engine.cancel_all()
    times = []
    if graphs:
        graph = graphs[max(graphs)].graph
        for _ in range(20):
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            graph.replay()
            last.record()
            last.synchronize()
            times.append(first.elapsed_time(last))
        if arguments.profile:
            print(kernel_table(graph))
    return {
        "host_ms": 1e3 * statistics.median(host),
        "decode_ms": statistics.median(times) if times else float("nan"),
    }


def kernel_table(graph: torch.cuda.CUDAGraph) -> str:
    """The kernels of one decode pass: GPU time in microseconds, launches, name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        graph.replay()
        torch.cuda.synchronize()
    rows = sorted(profile.key_averages(), key=lambda each: -each.self_device_time_total)
    return "\n".join(
        f"{each.self_device_time_total:9.0f} {each.count:5d} {each.key[:100]}" for each in rows[:30]
    )


@torch.no_grad()
def mismatch(
    model: Decoder, completions: list[Completion], asked: list[Request]
) -> dict[str, float]:
    """Sampled log-probabilities against one packed forward pass of the same model."""
    prompts = {request.id: list(request.token_ids) for request in asked}
    differences = []
    for each in completions:
        stream = torch.tensor([*prompts[each.id], *each.token_ids], device="cuda")
        count, first = len(stream) - 1, len(prompts[each.id])
        hidden = model.hidden_states(
            stream[:-1], torch.arange(count, device="cuda"), torch.tensor([0, count])
        )
        expected, _ = token_logprobs(hidden[first - 1 :], model.head_weight, stream[first:])
        differences.append(torch.from_numpy(each.rollout_logprobs).cuda() - expected)
    joined = torch.cat(differences)
    return {
        "logprob_mean_abs": float(joined.abs().mean()),
        "logprob_max_abs": float(joined.abs().max()),
        "bit_equal": float((joined == 0).float().mean()),
    }


def floor_ms(model: Decoder, arguments: argparse.Namespace, fp8: bool) -> float:
    """A decode pass's bytes at the bandwidth of a copy: mean length of the cache."""
    config = model.config
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    weights = config.num_layers * config.hidden_size * (heads + 3 * config.ffn_size)
    weights *= 1 if fp8 else 2
    head = 2 * config.vocab_size * config.hidden_size
    token = 4 * config.num_layers * config.num_kv_heads * config.head_dim
    cache = arguments.requests * (arguments.prompt + arguments.response / 2) * token
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target, times = torch.empty_like(source), []
    for _ in range(5):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        target.copy_(source)
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last))
    bandwidth = 2 * source.numel() / (min(times) * 1e-3)
    return 1e3 * (weights + head + cache) / bandwidth


def peer(arguments: argparse.Namespace) -> dict[str, Any]:
    """transformers' continuous batching of the same shape in BF16."""
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    shape = SHAPES[arguments.shape]
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=shape["hidden_size"],
        intermediate_size=shape["ffn_size"], num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"], num_key_value_heads=shape["num_kv_heads"],
        tie_word_embeddings=shape["tie_embeddings"],
    )  # fmt: skip
    with torch.device("cuda"):
        model: Any = Qwen2ForCausalLM(config)
    model.to(dtype=torch.bfloat16).eval()
    model.set_attn_implementation(arguments.peer_attention)
    generation = GenerationConfig(
        max_new_tokens=arguments.response, do_sample=True, temperature=1.0, top_k=0,
        eos_token_id=-1, pad_token_id=0,
    )  # fmt: skip
    inputs = [list(request.token_ids) for request in requests(arguments)]
    seconds, tokens = [], 0
    for _ in range(2):
        start = time.perf_counter()
        outputs = model.generate_batch(inputs=inputs, generation_config=generation)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        tokens = sum(len(each.generated_tokens) for each in outputs.values())
    return {"seconds": seconds[-1], "tokens": tokens, "tokens_per_s": tokens / seconds[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", default="1.5B", choices=SHAPES)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--response", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--peer-attention", default="paged|sdpa")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"arguments": {k: str(v) for k, v in vars(arguments).items()}}
    for name, fp8 in (("fp8", True), ("bf16", False)):
        results[name] = ours(arguments, fp8)
        print(name, json.dumps(results[name]), flush=True)
        arguments.out.write_text(json.dumps(results, indent=1))
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if arguments.peer:
        results["transformers"] = peer(arguments)
        print("transformers", json.dumps(results["transformers"]), flush=True)
    arguments.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
