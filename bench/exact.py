"""Whether a sampled token has the trainer's bits on a GPU: operation by operation, and as a whole.

    python bench/exact.py --out exact.json [--shape 1.5B | --model EXPORTED_FP8_DIR]

Alone: an operation on many rows, against the same rows in batches of BATCHES. As a whole: requests
of mixed lengths, several samples of a prompt, prefill in chunks and too small a cache (preemption),
and each log-probability against the trainer's forward pass over packed sequences.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from engine import SHAPES, build
from torch import Tensor

from infir2.engines.generate import generate
from infir2.engines.kv_cache import KvCache, NewTokens, pack
from infir2.engines.native import NativeEngine
from infir2.engines.paged_attention_cuda import plan_paged
from infir2.engines.types import Completion, Request, SamplingParams
from infir2.model import Decoder
from infir2.model.attention_cuda import plan_varlen
from infir2.numerics import token_logprobs
from infir2.numerics.formats import ROW_BLOCK, TILE_BLOCK
from infir2.numerics.gemm_reference import fp32_product
from infir2.numerics.gemm_scaled import deep_gemm, gemm_nt
from infir2.numerics.kernels import api as kernels

BATCHES = (1, 2, 7, 8, 17, 31, 64, 65, 100, 128, 192, 256, 384, 1000)
ROWS = 2048


def same_rows(run: Callable[[slice], Tensor]) -> dict[str, float]:
    """Share of rows whose bits are those of one call over all rows, and the largest difference."""
    whole, equal, rows, largest = run(slice(0, ROWS)), 0, 0, 0.0
    for count in BATCHES:
        for start in (0, 128, ROWS - count):
            part, expected = run(slice(start, start + count)), whole[start : start + count]
            equal += int((part == expected).flatten(1).all(1).sum())
            largest = max(largest, float((part.float() - expected.float()).abs().max()))
            rows += count
    return {"equal": equal / rows, "max": largest}


def operations(model: Decoder, scale_format: str) -> dict[str, dict[str, float]]:
    config, device = model.config, "cuda"
    generator = torch.Generator(device).manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator).bfloat16()

    x, gate, up = (normal(ROWS, config.hidden_size), *normal(2, ROWS, config.ffn_size))
    weight = kernels.quantize(normal(config.ffn_size, config.hidden_size), TILE_BLOCK, scale_format)
    norm = torch.ones(config.hidden_size, device=device)
    head = model.head_weight.detach().bfloat16()
    logits = kernels.head_product(x, head)
    inverse, draws = (torch.full((ROWS,), value, device=device) for value in (1.0, 0.5))
    none = torch.empty(0, dtype=torch.int64, device=device)
    tokens, _ = kernels.sample_rows(logits, inverse, draws, none)

    def gemm(backend: str) -> Callable[[slice], Tensor]:
        def run(rows: slice) -> Tensor:
            codes = kernels.quantize(x[rows], ROW_BLOCK, scale_format)
            return gemm_nt(codes.codes, codes.scale, weight.codes, weight.scale, ROW_BLOCK,
                           TILE_BLOCK, backend=backend)  # fmt: skip

        return run

    def sampled(rows: slice) -> Tensor:
        options = inverse[rows], draws[rows], tokens[rows]
        return kernels.sample_rows(logits[rows], *options)[1][:, None]

    def normed(rows: slice) -> Tensor:
        return kernels.rms_norm(x[rows], norm, 1e-6)[0]

    calls: dict[str, Callable[[slice], Tensor]] = {
        "norm": normed,
        "swiglu": lambda rows: kernels.swiglu_product(gate[rows], up[rows]),
        "quantize": lambda r: kernels.quantize(x[r], ROW_BLOCK, scale_format).codes.float(),
        "FP8 GEMM, cuBLAS": gemm("cublas"),
        "head": lambda rows: kernels.head_product(x[rows], head),
        "head, cuBLAS": lambda rows: fp32_product(x[rows], head.t()),
        "log-softmax and sampling": sampled,
    }
    results = {name: same_rows(run) for name, run in calls.items()}
    trainer = kernels.label_logprobs(logits, tokens, 1.0, False)[0]
    results["log-softmax, trainer's"] = _equal(sampled(slice(0, ROWS))[:, 0], trainer)
    if deep_gemm() is not None:
        whole = slice(0, ROWS)
        results["FP8 GEMM, DeepGEMM against cuBLAS"] = _equal(
            gemm("deepgemm")(whole), gemm("cublas")(whole)
        )
    results["attention"] = attention(model, normal)
    return results


def _equal(found: Tensor, expected: Tensor) -> dict[str, float]:
    return {
        "equal": float((found == expected).float().mean()),
        "max": float((found.float() - expected.float()).abs().max()),
    }


def attention(model: Decoder, normal: Callable[..., Tensor]) -> dict[str, float]:
    """One sequence prefilled whole and in chunks, then decoded, against the trainer's pass."""
    config, size, length = model.config, 128, 1100
    cache = KvCache(config, num_pages=16, page_size=size, device="cuda")
    heads, groups = config.num_heads, config.num_kv_heads
    fused = normal(length, heads + 2 * groups, config.head_dim)
    q, k, v = fused.split([heads, groups, groups], dim=1)
    expected = plan_varlen((length,), q.device).attend(q, k, v, 0)
    pages, outputs = [7, 2, 11, 4, 9, 1, 3, 13, 8], []
    for start, end in ((0, 300), (300, 301), (301, 1000), *((i, i + 1) for i in range(1000, 1100))):
        new = [NewTokens([0] * (end - start), start, pages)]
        plan = plan_paged(cache, new, pack(new, size))
        outputs.append(plan.attend(q[start:end], k[start:end], v[start:end], 0))
    return _equal(torch.cat(outputs), expected)


