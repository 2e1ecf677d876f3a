"""Reading pickles without running anything they name.

Every class or function that a pickle asks for is looked up here. Our own `.metadata` may ask for what torch puts there. Foreign
pickles may ask for a few more; what Megatron and NumPy put beside the weights becomes an inert stand-in that only remembers its
arguments. Everything else is refused by its name.
"""

import pickle
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from infir2.errors import CheckpointError

_DCP = "torch.distributed.checkpoint"
_DCP_METADATA = "Metadata MetadataIndex TensorStorageMetadata ChunkStorageMetadata TensorProperties _MEM_FORMAT_ENCODING"
_OURS = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    f"{_DCP}.metadata": {*_DCP_METADATA.split()},
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
_INERT = {
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch.storage", "UntypedStorage"),
    ("_codecs", "encode"),
    ("signal", "Signals"),
}


class Inert:
    """Stands in for an object that nobody needs: takes any arguments, state, items, and does nothing with them."""

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
    """Unpickler whose classes are those of our own `.metadata`; CheckpointError names any other."""

    def __init__(self, file: IO[bytes], origin: Path) -> None:
        super().__init__(file)
        self._origin = origin

    def find_class(self, module: str, name: str) -> Any:
        if name in _OURS.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise CheckpointError(
            f"{self._origin}: asks for '{module}.{name}', which no checkpoint needs; the file is refused."
        )


class ForeignUnpickler(AllowListUnpickler):
    """Unpickler for what another program wrote."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _FOREIGN.get(module, ()):
            return pickle.Unpickler.find_class(self, module, name)
        if (
            module.partition(".")[0] in _INERT_PACKAGES
            or (module, name) in _INERT
            or (module == "torch" and name.endswith("Storage"))
        ):
            return Inert
        return super().find_class(module, name)

    def persistent_load(self, pid: object) -> Inert:
        return Inert()


def read_pickle(
    file: IO[bytes], origin: Path, unpickler: type[AllowListUnpickler] = ForeignUnpickler
) -> Any:
    """The object of a pickle stream; CheckpointError when it is damaged or asks for a class that is not allowed."""
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
    """The object of a `torch.save` file (zip format), its tensors replaced by inert stand-ins."""
    try:
        with zipfile.ZipFile(path) as archive:
            inner = [name for name in archive.namelist() if name.endswith("data.pkl")]
            if len(inner) != 1:
                raise CheckpointError(f"{path}: is not a file of torch.save.")
            with archive.open(inner[0]) as file:
                return read_pickle(file, path)
    except (OSError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path}: cannot be read as a file of torch.save ({error})."
        ) from error
