"""What the objective of RL needs: a loss of one's own, and the reference policy."""

from dataclasses import fields

from infir2.config.paths import check_model_directory
from infir2.config.reward_rules import is_function
from infir2.config.schema import ModelSection, RlSection
from infir2.errors import ConfigError
from infir2.model import ModelConfig
from infir2.preflight.finding import Finding
from infir2.preflight.model import model_facts
from infir2.verify.functions import close_functions, require_function


def check_objective(rl: RlSection, policy: ModelConfig) -> Finding:
    """`rl.loss` can be imported, and `rl.reference` has the policy's shape.

    Raises ConfigError, and CheckpointError for a reference that cannot be read.
    """
    if is_function(rl.loss):
        try:
            require_function(rl.loss)
        except ConfigError as error:
            raise ConfigError(f"rl.loss: {error}") from error
        finally:
            close_functions()
    if not rl.reference:
        return Finding("objective", "ok", rl.loss)
    check_model_directory("rl.reference", rl.reference)
    require_shape(rl.reference, model_facts(ModelSection(path=rl.reference), 0).config, policy)
    return Finding("objective", "ok", f"{rl.loss}, KL to {rl.reference}")


def require_shape(path: str, reference: ModelConfig, policy: ModelConfig) -> None:
    """Raises ConfigError unless the model in `path`, the value of rl.reference, has the policy's
    shape."""
    for field in fields(policy):
        ours, theirs = getattr(policy, field.name), getattr(reference, field.name)
        if not field.name.endswith("_token_id") and ours != theirs:
            raise ConfigError(
                f"rl.reference: {path} has {field.name} = {theirs}, and the policy {ours}; name an "
                "export of the same model."
            )
