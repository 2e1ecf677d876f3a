"""environment.json: the software and the machine of a run."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from infir2 import __version__

_RECORDED_VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "CUDA_VISIBLE_DEVICES")


def describe_environment() -> dict[str, Any]:
    """Versions, device, command line and the variables that change speed, of this process."""
    return {
        "infir2": __version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "processes_per_node": int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "command": sys.argv,
        "variables": {name: os.environ[name] for name in _RECORDED_VARIABLES if name in os.environ},
    }


def _commit() -> str:
    """The git commit of the package's checkout; empty without git or a checkout."""
    if shutil.which("git") is None:
        return ""
    command = ["git", "rev-parse", "HEAD"]
    directory = Path(__file__).parent
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=directory)
    return result.stdout.strip()
