"""A full training step on one GPU: our FP8 against our BF16 and against public stacks.

    python bench/step.py --out step.json [--cases 1.5B-8k,7B-8k,...] [--profile] [--peer]

Weights are random, shapes are the models' own. Our FP8 and BF16 run the same code: fused norm,
SwiGLU, RoPE, head and residual gradients, the same attention, FP32 masters, gradients and AdamW
moments. Only the operands of the Linears differ. Times are medians of CUDA events over full steps;
`activations` is the memory that the forward leaves allocated.

TFLOP/s counts 6 x parameters x tokens (all parameters except the input embedding) plus causal
attention (half the square) of forward and backward; recomputation is not counted. `--peer` runs
Hugging Face's model with Liger's kernels and cuDNN attention, BF16 weights and moments, in a
separate process.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from step_cases import (
    CASES,
    SHAPES,
    SMALL_OPTIMIZER,
    Case,
    flops,
)

from infir2.config.schema import (
    ShapeSection,
)
from infir2.model import Decoder, ModelConfig
from infir2.numerics import Fp8Linear, SavedActivations, convert_to_fp8, invalidate, token_logprobs
from infir2.numerics import gemm_scaled as gemm_backends
from infir2.preflight.gpu_memory import gpu_ledger
from infir2.train.optimizer import make_optimizer, update


def build(case: Case, device: str = "cuda") -> Decoder:
    """The case's model with random weights."""
    shape = ShapeSection(**{**SHAPES[case.model], "num_layers": case.layers})
    with torch.device("meta"):
        model = Decoder(ModelConfig.from_shape(shape, shape.vocab_size))
    model.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.02)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    recipe = case.recipe()
    cached = not case.fp8 or recipe.fp8.caches_transposed(recipe.model)
    model.saved_activations = replace(case.saved, keep_transposed_weights=cached)
    model.recompute = case.recompute
    return convert_to_fp8(model, case.scale_format) if case.fp8 else model


