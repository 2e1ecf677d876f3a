"""Facts about the machine: versions, cores, memory, GPUs and the driver."""

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, requires, version

import torch
from packaging.requirements import Requirement

from infir2.model.memory import GIB, host_memory
from infir2.preflight.finding import Finding

_SMI = ("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
# What an extra brings: the module that it is for.
EXTRAS = {
    "serve": "infir2 serve and chat",
    "ray": "infir2 launch ray",
    "gym": "rewards of Reasoning Gym",
    "wandb": "train.tracker = 'wandb'",
    "trackio": "train.tracker = 'trackio'",
}


def check_versions() -> Finding:
    """Every package that infir2 requires is here in a version of its range."""
    wrong, wanted = [], []
    for text in requires("infir2") or []:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = _version(requirement.name)
        if not requirement.specifier.contains(found.partition("+")[0] or "0", prereleases=True):
            wrong.append(f"{requirement.name} is {found or 'missing'}, not {requirement.specifier}")
            wanted.append(f"'{requirement.name}{requirement.specifier}'")
    if wrong:
        detail = f"{'; '.join(wrong)}: pip install {' '.join(wanted)}"
        return Finding("versions", "fail", detail)
    names = ("infir2", "torch", "transformers", "numpy")
    found = ", ".join(f"{name} {_version(name)}" for name in names)
    return Finding("versions", "ok", f"{found}, Python {platform.python_version()}")


def check_cpu() -> Finding:
    """Cores that this process may use, threads of torch, free memory."""
    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    detail = f"{cores} cores, {threads} threads, {host_memory() / GIB:.1f} GiB of memory free"
    if threads > cores:
        detail += f"; more threads than cores wait for each other: export OMP_NUM_THREADS={cores}"
        return Finding("cpu", "warn", detail)
    return Finding("cpu", "ok", detail)


def check_gpus() -> Finding:
    """GPUs as torch sees them, and as the driver does."""
    driver = _driver()
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        free, total = (size / GIB for size in torch.cuda.mem_get_info(0))
        versions = f"driver {driver[0][1]}, " if driver else ""
        detail = (
            f"{len(names)} x {names[0]}, {free:.1f} of {total:.1f} GiB free on the first; "
            f"{versions}torch's CUDA {torch.version.cuda}"
        )
        if free < 0.5 * total:
            return Finding("gpu", "warn", f"{detail}; another process holds its memory.")
        return Finding("gpu", "ok", detail)
    if driver and torch.version.cuda is None:
        detail = (
            f"the driver {driver[0][1]} sees {driver[0][0]}, and torch {torch.__version__} is a "
            "CPU build: pip install --force-reinstall 'torch>=2.11,<2.14'"
        )
        return Finding("gpu", "fail", detail)
    if driver:
        detail = f"the driver {driver[0][1]} sees {driver[0][0]}, and torch cannot use it: update "
        detail += f"the driver to one for CUDA {torch.version.cuda}, or unset CUDA_VISIBLE_DEVICES"
        return Finding("gpu", "fail", detail)
    return Finding("gpu", "ok", "none here: every verb works on the CPU, FP8 is emulated there")


def check_extras() -> Finding:
    """Which optional parts are installed."""
    here: list[str] = []
    missing: list[str] = []
    for text in requires("infir2") or []:
        requirement = Requirement(text)
        for extra in EXTRAS:
            if requirement.marker and requirement.marker.evaluate({"extra": extra}):
                (here if _version(requirement.name) else missing).append(extra)
    absent = list(dict.fromkeys(missing))
    present = [extra for extra in dict.fromkeys(here) if extra not in absent]
    parts = [f"installed: {', '.join(present)}"] if present else []
    parts += [f"pip install 'infir2[{extra}]' for {EXTRAS[extra]}" for extra in absent]
    return Finding("extras", "ok", "; ".join(parts))


def _driver() -> list[tuple[str, str]]:
    """(GPU, driver's version) of each GPU that nvidia-smi lists; [] without it."""
    if shutil.which(_SMI[0]) is None:
        return []
    try:
        result = subprocess.run(_SMI, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.split(", ") for line in result.stdout.splitlines()]
    return [(row[0], row[1]) for row in rows if len(row) == 3]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
