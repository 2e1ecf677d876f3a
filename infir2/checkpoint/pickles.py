"""The pickles in checkpoints, as plain values (infir2/pickles.py), and the names they may contain.

A name here admits no code. The lists exist because a checkpoint with any other name was made for an
attack: it is refused instead of read as if nothing had happened.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from infir2.errors import CheckpointError
from infir2.files import read_regular
from infir2.pickles import MAX_BYTES, read_pickle

DCP = "torch.distributed.checkpoint"
DTYPES = {f"torch.{name}": kind for name, kind in vars(torch).items() if type(kind) is torch.dtype}
_DCP_NAMES = {
    "metadata": [
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "_MEM_FORMAT_ENCODING",
    ],
    "filesystem": ["_StorageInfo"],
}
_OTHER_DCP_NAMES = {
    "metadata": ["StorageMeta", "BytesStorageMetadata"],
    "planner": ["SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"],
}
_REBUILD = {"torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"}
_PACKAGES = {"megatron", "transformer_engine", "numpy"}


def _full_names(modules: dict[str, list[str]]) -> set[str]:
    return {f"{DCP}.{module}.{name}" for module, names in modules.items() for name in names}


_OWN = {"torch.Size", "torch.serialization._get_layout", *_full_names(_DCP_NAMES), *DTYPES}
_TENSOR = {"torch.storage.UntypedStorage", "collections.OrderedDict", *_REBUILD, *DTYPES}
_FOREIGN = {
    *_OWN,
    *_TENSOR,
    *_full_names(_OTHER_DCP_NAMES),
    "argparse.Namespace",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
    "signal.Signals",
    "_codecs.encode",
}


def is_own(name: str) -> bool:
    """Whether our own `.metadata` contains a name such as "torch.Size"."""
    return name in _OWN


def is_tensor(name: str) -> bool:
    """Whether `torch.save` writes a name for a tensor, such as "torch.BFloat16Storage"."""
    package, _, rest = name.partition(".")
    return name in _TENSOR or (package == "torch" and rest.isalnum() and rest.endswith("Storage"))


def is_foreign(name: str) -> bool:
    """Whether a file of another program (Megatron) may contain a name."""
    return name in _FOREIGN or is_tensor(name) or name.partition(".")[0] in _PACKAGES


def decode_pickle(data: bytes, origin: Path | str, is_expected: Callable[[str], bool]) -> Any:
    """The value of a pickle.

    Args:
        origin: begins the sentence of a CheckpointError.
        is_expected: one of the functions above.
    """
    try:
        return read_pickle(data, is_expected)
    except ValueError as error:
        raise CheckpointError(f"{origin}: {error}; the file is refused.") from error


def read_pickle_file(path: Path, is_expected: Callable[[str], bool]) -> Any:
    """The value of a pickle file. Raises CheckpointError."""
    try:
        data = read_regular(path, MAX_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from error
    return decode_pickle(data, path, is_expected)