class Step:
    """A model with random weights, an optimizer, and the parts of one step."""

    def __init__(self, case: Case, device: str = "cuda") -> None:
        self.case, recipe = case, case.recipe()
        self.model = build(case, device)
        self.optimizer = make_optimizer(self.model, recipe.optimizer) if case.optimizer else None
        self.ids = torch.randint(0, SHAPES[case.model]["vocab_size"], (case.tokens,), device=device)
        self.positions = torch.arange(case.length, device=device).repeat(case.sequences)
        self.bounds = torch.arange(0, case.tokens + 1, case.length)
        self.activations = 0

    def use_graphs(self) -> None:
        """Run the blocks as CUDA graphs from the third step on."""
        self.model.use_block_graphs(self.case.tokens)

    def forward(self, measure_activations: bool = False) -> torch.Tensor:
        if measure_activations:  # quantize the weights before, so they do not count
            self._prepare_weights()
            before = torch.cuda.memory_allocated()
        graphs = self.model.block_graphs
        with graphs.active() if graphs else nullcontext():
            hidden = self.model.hidden_states(self.ids, self.positions, self.bounds)
        if measure_activations:
            self.activations = torch.cuda.memory_allocated() - before
        chunk = self.case.loss_chunk_tokens
        logprobs, _ = token_logprobs(
            hidden,
            self.model.head_weight,
            self.ids.roll(-1),
            chunk_tokens=chunk,
            uniform_gradient=True,
        )
        return -logprobs.mean()

    def update(self, learning_rate: float = 0.0) -> None:
        parameters = list(self.model.parameters())
        if self.optimizer is not None:
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            update(
                self.optimizer, gradients, learning_rate, torch.clamp(1.0 / (norm + 1e-6), max=1.0)
            )
        torch.autograd.graph.increment_version(parameters)
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Free the gradients without changing the weights, so their FP8 codes stay valid."""
        for parameter in self.model.parameters():
            parameter.grad = None

    def quantize(self) -> None:
        """Quantize every weight in both layouts, as the first micro-batch after an update does."""
        for layer in self.model.modules():
            if isinstance(layer, Fp8Linear):
                invalidate(layer.weight)
        self._prepare_weights()

    def _prepare_weights(self) -> None:
        from infir2.numerics.stacked_weights import stack

        block: Any
        for block in self.model.model.layers:
            attention, mlp = block.self_attn, block.mlp
            for layers in (
                (attention.q_proj, attention.k_proj, attention.v_proj),
                (attention.o_proj,),
                (mlp.gate_proj, mlp.up_proj),
                (mlp.down_proj,),
            ):
                stacked = stack(layers)
                assert stacked is not None
                stacked.operand()
                stacked.operand_t(self.model.saved_activations.keep_transposed_weights)


def measure(case: Case, steps: int) -> dict[str, float]:
    """Medians over `steps` steps: milliseconds, GiB, TFLOP/s.

    `forward` and `backward` time the first micro-batch after an update, which prepares the operands
    of all weights (codes, or BF16 copies). `further` times forward + backward of a later
    micro-batch, whose operands are ready.
    """
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step = Step(case)
    marks: list[list[torch.cuda.Event]] = []
    for index in range(steps + 3):
        if index == 2:
            torch.cuda.reset_peak_memory_stats()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
        events[0].record()
        loss = step.forward(measure_activations=index == 1)
        events[1].record()
        loss.backward()
        events[2].record()
        del loss
        step.update()
        events[3].record()
        marks.append(events)
    torch.cuda.synchronize()
    spans = [[a.elapsed_time(b) for a, b in itertools.pairwise(events)] for events in marks[3:]]
    forward, backward, update = (statistics.median(span[i] for span in spans) for i in range(3))
    result = {
        "forward": forward,
        "backward": backward,
        "update": update,
        "total": statistics.median(sum(span) for span in spans),
    }
    result |= {
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "activations_gib": step.activations / 2**30,
    }
    result |= {
        "further": _further_milliseconds(step, steps),
        "further_peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }
    if case.optimizer:  # the ledger counts an optimizer
        ledger = gpu_ledger(step.model.config, case.recipe())
        result |= {
            "ledger_gib": sum(ledger.values()) / 2**30,
            **{f"ledger {name}": size / 2**30 for name, size in ledger.items()},
        }
    result |= {
        "further_tflops": flops(case) / result["further"] / 1e9,
        "tflops": flops(case) / (forward + backward) / 1e9,
    }
    result |= {"tokens_per_second": case.tokens / result["total"] * 1e3}
    if case.fp8:
        torch.cuda.synchronize()
        start = time.perf_counter()
        step.quantize()
        torch.cuda.synchronize()
        result["weights_quantized"] = (time.perf_counter() - start) * 1e3
    return result


def _further_milliseconds(step: Step, count: int) -> float:
    """Median milliseconds of forward + backward with prepared weights."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step.forward().backward()
        step.drop_gradients()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))


def train_7b(text: Path, steps: int) -> dict[str, Any]:
    """Train all parameters of 7B on one GPU, 8,192 bytes of text per step, one token per byte.

    FP32 masters, clipping, 8-bit moments, BF16 gradients, full recomputation, and FP8 weights in
    one layout. Returns losses, median seconds per step and the peak.
    """
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step = Step(
        Case(
            "7B",
            1,
            8192,
            True,
            SavedActivations(keep_transposed_weights=False),
            recompute="full",
            **SMALL_OPTIMIZER,
        )
    )
    assert step.optimizer is not None
    data = torch.frombuffer(bytearray(text.read_bytes()), dtype=torch.uint8).long()
    losses, times = [], []
    for index in range(steps):
        step.ids = data[index * 8192 : (index + 1) * 8192].cuda()
        start = time.perf_counter()
        loss = step.forward()
        loss.backward()
        step.update(1e-4 * min(1.0, (index + 1) / 5))
        losses.append(loss.item())
        times.append(time.perf_counter() - start)
    ledger = sum(gpu_ledger(step.model.config, step.case.recipe()).values()) / 2**30
    peak = torch.cuda.max_memory_allocated() / 2**30
    return {
        "losses": losses,
        "seconds_per_step": statistics.median(times[2:]),
        "peak_gib": peak,
        "ledger_gib": ledger,
    }


