"""AdamW on FP32 masters, with weight decay of matrices only.

On a CPU with FP32 moments and gradients this is torch's fused AdamW; otherwise ours, which updates
all parameters in one pass, clips in the same pass, and can keep moments in BF16, in 8 bits, or in
the host's memory."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from infir2.config.schema import OptimizerSection
from infir2.errors import CheckpointError
from infir2.numerics.adamw import adamw_
from infir2.numerics.adamw_reference import Hyper, Moments, new_moment
from infir2.numerics.kernels import usable
from infir2.numerics.weight_cache import end_versions, local_tensor
from infir2.parallel.shard_spec import ShardSpec, unsharded

if TYPE_CHECKING:
    from infir2.checkpoint.dcp import DcpTensors


def make_optimizer(model: nn.Module, section: OptimizerSection) -> torch.optim.Optimizer:
    """AdamW over the model's parameters; norms, biases and other vectors have no weight decay."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": section.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    betas = (section.beta1, section.beta2)
    fp32 = section.moment_dtype == "fp32" and section.grad_dtype == "fp32"
    if fp32 and not section.offload and not usable(matrices[0].device):
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
    """One optimizer step.

    Args:
        optimizer: from `make_optimizer`.
        gradients: the local gradients of all parameters.
        learning_rate: of this step.
        clip: [] float32, multiplies the gradients; None for no clipping.
    """
    if isinstance(optimizer, AdamW):
        optimizer.clip = clip
    elif clip is not None:
        torch._foreach_mul_(gradients, clip)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    # Cached FP8 codes belong to a version; fused steps and steps of sharded parameters move none.
    end_versions(parameter for group in optimizer.param_groups for parameter in group["params"])


class AdamW(torch.optim.Optimizer):
    """AdamW on FP32 masters with moments in "fp32", "bf16" or "fp8" (docs/numerics.md).

    Attributes:
        clip: [] float32 or None; multiplies the gradients of the next step.
        moment_dtype: format of the moments.
        offload: keep the moments in pinned host memory and move them to the parameter's device one
            parameter at a time.
    """

    clip: Tensor | None = None

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        betas: tuple[float, float],
        eps: float,
        moment_dtype: str,
        offload: bool,
    ) -> None:
        self.moment_dtype, self.offload = moment_dtype, offload
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            # One entry, unless some parameter had no gradient in an earlier step.
            by_step: dict[int, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter] or self.state.setdefault(parameter, {})
                    state.update({} if state else self.new_state(parameter))
                    state["step"] += 1
                    by_step[int(state["step"])].append(parameter)
            for step, parameters in by_step.items():
                beta1, beta2 = group["betas"]
                hyper = Hyper(step, group["lr"], beta1, beta2, group["eps"], group["weight_decay"])
                batches = (
                    [[parameter] for parameter in parameters] if self.offload else [parameters]
                )
                for batch in batches:
                    self._update(batch, hyper)
        self.clip = None

    def _update(self, parameters: list[Tensor], hyper: Hyper) -> None:
        masters = [local_tensor(parameter) for parameter in parameters]
        device = masters[0].device
        stored = [
            [value for name, value in self.state[parameter].items() if name != "step"]
            for parameter in parameters
        ]
        moments = [[value.to(device, non_blocking=True) for value in values] for values in stored]
        gradients = [local_tensor(p.grad) for p in parameters if p.grad is not None]
        clip = torch.ones((), device=device) if self.clip is None else self.clip
        adamw_(masters, gradients, [Moments(*values) for values in moments], hyper, clip)
        for stored_values, values in zip(stored, moments, strict=True):
            for old, new in zip(stored_values, values, strict=True):
                if new is not old:
                    old.copy_(new, non_blocking=True)

    def new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """State of a parameter before its first step.

        `step` on the host, and zero moments in the order of `Moments`: exp_avg, exp_avg_sq, and for
        "fp8" their scales.
        """
        master = local_tensor(parameter)
        device = torch.device("cpu") if self.offload else master.device
        m, m_scale = new_moment(master, self.moment_dtype, device)
        v, v_scale = new_moment(master, self.moment_dtype, device)
        state = {"step": torch.zeros(()), "exp_avg": m, "exp_avg_sq": v}
        if m_scale is not None and v_scale is not None:
            state |= {"exp_avg_scale": m_scale, "exp_avg_sq_scale": v_scale}
        return state


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State by parameter name: 'optimizer/NAME/exp_avg', ...; empty before the first step."""
    if isinstance(optimizer, AdamW) and optimizer.offload and torch.cuda.is_initialized():
        # A step returns before its moments are back in host memory, and a save reads them at once.
        torch.cuda.synchronize()
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
    """Load this rank's shards of what `optimizer_tensors` saved; nothing if the checkpoint has
    none.

    Raises:
        CheckpointError: a moment is missing or has another format.
    """
    if not any(name.startswith("optimizer/") for name in tensors):
        return
    for parameter_name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        optimizer.state[parameter] = state = _new_state(optimizer, parameter)
        spec = shard_specs.get(parameter_name)
        for key, moment in state.items():
            name, local = f"optimizer/{parameter_name}/{key}", local_tensor(moment)
            if name not in tensors or tensors.dtype(name) != local.dtype:
                expected = optimizer.moment_dtype if isinstance(optimizer, AdamW) else "fp32"
                raise CheckpointError(
                    "the checkpoint's AdamW moments are not in "
                    f"optimizer.moment_dtype = {expected!r}; resume with the format it was saved in"
                )
            # `step` and the scales of 8-bit moments are not sharded.
            sharded = spec is not None and spec.local_shape == local.shape
            tensors.read_into(name, spec if spec and sharded else unsharded(local.shape), local)


def _new_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    if isinstance(optimizer, AdamW):
        return optimizer.new_state(parameter)
    moments = ("exp_avg", "exp_avg_sq")
    state = {key: torch.empty_like(parameter, requires_grad=False) for key in moments}
    return {"step": torch.zeros((), device=parameter.device)} | state
