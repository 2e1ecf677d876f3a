"""AdamW on FP32 masters with decoupled decay of matrices only: torch's own on a CPU, ours on a GPU and for smaller moments."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from infir2.config.schema import OptimizerSection
from infir2.errors import CheckpointError
from infir2.numerics.kernels import usable
from infir2.numerics.weight_cache import end_versions, local_tensor
from infir2.parallel.shard_spec import ShardSpec, unsharded
from infir2.train.adamw import AdamW

if TYPE_CHECKING:
    from infir2.checkpoint.dcp import DcpTensors


def make_optimizer(model: nn.Module, section: OptimizerSection) -> torch.optim.Optimizer:
    """AdamW over the model's parameters; norms, biases and other vectors are not decayed."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": section.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    betas = (section.beta1, section.beta2)
    if (
        section.moment_dtype == "fp32"
        and section.grad_dtype == "fp32"
        and not section.offload
        and not usable(matrices[0].device)
    ):
        return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=section.eps, fused=True)
    if section.grad_dtype == "bf16":
        for parameter in (*matrices, *vectors):
            parameter.grad_dtype = torch.bfloat16
    return AdamW(groups, betas, section.eps, section.moment_dtype, section.offload)


def update(
    optimizer: torch.optim.Optimizer,
    gradients: list[Tensor],
    learning_rate: float,
    clip: Tensor | None,
) -> None:
    """One step with `gradients`, this rank's parts of all parameters', multiplied by `clip` [] if it is given."""
    if isinstance(optimizer, AdamW):
        optimizer.clip = clip
    elif clip is not None:
        torch._foreach_mul_(gradients, clip)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    # Cached FP8 codes belong to a version; fused steps and steps of sharded parameters move none.
    end_versions(parameter for group in optimizer.param_groups for parameter in group["params"])


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Moments by parameter name: 'optimizer/NAME/exp_avg', ... (empty before the first step)."""
    if isinstance(optimizer, AdamW) and optimizer.offload and torch.cuda.is_initialized():
        torch.cuda.synchronize()  # a step returns before its moments are back in host memory, which a save reads at once
    return {
        f"optimizer/{name}/{key}": optimizer.state[parameter][key]
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for key in optimizer.state[parameter]
    }


def load_optimizer_tensors(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: "DcpTensors",
    shard_specs: Mapping[str, ShardSpec],
) -> None:
    """Inverse of `optimizer_tensors`: this rank's parts. CheckpointError when a moment is missing or has another format."""
    if not any(name.startswith("optimizer/") for name in tensors):
        return
    for parameter_name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        optimizer.state[parameter] = state = _new_state(optimizer, parameter)
        for key, moment in state.items():
            name, part, spec = (
                f"optimizer/{parameter_name}/{key}",
                local_tensor(moment),
                shard_specs.get(parameter_name),
            )
            if name not in tensors or tensors.dtype(name) != part.dtype:
                states = optimizer.moment_dtype if isinstance(optimizer, AdamW) else "fp32"
                raise CheckpointError(
                    f"the checkpoint's AdamW moments are not in optimizer.moment_dtype = {states!r}; resume with the format it was saved in"
                )
            tensors.read(
                name,
                spec if spec and spec.local_shape == part.shape else unsharded(part.shape),
                part,
            )  # scales are whole


def _new_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    if isinstance(optimizer, AdamW):
        return optimizer.new_state(parameter)
    step = torch.zeros((), device=parameter.device)
    return {"step": step} | {
        key: torch.empty_like(parameter, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")
    }
