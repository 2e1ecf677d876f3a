"""Convert the Linears of any nn.Module to FP8: our decoder's or a Hugging Face model's."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import NoReturn, TypeVar, cast

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from infir2.errors import ConfigError
from infir2.numerics.formats import TILE_BLOCK, check_format
from infir2.numerics.linear import Fp8Linear
from infir2.numerics.weight_cache import local_tensor

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
    nn.Linear, and `skip_modules`. Layers that are FP8 already stay as they are.

    Args:
        module: any nn.Module; parameters may be on the meta device.
        scale_format: "pow2" or "fp32", see `infir2.numerics.formats`.
        skip_modules: shell-style patterns of module names, such as "model.layers.0.*"; a module
            that is no Linear stands for the Linears inside it.

    Raises:
        ConfigError: a pattern matches no Linear, the module has none to convert, or some are
            sharded already, or FP8 in another scale format.
        ValueError: unknown scale format.
    """
    check_format(TILE_BLOCK, scale_format)
    skip_modules = (skip_modules,) if isinstance(skip_modules, str) else skip_modules
    found = _convertible(module)
    _check(module, found, scale_format, skip_modules)
    old_parameters = list(module.parameters())
    masters: dict[Tensor, nn.Parameter] = {}  # tied weights stay tied
    layers: dict[nn.Module, Fp8Linear] = {}  # a layer that is used twice stays one layer
    converted: nn.Module = module
    for name, child in found.items():
        if isinstance(child, Fp8Linear) or _matches(name, skip_modules):
            continue
        if child not in layers:
            layers[child] = Fp8Linear.from_linear(child, scale_format, masters)
        if child is module:
            converted = layers[child]
        else:
            module.set_submodule(name, layers[child])
    _mark_replaced(old_parameters, converted, free=converted is module)
    return cast(AnyModule, converted)


def _convertible(module: nn.Module) -> dict[str, nn.Linear]:
    """The Linears that are FP8 or can be, by name; one that is used twice has two names."""
    heads = _head_weights(module)
    return {
        name: child
        for name, child in module.named_modules(remove_duplicate=False)
        if isinstance(child, Fp8Linear)
        or (
            type(child) is nn.Linear
            and id(child.weight) not in heads
            and name.rpartition(".")[2] != "lm_head"
        )
    }


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern matches a module's name, or that of a module around it."""
    parts = name.split(".")
    names = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(fnmatchcase(outer, pattern) for outer in names for pattern in patterns)


def _check(
    module: nn.Module, found: dict[str, nn.Linear], scale_format: str, skip_modules: Sequence[str]
) -> None:
    """Raise ConfigError for what `convert_to_fp8` would ignore. `found`: of `_convertible`."""
    if not found:
        raise ConfigError(
            f"convert_to_fp8: {type(module).__name__} has no nn.Linear besides heads, so nothing "
            "would be FP8; subclasses and other classes (Conv1D of GPT-2) are not converted"
        )
    sharded = [
        name for name, child in found.items() if child.weight is not local_tensor(child.weight)
    ]
    if sharded:
        raise ConfigError(
            f"convert_to_fp8: the weight of {sharded[0]!r} is sharded already; call convert_to_fp8 "
            "before fully_shard, which remembers the layers that it finds"
        )
    if any(isinstance(child, DistributedDataParallel) for child in module.modules()):
        raise ConfigError(
            "convert_to_fp8: call it before DistributedDataParallel, which remembers the parameters"
        )
    linears = [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]
    for pattern in skip_modules:
        if not any(_matches(name, (pattern,)) for name in linears):
            raise ConfigError(
                f"fp8.skip_modules: {pattern!r} matches no Linear of the model; "
                f"use names such as {next(iter(found))!r}"
            )
    formats = {child.scale_format for child in found.values() if isinstance(child, Fp8Linear)}
    if others := formats - {scale_format}:
        raise ConfigError(
            f"convert_to_fp8: some layers are FP8 already, with scale_format={min(others)!r}; "
            f"build the model anew to convert it with {scale_format!r}"
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
