"""The examination: all findings about this machine, in order."""

from collections.abc import Callable, Iterator

import torch

from infir2.doctor.kernels import check_kernels, check_layer, check_speed
from infir2.doctor.machine import check_cpu, check_extras, check_gpus, check_versions
from infir2.preflight.finding import Finding
from infir2.preflight.verifiers import check_jail
from infir2.terminal import begin_phase


def examine() -> Iterator[Finding]:
    """Yield each finding as it is made; a check that raises is a failed one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checks: dict[str, Callable[[], Finding]] = {
        "versions": check_versions,
        "cpu": check_cpu,
        "gpu": check_gpus,
        "kernels": lambda: check_kernels(device),
        "fast path": lambda: check_speed(device),
        "FP8 layer": lambda: check_layer(device),
        "jail": check_jail,
        "extras": check_extras,
    }
    for name, check in checks.items():
        begin_phase(f"checking {name}")
        try:
            yield check()
        except Exception as error:  # a driver or a kernel that fails is what is looked for
            yield Finding(name, "fail", f"{type(error).__name__}: {error}")
