"""Turn the Linears of a module into FP8 ones: our decoder's, a Hugging Face model's, any nn.Module's."""

from fnmatch import fnmatchcase
from typing import Protocol, TypeVar, cast

from torch import nn

from infir2.errors import ConfigError
from infir2.numerics.linear import Fp8Linear

AnyModule = TypeVar("AnyModule", bound=nn.Module)


class Fp8Config(Protocol):
    """What the conversion reads of a recipe's `[fp8]` section."""

    @property
    def enabled(self) -> bool: ...
    @property
    def scale_format(self) -> str: ...
    @property
    def skip_modules(self) -> tuple[str, ...]: ...


def convert_to_fp8(module: AnyModule, fp8: Fp8Config) -> AnyModule:
    """Replace every nn.Linear inside `module`, in place, by an `Fp8Linear` with the same parameters, and return it;
    a module that is itself an nn.Linear has no place to swap in, so its FP8 layer is returned.

    Kept as they are: the language-model head (a module called `lm_head`, the one a Hugging Face model names as its output
    embeddings, or one that shares its weight with an embedding), subclasses of nn.Linear, and modules whose name
    matches a pattern of `fp8.skip_modules`, such as "model.layers.0.*". Nothing happens unless `fp8.enabled`.

    Raises:
        ConfigError: a pattern matches no module.
    """
    if not fp8.enabled:
        return module
    names = [name for name, _ in module.named_modules()]
    for pattern in fp8.skip_modules:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"fp8.skip_modules: {pattern!r} matches no module; use names such as 'model.layers.0.mlp.down_proj'"
            )
    heads = _heads(module)
    layers: dict[nn.Module, Fp8Linear] = {}  # a layer used in two places stays one layer
    for name, child in list(module.named_modules(remove_duplicate=False)):
        if (
            type(child) is not nn.Linear
            or id(child.weight) in heads
            or name.rpartition(".")[2] == "lm_head"
        ):
            continue
        if any(fnmatchcase(name, pattern) for pattern in fp8.skip_modules):
            continue
        if child not in layers:
            layers[child] = Fp8Linear.from_linear(child, fp8.scale_format)
        if child is module:
            return cast(AnyModule, layers[child])
        module.set_submodule(name, layers[child])
    return module


def _heads(module: nn.Module) -> set[int]:
    """Identities of the weights that belong to the embedding or to the head."""
    weights = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    output = getattr(module, "get_output_embeddings", lambda: None)()
    if isinstance(output, nn.Linear):
        weights.add(id(output.weight))
    return weights
