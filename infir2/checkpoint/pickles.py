"""Reading pickles without running code that they name.

An unpickler looks up every class and function that a pickle refers to. Here it finds only those of
an allow-list; any other name is refused by a CheckpointError. Our own `.metadata` needs a few
classes of torch.distributed.checkpoint. Files of other programs need some more: what Megatron and
NumPy store beside the weights becomes an `Inert` placeholder.
"""

import pickle
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from infir2.errors import CheckpointError

_DCP = "torch.distributed.checkpoint"
_OWN = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    f"{_DCP}.metadata": {
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "_MEM_FORMAT_ENCODING",
    },
    f"{_DCP}.filesystem": {"_StorageInfo"},
}
_FOREIGN = {
    "collections": {"OrderedDict"},
    "argparse": {"Namespace"},
    "pathlib": {"PosixPath"},
    f"{_DCP}.metadata": {"StorageMeta", "BytesStorageMetadata"},
    f"{_DCP}.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"},
}
_INERT_PACKAGES = ("megatron", "transformer_engine", "numpy")
_INERT_NAMES = {
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch.storage", "UntypedStorage"),
    ("_codecs", "encode"),
    ("signal", "Signals"),
}


class Inert:
    """Placeholder for an object that is not needed; accepts any arguments, state and items."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.args = args

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, item: object) -> None:
        pass

    def extend(self, items: object) -> None:
        pass


class AllowListUnpickler(pickle.Unpickler):
    """Unpickler for our own `.metadata`. CheckpointError names a class that is not allowed."""

    def __init__(self, file: IO[bytes], origin: Path) -> None:
        super().__init__(file)
        self._origin = origin

    def find_class(self, module: str, name: str) -> Any:
        if name in _OWN.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise CheckpointError(
            f"{self._origin}: asks for '{module}.{name}', which no checkpoint needs; "
            "the file is refused."
        )


class ForeignUnpickler(AllowListUnpickler):
    """Unpickler for files of other programs."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _FOREIGN.get(module, ()):
            return pickle.Unpickler.find_class(self, module, name)
        if (
            module.partition(".")[0] in _INERT_PACKAGES
            or (module, name) in _INERT_NAMES
            or (module == "torch" and name.endswith("Storage"))
        ):
            return Inert
        return super().find_class(module, name)

    def persistent_load(self, pid: object) -> Inert:
        return Inert()


def read_pickle(
    file: IO[bytes], origin: Path, unpickler: type[AllowListUnpickler] = ForeignUnpickler
) -> Any:
    """Unpickle one object; `origin` is the path for messages.

    Raises CheckpointError for a damaged stream and for a class that is not allowed.
    """
    try:
        return unpickler(file, origin).load()
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        AttributeError,
        IndexError,
        KeyError,
        ImportError,
    ) as error:
        raise CheckpointError(
            f"{origin}: is not a readable pickle ({type(error).__name__}: {error})."
        ) from error


def read_torch_save(path: Path) -> Any:
    """The object of a `torch.save` file (zip format); its tensors become `Inert`."""
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("data.pkl")]
            if len(pickles) != 1:
                raise CheckpointError(f"{path}: is not a file of torch.save.")
            with archive.open(pickles[0]) as file:
                return read_pickle(file, path)
    except (OSError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path}: cannot be read as a file of torch.save ({error})."
        ) from error
