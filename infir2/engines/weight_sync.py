"""Opening the engine a recipe names, and proving that it holds the trainer's weights."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from infir2.config.schema import RlRecipe
from infir2.engines.native import NativeEngine
from infir2.engines.ray import RayEngines
from infir2.engines.types import Engine
from infir2.errors import CheckFailedError, ConfigError
from infir2.launch.ray import ENGINES
from infir2.model.hf_names import weights_digest
from infir2.parallel.parallel_model import ParallelModel


def open_engine(
    recipe: RlRecipe, parallel_model: ParallelModel, policy_version: int
) -> tuple[Engine, str]:
    """This rank's engine of `rollout.model`, or all ranks' where the launcher made room for engines apart.

    Its bytes are compared with the trainer's before anything is generated.
    Returns the engine and a digest of its weights.
    A resumed run (`policy_version` > 0) sends the trainer's weights first: the exported file is older.
    Raises CheckFailedError naming the first weight that differs.
    """
    if not recipe.rollout.model:
        raise ConfigError(
            "rollout.model is empty: name the FP8 export of model.path (infir2 export hf, infir2 export fp8)"
        )
    apart = bool(os.environ.get(ENGINES))
    if (
        recipe.rl.asynchronous
        and not apart
        and (parallel_model.ranks.size > 1 or parallel_model.layout.device.type != "cpu")
    ):
        raise ConfigError(
            "rl.asynchronous needs engines apart from the trainer, for otherwise both wait for the same processor: start with "
            "infir2 launch ray --engines N -- rl ... (one process on a CPU may try it without)"
        )
    section, dtype = recipe.rollout, parallel_model.model.compute_dtype
    engine: Engine
    if apart:
        engine = RayEngines(section, dtype, parallel_model.ranks, recipe.parallel.timeout_seconds)
    else:
        engine = NativeEngine.from_hf(
            Path(section.model), section.max_running_requests, dtype, parallel_model.layout.device
        )
    if policy_version > 0:
        return engine, publish(parallel_model, engine, policy_version)
    return engine, _assert_same(parallel_model, weights_digest(parallel_model.exported()), engine)


def publish(parallel_model: ParallelModel, engine: Engine, policy_version: int) -> str:
    """Send the trainer's weights to the engine. Returns and raises as `open_engine`; every rank calls it at the same point."""
    ours: dict[str, str] = {}

    def passing() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in parallel_model.exported():
            ours.update(weights_digest([(name, tensor)]))
            yield name, tensor

    engine.update_weights(passing(), policy_version)
    return _assert_same(parallel_model, ours, engine)


def _assert_same(parallel_model: ParallelModel, ours: dict[str, str], engine: Engine) -> str:
    """One digest of the weights. Raises CheckFailedError unless trainer and engine hold the same bytes under the same names."""

    def compare() -> None:
        theirs = engine.weights_digest()
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                state = "differs" if name in ours and name in theirs else "is missing on one side"
                raise CheckFailedError(
                    f"{name} {state} between the trainer and the rollout engine: export the trainer's start again "
                    "(infir2 export hf, infir2 export fp8) with the same fp8.scale_format and fp8.skip_modules"
                )

    parallel_model.ranks.raise_together(compare)
    return hashlib.sha256(repr(sorted(ours.items())).encode()).hexdigest()
