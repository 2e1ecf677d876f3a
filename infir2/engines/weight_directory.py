"""The trainer's weights as a Hugging Face directory in shared memory, for servers on this machine.

FP8 stays FP8: codes and scales under their exported names, half the bytes of BF16. A version's
directory appears by one rename when it is whole.
"""

import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from infir2.directories import lock_directory, remove_unlocked
from infir2.engines.remote import PublishedWeights
from infir2.errors import CheckFailedError
from infir2.files import disk_errors
from infir2.model.safetensors_io import HfWeights, read_json, write_hf
from infir2.terminal import log

SHARED_MEMORY = Path("/dev/shm")
SHARD_BYTES, NUM_WRITERS = 2**28, 4  # so many shards are in memory, beside what is written
NUM_VERSIONS = 2  # the newest, and the one before while it is replaced


class ExpectedNames:
    """The names of the tensors of `rollout.model`, which every published version must have."""

    def __init__(self, model: Path) -> None:
        self._names = set(HfWeights(model).names())
        self._is_tied = bool(read_json(model / "config.json").get("tie_word_embeddings"))

    def check(self, names: set[str]) -> None:
        """Raise CheckFailedError for a tensor too few or too many."""
        expected = self._names
        if self._is_tied and "lm_head.weight" not in names:
            expected = expected - {"lm_head.weight"}  # some exports have this second copy
        if different := names ^ expected:
            raise CheckFailedError(
                f"{min(different)} is missing on one side, in the trainer or in rollout.model: "
                "export the trainer's starting weights again (infir2 export hf, infir2 export fp8) "
                "with the same fp8.scale_format and fp8.skip_modules"
            )


class WeightDirectory:
    """Publishes one version after another, each in a directory of its own.

    The directories are locked while this process lives; what a killed one left is removed first.
    """

    def __init__(self, model: Path, fallback: Path, shared_memory: Path = SHARED_MEMORY) -> None:
        """`model` is `rollout.model`, whose configuration and tokenizer every version gets.

        `fallback` is where the versions go if shared memory has no room for two of them.
        """
        self._model = model
        self._config = read_json(model / "config.json")
        self._expected = ExpectedNames(model)
        self._path = _make_root(shared_memory, fallback, _num_bytes(model))
        self._lock = lock_directory(self._path)

    def publish(
        self, weights: Iterable[tuple[str, Tensor]], policy_version: int
    ) -> PublishedWeights:
        """Write a version. Raises CheckFailedError unless it has the tensors of `rollout.model`,
        CheckpointError when the disk is full."""
        names, num_bytes = set[str](), 0

        def counted() -> Iterator[tuple[str, Tensor]]:
            nonlocal num_bytes
            for name, tensor in weights:
                names.add(name)
                num_bytes += tensor.numel() * tensor.element_size()
                yield name, tensor

        directory = self._path / f"version-{policy_version}-{secrets.token_hex(2)}"
        write_hf(
            directory,
            counted(),
            self._config,
            self._model,
            SHARD_BYTES,
            num_writers=NUM_WRITERS,
        )
        self._expected.check(names)
        return PublishedWeights(directory, policy_version, num_bytes)

    def remove_before(self, weights: PublishedWeights) -> None:
        """Remove all versions but this one."""
        for path in list(self._path.iterdir()):
            if path != weights.directory:
                shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        """Remove everything."""
        shutil.rmtree(self._path, ignore_errors=True)
        os.close(self._lock)


def _make_root(shared_memory: Path, fallback: Path, num_bytes: int) -> Path:
    parent, needed = shared_memory, NUM_VERSIONS * num_bytes
    if not shared_memory.is_dir() or shutil.disk_usage(shared_memory).free < needed:
        log(
            f"{shared_memory} has no room for {NUM_VERSIONS} versions of the weights "
            f"({needed / 2**30:.1f} GiB); they go to {fallback}, where publishing takes longer",
            "rl",
        )
        parent = fallback
    with disk_errors(f"{parent}: cannot hold the published weights"):
        parent.mkdir(parents=True, exist_ok=True)
        for left in parent.glob("infir2-weights-*"):
            remove_unlocked(left)
        path = parent / f"infir2-weights-{secrets.token_hex(6)}"
        path.mkdir(mode=0o700)
    return path.resolve()


def _num_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))
