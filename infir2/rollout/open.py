"""Opening the engine a recipe names, and proving that it holds the trainer's weights."""

import hashlib
from pathlib import Path

from infir2.config.schema import RlRecipe
from infir2.errors import CheckFailedError, ConfigError
from infir2.model import Decoder
from infir2.model.hf import exported_fp8_weights, weights_digest
from infir2.rollout.native import NativeEngine
from infir2.rollout.types import Engine


def open_engine(recipe: RlRecipe, model: Decoder, policy_version: int) -> tuple[Engine, str]:
    """The engine of `rollout.model`; its bytes are compared with the trainer's before anything is generated.

    Returns the engine and a digest of its weights.
    A resumed run (`policy_version` > 0) sends the trainer's weights first: the exported file is older.
    Raises CheckFailedError naming the first weight that differs.
    """
    if not recipe.rollout.model:
        raise ConfigError("rollout.model is empty: name the FP8 export of model.path (infir2 export hf, infir2 export fp8)")
    engine = NativeEngine.from_hf(
        Path(recipe.rollout.model), recipe.rollout.max_running_requests, model.compute_dtype, model.head_weight.device
    )
    if policy_version > 0:
        engine.update_weights(exported_fp8_weights(model), policy_version)
    return engine, assert_same_weights(model, engine)


def assert_same_weights(model: Decoder, engine: Engine) -> str:
    """One digest of the weights. Raises CheckFailedError unless trainer and engine hold the same bytes under the same names."""
    ours, theirs = weights_digest(exported_fp8_weights(model)), engine.weights_digest()
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            state = "differs" if name in ours and name in theirs else "is missing on one side"
            raise CheckFailedError(
                f"{name} {state} between the trainer and the rollout engine: export the trainer's start again "
                "(infir2 export hf, infir2 export fp8) with the same fp8.scale_format and fp8.high_precision"
            )
    return hashlib.sha256(repr(sorted(ours.items())).encode()).hexdigest()
