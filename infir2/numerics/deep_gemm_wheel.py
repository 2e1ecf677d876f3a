"""DeepGEMM, as the package sgl-deep-gemm brings it: which release fits, what it compiles with."""

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
from packaging.specifiers import SpecifierSet

# Releases by the torch whose symbols they were built with. With another torch one is missing, which
# ends the process at the first call, without an exception. (Those for 2.13 have not run on a GPU of
# ours.)
DEEP_GEMM_RELEASES = {"2.11": "<=0.1.5", "2.13": ">=0.1.5.post3,<0.2"}
_TOOLKIT = Path("/usr/local/cuda")  # where DeepGEMM looks last


@cache
def deep_gemm() -> ModuleType | None:
    """DeepGEMM (sgl-deep-gemm), or None; warns if it is installed and does not load."""
    if reason := _unfit_release():
        warnings.warn(f"DeepGEMM is not used: {reason}; using cuBLAS", stacklevel=2)
        return None
    try:
        with _cuda_home():
            import deep_gemm as module
    except ModuleNotFoundError as error:
        if error.name != "deep_gemm":
            warnings.warn(
                f"DeepGEMM is installed, but {error.name} is not; using cuBLAS", stacklevel=2
            )
        return None
    except Exception as error:  # built for one CUDA, whose compiler it needs, it asserts on both
        reason = str(error) or "it needs nvcc: pip install 'infir2[gpu]', or set CUDA_HOME"
        warnings.warn(
            f"DeepGEMM is installed but does not load ({reason}); using cuBLAS", stacklevel=2
        )
        return None
    return module


def _unfit_release() -> str:
    """Why the installed wheel does not fit this torch, or "" (it fits, or there is none)."""
    try:
        release = version("sgl-deep-gemm")
    except PackageNotFoundError:
        return ""
    release_of_torch = ".".join(torch.__version__.split(".")[:2])
    fitting = DEEP_GEMM_RELEASES.get(release_of_torch, "none")
    if fitting != "none" and SpecifierSet(fitting).contains(release):
        return ""
    return f"sgl-deep-gemm {release} was built for another torch than {torch.__version__}"


@contextmanager
def _cuda_home() -> Iterator[None]:
    """Without a CUDA toolkit, CUDA_HOME is that of NVIDIA's wheels while DeepGEMM reads it."""
    has_toolkit = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or shutil.which("nvcc")
    home = None if has_toolkit or (_TOOLKIT / "bin/nvcc").exists() else _wheels_home()
    if home is not None:
        os.environ["CUDA_HOME"] = str(home)
    try:
        yield
    finally:
        if home is not None:
            del os.environ["CUDA_HOME"]


def _wheels_home() -> Path | None:
    """The directory of nvcc's wheel (cuda-toolkit[nvcc]), if it is installed."""
    found = find_spec("nvidia")  # a namespace of several directories
    homes = [Path(each) / "cu13" for each in (found and found.submodule_search_locations) or ()]
    return next((home for home in homes if (home / "bin/nvcc").is_file()), None)
