"""What the examples share and what has nothing to do with FP8: models, text, options, a report."""

import argparse
import statistics
import time
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from infir2 import Fp8Linear

KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "vocab_size")  # fmt: skip
SIZES = {
    "tiny": (128, 256, 2, 2, 1, 256),
    "0.5b": (896, 4864, 24, 14, 2, 151936),
    "1.5b": (1536, 8960, 28, 12, 2, 151936),
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def options(description: str) -> argparse.ArgumentParser:
    """--model, --size, --text, --bf16, --steps, --batch, --length, --lr, --save."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter)
    parser.add_argument("--model", choices=("Qwen2", "Llama"), default="Qwen2")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--text", type=Path, help="file to learn, byte by byte; default: sums")
    parser.add_argument("--bf16", action="store_true", help="the same without FP8, to compare")
    parser.add_argument("--save", type=Path, help="where to write the trained weights")
    for name, value in (("steps", 20), ("batch", 4), ("length", 64), ("lr", 3e-3)):
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"default {value}")
    return parser


def build_model(name: str, size: str) -> nn.Module:
    """A new model with FP32 weights: transformers' Qwen2 or Llama, or a small nn.Module."""
    torch.manual_seed(0)
    if name == "mlp":  # guesses a byte from the one before; its head is named lm_head: no FP8
        parts = {"embed": nn.Embedding(256, 128), "up": nn.Linear(128, 512), "act": nn.GELU(),
                 "down": nn.Linear(512, 128), "lm_head": nn.Linear(128, 256)}  # fmt: skip
        return nn.Sequential(OrderedDict(parts))
    shape = dict(zip(KEYS, SIZES[size], strict=True)) | {"bos_token_id": 0, "eos_token_id": 0}
    tied = size != "tiny"  # as in Qwen2.5 of these sizes
    config = getattr(transformers, f"{name}Config")(**shape, tie_word_embeddings=tied)
    with torch.device(DEVICE):
        model: nn.Module = getattr(transformers, f"{name}ForCausalLM")(config)
    return model


def read_text(path: Path | None) -> bytes:
    """The file's bytes, or ten thousand sums: 12+34=46."""
    if path is None:
        return "".join(f"{a}+{b}={a + b}\n" for a in range(100) for b in range(100)).encode()
    if not path.is_file() or not (text := path.read_bytes()):
        raise SystemExit(f"--text {path}: there is no such file, or it is empty")
    return text


def random_windows(text: bytes, count: int, length: int, generator: torch.Generator) -> Tensor:
    """`count` pieces of the text, repeated if it is short, as token ids int64 [count, length]."""
    tokens = torch.tensor(list(text)).repeat(1 + length // len(text))
    first = torch.randint(len(tokens) - length + 1, (count, 1), generator=generator)
    return tokens[first + torch.arange(length)].to(DEVICE)


class Report:
    """Prints the loss of some steps, and in the end what the run reached and what it took."""

    def __init__(self, steps: int, tokens_per_step: int, quiet: bool = False) -> None:
        self.steps, self.tokens_per_step, self.quiet = steps, tokens_per_step, quiet
        self.losses: list[float] = []
        self.times = [time.perf_counter()]

    def step(self, loss: float) -> None:
        self.losses.append(loss)
        self.times.append(time.perf_counter())
        if not self.quiet and (len(self.losses) % 5 == 1 or len(self.losses) == self.steps):
            print(f"step {len(self.losses):3}  loss {loss:.4f}", flush=True)

    def end(self, model: nn.Module) -> None:
        fp8 = sum(isinstance(module, Fp8Linear) for module in model.modules())
        later = self.times[self.steps // 3 :]  # in the first steps the GEMMs are measured
        seconds = statistics.median(b - a for a, b in pairwise(later))
        line = (f"{fp8} FP8 layers, loss {self.losses[0]:.3f} -> {self.losses[-1]:.3f}, "
                f"{self.tokens_per_step / seconds:,.0f} tokens/s")  # fmt: skip
        if DEVICE == "cuda":
            line += f", peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
        if not self.quiet:
            print(line)
