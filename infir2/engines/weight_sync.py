"""Weights from the trainer to the rollout engine, and the proof that both hold the same bytes."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from infir2.checkpoint.fingerprint import is_run
from infir2.config.paths import check_model_directory
from infir2.config.schema import RlRecipe
from infir2.engines.engine_weights import engine_weights
from infir2.engines.native import NativeEngine
from infir2.engines.pool import EnginePool
from infir2.engines.ray import RayEngines
from infir2.engines.response_text import Decode
from infir2.engines.servers import open_pool
from infir2.engines.types import OffersDigest, RolloutEngine
from infir2.engines.weight_probe import trainer_probe
from infir2.errors import CheckFailedError, ConfigError
from infir2.launch.ray import ENGINES_VARIABLE
from infir2.model.hf_names import weights_digest
from infir2.parallel.parallel_model import ParallelModel


@contextlib.contextmanager
def open_engine(
    recipe: RlRecipe,
    parallel_model: ParallelModel,
    policy_version: int,
    decode: Decode | None = None,
) -> Iterator[tuple[RolloutEngine, str]]:
    """Open `rollout.model`: this rank's own engine, the engines that `infir2 launch` reserved, or
    servers, which end with the block.

    The engine's weights are compared with the trainer's before anything is generated. A resumed run
    (`policy_version` > 0) publishes the trainer's weights first, because the exported files are
    older; servers always get them. An engine in this process needs `decode` for stop texts.

    Yields:
        The engine, and one digest of the weights it holds.

    Raises:
        ConfigError: `rl.max_off_policy_steps` lacks engines of its own.
        CheckFailedError: a weight differs; the message names the first one.
    """
    remote = bool(os.environ.get(ENGINES_VARIABLE))
    uses_servers = recipe.rollout.engine != "native"
    _check_recipe(recipe, parallel_model, remote or uses_servers)
    if uses_servers:
        device, run_dir = parallel_model.layout.device, Path(recipe.run.dir)
        with contextlib.closing(open_pool(recipe, parallel_model.ranks, device, run_dir)) as pool:
            yield pool, publish(parallel_model, pool, policy_version, recipe)
        return
    section, dtype = recipe.rollout, parallel_model.model.compute_dtype
    engine: RolloutEngine
    if remote:
        engine = RayEngines(section, dtype, parallel_model.ranks, recipe.parallel.timeout_seconds)
    else:
        device = parallel_model.layout.device
        directory = Path(section.model)
        engine = NativeEngine.from_hf(directory, section, dtype, device, decode)
    if policy_version > 0:
        yield engine, publish(parallel_model, engine, policy_version, recipe)
    else:
        digests = weights_digest(engine_weights(parallel_model, recipe))
        yield engine, _prove_equal(parallel_model, digests, engine)


def check_rollout_model(path: str) -> None:
    """Raise ConfigError unless `path`, the value of `rollout.model`, is an exported directory."""
    if not path:
        raise ConfigError(
            "rollout.model is empty: name the FP8 export of model.path (infir2 export fp8)"
        )
    check_model_directory("rollout.model", path)
    if is_run(Path(path)):
        raise ConfigError(
            f"rollout.model: {path} is a run directory, and the engine loads an export: infir2 "
            f"export fp8 {path} --to DIR, then name DIR."
        )


def publish(
    parallel_model: ParallelModel, engine: RolloutEngine, policy_version: int, recipe: RlRecipe
) -> str:
    """Send the trainer's weights to the engine, and compare digests if the engine offers one.

    Every rank calls this at the same point. Returns one digest of the weights. Raises
    CheckFailedError as `open_engine`.
    """
    digests: dict[str, str] = {}
    is_pool = isinstance(engine, EnginePool)

    def exported_with_digests() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in engine_weights(parallel_model, recipe):
            if is_pool and tensor.is_cuda:
                digests[name] = _sum_of_bits(tensor)
            else:
                digests.update(weights_digest([(name, tensor)]))
            yield name, tensor

    if isinstance(engine, EnginePool):
        engine.probe = trainer_probe(parallel_model)
    engine.update_weights(exported_with_digests(), policy_version)
    return _prove_equal(parallel_model, digests, engine)


def _sum_of_bits(tensor: Tensor) -> str:
    """Tells versions of a GPU's weights apart for the journal, without copying them to the host.

    Servers prove theirs by what they have loaded; SHA-256 takes longer than all else.
    """
    raw = tensor.contiguous().view(-1).view(torch.uint8)
    is_aligned = len(raw) % 4 == 0 and raw.storage_offset() % 4 == 0
    words = raw.view(torch.int32) if is_aligned else raw
    return str(int(words.sum(dtype=torch.int64)))


def _check_recipe(recipe: RlRecipe, parallel_model: ParallelModel, remote: bool) -> None:
    single_cpu = parallel_model.ranks.size == 1 and parallel_model.layout.device.type == "cpu"
    if recipe.rl.max_off_policy_steps and not remote and not single_cpu:
        raise ConfigError(
            "rl.max_off_policy_steps above 0 needs engines apart from the trainer, or both wait "
            "for the same processor: start with infir2 launch ray --engines N -- rl ... (one "
            "process on a CPU may try it without)"
        )


def _prove_equal(
    parallel_model: ParallelModel, trainer: dict[str, str], engine: RolloutEngine
) -> str:
    """Compare the trainer's digests with the engine's. Returns one digest of all weights."""

    def compare() -> None:
        if isinstance(engine, OffersDigest):
            _compare(trainer, engine.weights_digest())

    parallel_model.ranks.raise_together(compare)
    return hashlib.sha256(repr(sorted(trainer.items())).encode()).hexdigest()


def _compare(trainer: dict[str, str], engine: dict[str, str]) -> None:
    for name in sorted(trainer.keys() | engine.keys()):
        if trainer.get(name) != engine.get(name):
            state = "differs" if name in trainer and name in engine else "is missing on one side"
            raise CheckFailedError(
                f"{name} {state} between the trainer and the rollout engine: export the trainer's "
                "starting weights again (infir2 export hf, infir2 export fp8) with the same "
                "fp8.scale_format and fp8.skip_modules, or say that they differ: rollout.precision"
            )
