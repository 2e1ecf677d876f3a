"""Speeds of GPUs: those that ship with the package, or a file that `infir2 bench` wrote."""

import difflib
import json
import math
from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from infir2.errors import ConfigError, disk_reason


@dataclass(frozen=True)
class Gpu:
    """What the estimates know of a GPU. Rates are those of large operands, measured alone.

    Attributes:
        bandwidth: of a copy, reads and writes, TB/s.
        bf16_tflops, fp8_tflops: of GEMMs; fp8_tflops is 0 without block-scaled FP8.
        flash_tflops, torch_tflops: of causal attention, forward and backward, by FlashAttention 4
            and by torch.
        link_gb_s: of NCCL within a node, one direction; network_gb_s: between nodes, per GPU.
        launch_us: host time of a kernel's launch.
        origin: where the numbers are from.
    """

    name: str
    memory_gib: float
    bandwidth: float
    bf16_tflops: float
    fp8_tflops: float
    flash_tflops: tuple[float, float]
    torch_tflops: tuple[float, float]
    link_gb_s: float
    network_gb_s: float
    launch_us: float
    origin: str


@cache
def package_json(name: str) -> Any:
    """A JSON file of this folder."""
    return json.loads(files("infir2.planner").joinpath(name).read_text(encoding="utf-8"))


def find_gpu(name: str) -> Gpu:
    """The GPU of `--gpu`: a name (h100, h200, a100) or a file of `infir2 bench`.

    Raises ConfigError.
    """
    known = package_json("gpus.json")
    if name.lower() in known:
        return _gpu(known[name.lower()])
    path = Path(name)
    if path.suffix != ".json" and not path.is_file():
        near = difflib.get_close_matches(name.lower(), known, 1)
        advice = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"--gpu {name} is not one of {', '.join(known)}; {advice}`infir2 bench --to FILE.json` "
            "on a machine with that GPU writes a file to name here."
        )
    try:
        return _gpu(_read_json(path))
    except (OSError, ValueError) as error:
        why = disk_reason(error) if isinstance(error, OSError) else error
        raise ConfigError(
            f"--gpu {name}: not a file of infir2 bench ({why}); `infir2 bench --to FILE.json` on a "
            "machine with that GPU writes one."
        ) from None


def _read_json(path: Path) -> Any:
    text = path.read_bytes()
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("it is no JSON") from None


def _gpu(values: Any) -> Gpu:
    names = [field.name for field in fields(Gpu)]
    given = values if isinstance(values, dict) else {}
    if missing := [name for name in names if name not in given]:
        raise ValueError(f"it has no {missing[0]}")
    known = set(names)
    gpu = Gpu(**{name: value for name, value in values.items() if name in known})
    lists = [each for each in (gpu.flash_tflops, gpu.torch_tflops) if isinstance(each, list)]
    pairs = [rate for each in lists for rate in each]
    texts = {"name", "origin"}
    plain = known - texts - {"flash_tflops", "torch_tflops", "fp8_tflops"}
    rates = [*pairs, *(getattr(gpu, name) for name in plain)]
    if len(pairs) != 4 or not all(_is_number(rate) and rate > 0 for rate in rates):
        raise ValueError("a rate is not a positive number")
    if not _is_number(gpu.fp8_tflops) or gpu.fp8_tflops < 0:
        raise ValueError("fp8_tflops is not a number")
    if not all(isinstance(getattr(gpu, name), str) for name in texts):
        raise ValueError("its name or origin is no text")
    return gpu


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
