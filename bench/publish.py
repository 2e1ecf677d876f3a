"""Seconds of each part of a publish into an SGLang on a second GPU, by directory and by NCCL.

    python bench/publish.py --out publish.json --python sglang-env/bin/python [--shape 1.5B]
        [--versions 5] [--transfers directory nccl] [--option=--attention-backend=triton ...]

The model has random weights in FP8, and lies on the first GPU as a trainer's does; its last norm is
another one in each version. write: into files, or into the buckets on the GPU. transfer (NCCL):
until all buckets have arrived. load: at the server, with the transfer. proof: checksums.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from engine import build
from servers import export

from infir2.config.schema import RolloutSection
from infir2.engines.pool import EnginePool
from infir2.engines.pool_member import PoolLimits
from infir2.engines.remote import WeightPublisher
from infir2.engines.server_process import Place, ServerCommand, ServerProcess
from infir2.engines.servers import gpus_of
from infir2.engines.sglang import SglangClient, sglang_command
from infir2.engines.weight_directory import WeightDirectory
from infir2.engines.weight_memory import WeightMemory
from infir2.model import Decoder
from infir2.model.hf_names import exported_fp8_weights
from infir2.parallel.ranks import Ranks

PARTS = ("write", "transfer", "load", "proof")
TIMEOUT_SECONDS = 300.0


def measure(arguments: argparse.Namespace, work: Path) -> dict[str, list[dict[str, float]]]:
    """One server, to which the versions are published in each of the ways."""
    directory = work / "model"
    export(directory, arguments.shape, fp8=True)
    model = build(arguments.shape, fp8=True)
    rollout = RolloutSection(
        engine="sglang",
        python=arguments.python,
        model=str(directory),
        memory_fraction=0.5,
        server_options=tuple(arguments.option),
    )
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(gpus_of(0, 1, 1))}

    def command(place: Place) -> ServerCommand:
        made = sglang_command(rollout, place)
        return replace(made, variables={**made.variables, **visible})

    found = {}
    for transfer in arguments.transfers:
        publisher: WeightPublisher = (
            WeightMemory(directory, torch.device("cuda", 0))
            if transfer == "nccl"
            else WeightDirectory(directory, work / "weights")
        )
        host = ServerProcess(transfer, command, SglangClient, lambda *_: None, work / "engines", 0)
        limits = PoolLimits(64, TIMEOUT_SECONDS / 2, TIMEOUT_SECONDS)
        pool = EnginePool([host], limits, publisher, Ranks())
        try:
            found[transfer] = [publish(pool, model, i + 1) for i in range(arguments.versions)]
        finally:
            pool.close()
        print(table(transfer, found[transfer]), flush=True)
    return found


def publish(pool: EnginePool, model: Decoder, version: int) -> dict[str, float]:
    """Returns seconds and bytes of one publish."""
    with torch.no_grad():
        model.get_parameter("model.norm.weight").fill_(1 + version / 64)
    torch.cuda.synchronize()
    begun = time.perf_counter()
    pool.update_weights(exported_fp8_weights(model), version)
    seconds = {"seconds": time.perf_counter() - begun}
    metrics = pool.metrics()
    seconds |= {part: metrics.get(f"publish_{part}_seconds", 0.0) for part in PARTS}
    return seconds | {"bytes": metrics["publish_bytes"]}


def table(transfer: str, rows: Sequence[dict[str, float]]) -> str:
    """A line for each publish; the first has the start of the server in it."""
    lines = [f"{transfer:>10} {'GB':>6} {'total':>8}" + "".join(f"{part:>10}" for part in PARTS)]
    for number, row in enumerate(rows, 1):
        parts = "".join(f"{row[part]:10.3f}" for part in PARTS)
        lines.append(f"{number:>10} {row['bytes'] / 1e9:6.2f} {row['seconds']:8.3f}{parts}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--python", required=True, help="of the environment that has SGLang")
    parser.add_argument("--shape", default="1.5B")
    parser.add_argument("--versions", type=int, default=5)
    parser.add_argument("--transfers", nargs="+", default=["directory", "nccl"])
    parser.add_argument("--option", action="append", default=[], help="of SGLang's command line")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        results: dict[str, Any] = {"shape": arguments.shape}
        results |= measure(arguments, Path(work))
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
