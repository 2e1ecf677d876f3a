"""What a checkpoint costs: the stall of a step by a save in the background, a synchronous save against the disk, a resume.

    python bench/save.py [--to docs/results/save.md] [--dir DIR] [--large 1.5]

The stall is measured on a decoder of 0.5 B parameters with AdamW's moments: time spent in starting the save and in waiting for the
copy before the next update, against the time of a synchronous save. The large save streams a model of 1.5 B parameters (random
weights; the two moments are views of the same memory, so that 18 GB fit into less): bytes per second, against a plain
sequential write of the same size with one fsync at the end, before and after it.
"""

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path

import torch

from infir2.checkpoint import Store, open_checkpoint
from infir2.checkpoint.background import BackgroundSaver
from infir2.config.schema import OptimizerSection, ShapeSection
from infir2.data.packing import pack_sequences
from infir2.data.types import Sample
from infir2.model import Decoder
from infir2.train.losses import next_token_loss
from infir2.train.trainer import Trainer

HALF_BILLION = {"hidden_size": 896, "num_layers": 24, "num_heads": 14, "num_kv_heads": 2, "ffn_size": 4864, "vocab_size": 151936}
GIB = 2**30


def sequential_rate(directory: Path, num_bytes: int) -> float:
    """GiB/s of writing so many bytes to one file and syncing it."""
    piece = memoryview(os.urandom(1 << 26))
    path = directory / "sequential"
    began = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(num_bytes // len(piece)):
            file.write(piece)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    path.unlink()
    return num_bytes / GIB / seconds


def stall(directory: Path) -> list[str]:
    """Lines about 0.5 B parameters."""
    model = Decoder.from_shape(ShapeSection(**HALF_BILLION), vocab_size=HALF_BILLION["vocab_size"], seed=0, compute_dtype=torch.bfloat16)
    trainer = Trainer(model, OptimizerSection(), head_chunk_tokens=128)
    tokens = torch.randint(0, 1000, (64,), generator=torch.Generator().manual_seed(0)).numpy().astype("int32")
    batches = pack_sequences([Sample(tokens, tokens >= 0)], 128)

    def step() -> float:
        began = time.perf_counter()
        trainer.step(batches, next_token_loss, 1e-4)
        return time.perf_counter() - began

    step()
    store = Store(directory / "run", keep=1)
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in trainer.tensors().values())
    began = time.perf_counter()
    store.save(1, trainer.tensors(), {"step": 1})
    synchronous = time.perf_counter() - began
    saver, waited = BackgroundSaver(store.save), [0.0]

    def await_copy() -> None:
        started = time.perf_counter()
        saver.await_copy()
        waited[0] += time.perf_counter() - started

    trainer.before_update = await_copy
    quiet = [step() for _ in range(2)]
    rows = []
    for number in (2, 3):  # the first has to get the memory of the copies
        waited[0] = 0.0
        began = time.perf_counter()
        future = saver.start(number, trainer.tensors(), {"step": number})
        starting = time.perf_counter() - began
        first = step()
        future.result()
        stalled = starting + waited[0]
        rows.append(f"| background, save {number - 1} | {stalled:.3f} | {100 * stalled / synchronous:.1f} % | {first:.2f} |")
    saver.close()
    store.close()
    return [
        f"0.5 B: {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters, {num_bytes / GIB:.2f} GiB a checkpoint, "
        f"{len(tokens)} tokens a step.",
        "",
        "| save | step blocked, s | of the synchronous one | step during the save, s |",
        "|---|---|---|---|",
        f"| synchronous | {synchronous:.3f} | 100 % | {sum(quiet) / len(quiet):.2f} (none running) |",
        *rows,
    ]


def large(directory: Path, billions: float) -> list[str]:
    """Lines about the synchronous save and its resume."""
    count = round(billions * 1e9 / 1000)
    masters = {f"parameters/{i}": torch.randn(count // 8, 125) for i in range(64)}
    tensors = dict(masters)
    for moment in ("exp_avg", "exp_avg_sq"):
        tensors |= {f"optimizer/{name}/{moment}": tensor for name, tensor in masters.items()}
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    before = sequential_rate(directory, num_bytes)
    store = Store(directory / "large", keep=1)
    began = time.perf_counter()
    store.save(1, tensors, {"step": 1})
    rate = num_bytes / GIB / (time.perf_counter() - began)
    after = sequential_rate(directory, num_bytes)
    began = time.perf_counter()
    loaded = open_checkpoint(directory / "large").tensors()
    for name, tensor in tensors.items():
        tensor.copy_(loaded[name])
    seconds = time.perf_counter() - began
    store.close()
    disk = (before + after) / 2
    return [
        f"{billions:g} B: {num_bytes / GIB:.1f} GiB, saved at {rate:.3f} GiB/s; plain sequential writes beside it {before:.3f} "
        f"and {after:.3f} GiB/s: **{rate / disk:.2f} of the disk**.",
        f"Resume (every byte verified, then read into place): {seconds:.1f} s.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path)
    parser.add_argument("--dir", type=Path, help="where to write (default: a temporary directory)")
    parser.add_argument("--large", type=float, default=1.5, metavar="BILLIONS", help="size of the streamed save; 0: none")
    words = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="infir2-save-", dir=words.dir))
    load = os.getloadavg()[0]
    try:
        lines = stall(directory)
        shutil.rmtree(directory / "run")
        if words.large:
            lines += ["", *large(directory, words.large)]
    finally:
        shutil.rmtree(directory)
    noisy = f"{torch.get_num_threads()} of {os.cpu_count()} cores; other work on the machine (load average at the start): {load:.1f}."
    text = "\n".join(["# Saving and resuming", "", "`python bench/save.py`", "", noisy, "", *lines]) + "\n"
    print(text)
    if words.to:
        words.to.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
