"""Convert the Linears of any nn.Module to FP8: our decoder's or a Hugging Face model's."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import NoReturn, TypeVar, cast

from torch import Tensor, nn

from infir2.errors import ConfigError
from infir2.numerics.linear import Fp8Linear

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def convert_to_fp8(
    module: AnyModule, scale_format: str = "pow2", skip_modules: Sequence[str] = ()
) -> AnyModule:
    """Replace every nn.Linear inside `module` by an `Fp8Linear`, in place, and return the module.

    A module that is itself an nn.Linear cannot be replaced in place: its FP8 layer is returned, and
    the nn.Linear must not be trained any more.

    An FP32 parameter is shared with the FP8 layer. A BF16 or FP16 parameter is replaced by a new
    FP32 master, so build the optimizer after the conversion: one that holds a replaced parameter
    raises RuntimeError at its first `step` or `zero_grad`. The memory of parameters that are
    replaced inside `module` is freed.

    Not converted: the language-model head (a module named `lm_head`, the output embeddings of a
    Hugging Face model, or a Linear that shares its weight with an embedding), subclasses of
    nn.Linear, and `skip_modules`.

    Args:
        module: any nn.Module; parameters may be on the meta device.
        scale_format: "pow2" or "fp32", see `infir2.numerics.formats`.
        skip_modules: shell-style patterns of module names, such as "model.layers.0.*".

    Raises:
        ConfigError: a pattern matches no module.
        ValueError: unknown scale format.
    """
    _check_patterns(module, skip_modules)
    old_parameters = list(module.parameters())
    heads = _head_weights(module)
    masters: dict[Tensor, nn.Parameter] = {}  # tied weights stay tied
    layers: dict[nn.Module, Fp8Linear] = {}  # a layer that is used twice stays one layer
    converted: nn.Module = module
    for name, child in list(module.named_modules(remove_duplicate=False)):
        if type(child) is not nn.Linear or id(child.weight) in heads:
            continue
        if name.rpartition(".")[2] == "lm_head" or _matches(name, skip_modules):
            continue
        if child not in layers:
            layers[child] = Fp8Linear.from_linear(child, scale_format, masters)
        if child is module:
            converted = layers[child]
        else:
            module.set_submodule(name, layers[child])
    _mark_replaced(old_parameters, converted, free=converted is module)
    return cast(AnyModule, converted)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _check_patterns(module: nn.Module, skip_modules: Sequence[str]) -> None:
    names = [name for name, _ in module.named_modules()]
    for pattern in skip_modules:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"fp8.skip_modules: {pattern!r} matches no module; "
                "use names such as 'model.layers.0.mlp.down_proj'"
            )


def _head_weights(module: nn.Module) -> set[int]:
    """Ids of the weights of embeddings and of the output projection."""
    weights = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    output = getattr(module, "get_output_embeddings", lambda: None)()
    if isinstance(output, nn.Linear):
        weights.add(id(output.weight))
    return weights


class ReplacedParameter(nn.Parameter):
    """A parameter that no layer uses any more; reading its gradient raises.

    Every torch optimizer reads `.grad` before it updates a parameter, foreach and fused ones too.
    """

    @property
    def grad(self) -> NoReturn:
        raise RuntimeError(
            "convert_to_fp8 replaced this parameter by an FP32 master, which the optimizer does "
            "not hold; build the optimizer from model.parameters() after convert_to_fp8"
        )

    @grad.setter
    def grad(self, value: object) -> None:
        self.grad  # noqa: B018 (raises)


def _mark_replaced(old: Sequence[nn.Parameter], converted: nn.Module, free: bool) -> None:
    """Mark parameters that `converted` does not use any more, and free their memory on request."""
    used = {id(parameter) for parameter in converted.parameters()}
    for parameter in old:
        if id(parameter) not in used:
            parameter.__class__ = ReplacedParameter
            if free:
                parameter.data = parameter.new_empty(0)