def profile(case: Case) -> list[tuple[str, float, int]]:
    """The kernels of one forward and backward: (name, milliseconds, calls), the longest first."""
    step = Step(case)
    for _ in range(2):
        step.forward().backward()
        step.update()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        step.forward().backward()
        torch.cuda.synchronize()
    rows = [(e.key[:90], e.self_device_time_total / 1e3, e.count) for e in trace.key_averages()]
    return sorted(rows, key=lambda row: -row[1])[:34]


PEER = """
import json, statistics, sys, torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Qwen2Config, Qwen2ForCausalLM
from liger_kernel.transformers import apply_liger_kernel_to_qwen2
apply_liger_kernel_to_qwen2()
s = json.loads(sys.argv[1])
config = Qwen2Config(
    hidden_size=s["hidden_size"],
    num_hidden_layers=s["num_layers"],
    num_attention_heads=s["num_heads"],
    num_key_value_heads=s["num_kv_heads"],
    intermediate_size=s["ffn_size"],
    vocab_size=s["vocab_size"],
    tie_word_embeddings=s["tie_embeddings"],
    attn_implementation="sdpa",
    use_cache=False,
)
torch.set_default_dtype(torch.bfloat16)
with torch.device("cuda"):
    model = Qwen2ForCausalLM(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
ids = torch.randint(0, s["vocab_size"], (s["sequences"], s["length"]), device="cuda")
totals = []
for index in range(8):
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        model(input_ids=ids, labels=ids).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    events[1].record()
    totals.append(events)
torch.cuda.synchronize()
total = statistics.median(a.elapsed_time(b) for a, b in totals[3:])
print(json.dumps({"total": total, "peak_gib": torch.cuda.max_memory_allocated() / 2**30}))
"""


def peer(model: str, sequences: int, length: int) -> dict[str, Any]:
    """Time Hugging Face with Liger's kernels on the same shape."""
    arguments = json.dumps({**SHAPES[model], "sequences": sequences, "length": length})
    done = subprocess.run(
        [sys.executable, "-c", PEER, arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return {"error": done.stderr[-600:]}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Print each row when it is measured and write the raw numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the raw numbers")
    parser.add_argument("--cases", default="1.5B-8k,1.5B-32k,7B-8k", help=f"of {', '.join(CASES)}")
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument(
        "--profile",
        default="",
        metavar="CASES",
        help="also list the kernels of one forward and backward of these cases",
    )
    parser.add_argument(
        "--train-7b",
        type=Path,
        metavar="TEXT",
        help="also train all parameters of 7B on this text for 20 steps",
    )
    parser.add_argument("--peer", action="store_true", help="also time Hugging Face with Liger")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "command": sys.argv,
    }
    report["deepgemm"] = gemm_backends.deep_gemm() is not None
    if arguments.peer:
        report["peer"] = peer("1.5B", 2, 8192)
        print("Hugging Face + Liger, 1.5B-8k:", report["peer"], flush=True)
    for name in filter(None, arguments.cases.split(",")):
        for label, case in CASES[name].items():
            try:
                report[f"{name} {label}"] = row = measure(case, arguments.steps)
            except torch.OutOfMemoryError as error:
                report[f"{name} {label}"] = {"error": str(error)[:200]}
                print(f"{name} {label}: out of memory", flush=True)
                continue
            print(
                f"{name} {label:42s}",
                {k: round(v, 2) for k, v in row.items() if not k.startswith("ledger ")},
                flush=True,
            )
            arguments.out.write_text(json.dumps(report, indent=1), encoding="utf-8")
    if arguments.train_7b:
        report["7B, all parameters"] = row = train_7b(arguments.train_7b, 20)
        print("7B, all parameters on one GPU:", row, flush=True)
    for name, label in itertools.product(
        filter(None, arguments.profile.split(",")), ("FP8", "BF16")
    ):
        report[f"profile {name} {label}"] = rows = profile(CASES[name][label])
        print(
            name,
            label,
            *(f"{ms:8.2f} ms {count:4d} {key}" for key, ms, count in rows),
            sep="\n",
            flush=True,
        )
    arguments.out.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
