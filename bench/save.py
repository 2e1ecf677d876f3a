"""Cost of a checkpoint: stall of a background save, rate of a synchronous save, time to resume.

    python bench/save.py [--to docs/results/save.md] [--dir DIR] [--large 1.5]

The stall is measured on a decoder of 0.5 B parameters with AdamW moments: the time to start the
save plus the wait for the host copy before the next update, against the time of a synchronous save.

The large save streams 1.5 B random parameters with their moments. The moments alias the masters'
memory, so 18 GB on disk need 6 GB of RAM. Its rate is compared with sequential writes of the same
size with one fsync at the end; the two alternate.
"""

import argparse
import hashlib
import os
import resource
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from infir2.checkpoint import Store, open_checkpoint
from infir2.checkpoint.background import BackgroundSaver
from infir2.config.schema import OptimizerSection, ShapeSection
from infir2.data.packing import pack_sequences
from infir2.data.types import Sample
from infir2.model import Decoder
from infir2.parallel.shard_spec import unsharded
from infir2.train.losses import next_token_loss
from infir2.train.trainer import Trainer

HALF_BILLION: dict[str, Any] = {
    "hidden_size": 896,
    "num_layers": 24,
    "num_heads": 14,
    "num_kv_heads": 2,
    "ffn_size": 4864,
    "vocab_size": 151936,
}
GIB, PIECE_BYTES = 2**30, 2**26


def sequential_rate(directory: Path, num_bytes: int, early: bool) -> float:
    """GiB/s of writing `num_bytes` random bytes to one file with a final fsync.

    early: start write-back after every piece, as a save does.
    """
    piece = memoryview(os.urandom(PIECE_BYTES))
    path = directory / "sequential"
    began = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(num_bytes // PIECE_BYTES):
            file.write(piece)
            if early:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    path.unlink()
    return num_bytes / GIB / seconds


def hash_rate() -> float:
    """GiB/s of SHA-256 in one thread."""
    piece = os.urandom(PIECE_BYTES)
    began = time.perf_counter()
    for _ in range(8):
        hashlib.sha256(piece)
    return 8 * PIECE_BYTES / GIB / (time.perf_counter() - began)


def stall(directory: Path) -> list[str]:
    """Measure the stall and the resume with 0.5 B parameters; returns lines of Markdown."""
    model = Decoder.from_shape(
        ShapeSection(**HALF_BILLION),
        vocab_size=HALF_BILLION["vocab_size"],
        seed=0,
        compute_dtype=torch.bfloat16,
    )
    trainer = Trainer(model, OptimizerSection(), loss_chunk_tokens=128)
    tokens = (
        torch.randint(0, 1000, (64,), generator=torch.Generator().manual_seed(0))
        .numpy()
        .astype("int32")
    )
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
    undisturbed = [step() for _ in range(2)]
    rows = []
    for number in (2, 3):  # the first save allocates the host copies
        waited[0] = 0.0
        began = time.perf_counter()
        future = saver.start(number, trainer.tensors(), {"step": number})
        starting = time.perf_counter() - began
        first = step()
        future.result()
        stalled = starting + waited[0]
        rows.append(
            f"| background, save {number - 1} | {stalled:.3f} |"
            f" {100 * stalled / synchronous:.1f} % | {first:.2f} |"
        )
    saver.close()
    store.close()
    began = time.perf_counter()
    checkpoint = open_checkpoint(directory / "run")
    verified = time.perf_counter() - began
    trainer.load_tensors(checkpoint.tensors())
    resumed = time.perf_counter() - began
    return [
        f"0.5 B: {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters,"
        f" {num_bytes / GIB:.2f} GiB per checkpoint, {len(tokens)} tokens per step.",
        "",
        "| save | step blocked, s | of a synchronous save | step during the save, s |",
        "|---|---|---|---|",
        f"| synchronous | {synchronous:.3f} | 100 % | {statistics.mean(undisturbed):.2f} (none) |",
        *rows,
        "",
        f"Resume: {resumed:.1f} s, of which {verified:.1f} s to verify every byte.",
    ]


def large(directory: Path, billions: float, rounds: int) -> list[str]:
    """Measure the synchronous save and its resume; returns lines of Markdown."""
    count = round(billions * 1e9 / 1000)
    masters = {f"parameters/{i}": torch.randn(count // 8, 125) for i in range(64)}
    tensors = dict(masters)
    for moment in ("exp_avg", "exp_avg_sq"):
        tensors |= {f"optimizer/{name}/{moment}": tensor for name, tensor in masters.items()}
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    rows, ratios = [], []
    before = peak_memory()
    for number in range(1, rounds + 1):
        shutil.rmtree(directory / "large", ignore_errors=True)
        plain, early = (sequential_rate(directory, num_bytes, early) for early in (False, True))
        store = Store(directory / "large", keep=1)
        began = time.perf_counter()
        store.save(1, tensors, {"step": 1})
        rate = num_bytes / GIB / (time.perf_counter() - began)
        store.close()
        ratios.append(rate / max(plain, early))
        rows.append(
            f"| {number} | {plain:.3f} | {early:.3f} | {rate:.3f} | {ratios[-1]:.2f} |"
            f" {os.getloadavg()[0]:.1f} |"
        )
    after = peak_memory()
    began = time.perf_counter()
    checkpoint = open_checkpoint(directory / "large")
    verified = time.perf_counter() - began
    loaded = checkpoint.tensors()
    for name, tensor in tensors.items():
        loaded.read_into(name, unsharded(tensor.shape), tensor)
    resumed = time.perf_counter() - began
    return [
        f"{billions:g} B: {num_bytes / GIB:.1f} GiB, rates in GiB/s;"
        f" SHA-256 in one thread: {hash_rate():.2f} GiB/s.",
        "",
        "| round | plain write | early write-back | save | save / faster write | load average |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        f"Median: **{statistics.median(ratios):.2f} of the disk**."
        f" Peak memory: {before:.2f} GiB before the saves, {after:.2f} after.",
        "",
        f"Resume: {resumed:.1f} s, of which {verified:.1f} s to verify every byte.",
    ]


def peak_memory() -> float:
    """Peak resident memory of this process in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--to", type=Path)
    parser.add_argument("--dir", type=Path, help="where to write (default: a temporary directory)")
    parser.add_argument(
        "--large",
        type=float,
        default=1.5,
        metavar="BILLIONS",
        help="parameters of the streamed save; 0 skips it",
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="rounds of streamed save and plain writes"
    )
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="infir2-save-", dir=options.dir))
    load = os.getloadavg()[0]
    try:
        # The large save runs first, so the peak memory is its own.
        lines = large(directory, options.large, options.rounds) if options.large else []
        shutil.rmtree(directory / "large", ignore_errors=True)
        lines += ["", *stall(directory)]
    finally:
        shutil.rmtree(directory)
    machine = (
        f"{torch.get_num_threads()} of {os.cpu_count()} cores,"
        f" load average at the start {load:.1f} (other programs)."
    )
    text = (
        "\n".join(["# Saving and resuming", "", "`python bench/save.py`", "", machine, "", *lines])
        + "\n"
    )
    print(text)
    if options.to:
        options.to.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
