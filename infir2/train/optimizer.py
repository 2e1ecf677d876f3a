"""AdamW on FP32 masters (torch's own), with decoupled decay of matrices only."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from infir2.config.schema import OptimizerSection
from infir2.errors import CheckpointError

_STATE_NAMES = ("exp_avg", "exp_avg_sq", "step")


def make_optimizer(model: nn.Module, section: OptimizerSection) -> torch.optim.AdamW:
    """AdamW over the model's parameters; norms, biases and other vectors are not decayed."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": section.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(section.beta1, section.beta2), eps=section.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Moments by parameter name: 'optimizer/NAME/exp_avg', ... (empty before the first step)."""
    return {
        f"optimizer/{name}/{key}": optimizer.state[parameter][key]
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for key in _STATE_NAMES
    }


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`. Raises CheckpointError when a parameter's moments are missing."""
    if not any(name.startswith("optimizer/") for name in tensors):
        return
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        keys = {key: f"optimizer/{name}/{key}" for key in _STATE_NAMES}
        if missing := [key for key in keys.values() if key not in tensors]:
            raise CheckpointError(f"the checkpoint has no {missing[0]}: it was saved by a model with other parameters")
        optimizer.state[parameter] = {key: tensors[stored].to(parameter.device) for key, stored in keys.items()}