def whole(model: Decoder, arguments: argparse.Namespace) -> dict[str, float]:
    """Sampled log-probabilities against the trainer's, and tokens/s."""
    vocabulary, generator = model.config.vocab_size, torch.Generator().manual_seed(5)
    asked = []
    for i in range(arguments.prompts):
        length = int(torch.randint(16, 700, (1,), generator=generator))
        prompt = torch.randint(0, vocabulary, (length,), generator=generator).tolist()
        for sample in range(4):
            params = SamplingParams(1.0, arguments.response, stop_ids=())
            asked.append(Request(f"{i}-{sample}", prompt, params, key=97 * i + sample))
    engine = NativeEngine(model, 128, cache_gib=arguments.cache_gib)
    start = time.perf_counter()
    done = list(generate(engine, asked))
    seconds = time.perf_counter() - start
    x = torch.cat(differences(model, asked, {each.id: each for each in done})).double()
    return {
        "tokens": len(x),
        "equal": float((x == 0).double().mean()),
        "k3": float((x.exp() - 1 - x).mean()),
        "max": float(x.abs().max()),
        "tokens_per_s": len(x) / seconds,
    }


@torch.no_grad()
def differences(
    model: Decoder, asked: list[Request], done: dict[str, Completion], budget: int = 8192
) -> list[Tensor]:
    """trainer - sampled, over streams of at most `budget` tokens packed as the trainer packs."""
    results: list[Tensor] = []
    streams: list[list[tuple[list[int], Completion]]] = [[]]
    for each in asked:
        row = list(each.token_ids), done[each.id]
        used = sum(len(p) + len(c.token_ids) for p, c in streams[-1])
        if streams[-1] and used + len(row[0]) + len(row[1].token_ids) > budget:
            streams.append([])
        streams[-1].append(row)
    for stream in streams:
        ids = [torch.tensor([*prompt, *c.token_ids]) for prompt, c in stream]
        lengths = torch.tensor([len(each) - 1 for each in ids])
        positions = torch.cat([torch.arange(n) for n in lengths.tolist()]).cuda()
        bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        hidden = model.hidden_states(torch.cat([i[:-1] for i in ids]).cuda(), positions, bounds)
        labels = torch.cat([i[1:] for i in ids]).cuda()
        values, _ = token_logprobs(hidden, model.head_weight, labels)
        for (prompt, completion), part in zip(stream, values.split(lengths.tolist()), strict=True):
            sampled = torch.from_numpy(completion.rollout_logprobs).cuda()
            results.append((part[len(prompt) - 1 :] - sampled).cpu())
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", default="1.5B", choices=SHAPES)
    parser.add_argument("--model", type=Path, help="exported FP8 directory instead of a shape")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--response", type=int, default=256)
    parser.add_argument("--cache-gib", type=float, default=1.5)
    arguments = parser.parse_args()
    if arguments.model:
        model = Decoder.from_hf(arguments.model, compute_dtype=torch.bfloat16).to("cuda")
    else:
        model = build(arguments.shape, fp8=True)
    model.eval().requires_grad_(False)
    results: dict[str, Any] = {"arguments": {k: str(v) for k, v in vars(arguments).items()}}
    results["operations"] = operations(model, "pow2")
    results["whole"] = whole(model, arguments)
    for name, row in (*results["operations"].items(), ("whole", results["whole"])):
        print(f"{name:36s} " + "  ".join(f"{k} {v:.6g}" for k, v in row.items()), flush=True)
    arguments.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
