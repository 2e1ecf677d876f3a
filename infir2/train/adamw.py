"""AdamW in one pass over all parameters, clipping included; moments in FP32, smaller, or in the host's memory."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from infir2.numerics.adamw import Hyper, Moments, adamw_, new_moment
from infir2.numerics.weight_cache import local_tensor


class AdamW(torch.optim.Optimizer):
    """AdamW on FP32 masters with moments in "fp32", "bf16" or "fp8" (docs/numerics.md).

    `offload` keeps the moments in pinned host memory and brings them to the parameter's device one parameter at a time.
    `clip`, a [] float32 tensor or None, multiplies the gradients of the next step.
    """

    clip: Tensor | None = None

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        betas: tuple[float, float],
        eps: float,
        states: str,
        offload: bool,
    ) -> None:
        self.moment_dtype, self.offload = states, offload
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            by_step: dict[int, list[Tensor]] = defaultdict(
                list
            )  # one, unless a parameter was without gradient in some step
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter] or self.state.setdefault(parameter, {})
                    state.update({} if state else self.new_state(parameter))
                    state["step"] += 1
                    by_step[int(state["step"])].append(parameter)
            for step, parameters in by_step.items():
                beta1, beta2 = group["betas"]
                hyper = Hyper(step, group["lr"], beta1, beta2, group["eps"], group["weight_decay"])
                for some in (
                    [[parameter] for parameter in parameters] if self.offload else [parameters]
                ):
                    self._update(some, hyper)
        self.clip = None

    def _update(self, parameters: list[Tensor], hyper: Hyper) -> None:
        masters = [local_tensor(parameter) for parameter in parameters]
        device = masters[0].device
        stored = [
            [value for name, value in self.state[parameter].items() if name != "step"]
            for parameter in parameters
        ]
        here = [[value.to(device, non_blocking=True) for value in values] for values in stored]
        gradients = [
            local_tensor(parameter.grad) for parameter in parameters if parameter.grad is not None
        ]
        clip = torch.ones((), device=device) if self.clip is None else self.clip
        adamw_(masters, gradients, [Moments(*values) for values in here], hyper, clip)
        for there, values in zip(stored, here, strict=True):
            for old, new in zip(there, values, strict=True):
                if new is not old:
                    old.copy_(new, non_blocking=True)

    def new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """`step` on the host, zero moments in the order of `Moments`: exp_avg, exp_avg_sq, with "fp8" also their scales."""
        master = local_tensor(parameter)
        (m, m_scale), (v, v_scale) = (
            new_moment(master, self.moment_dtype, "cpu" if self.offload else master.device)
            for _ in range(2)
        )
        scales = (
            {}
            if m_scale is None or v_scale is None
            else {"exp_avg_scale": m_scale, "exp_avg_sq_scale": v_scale}
        )
        return {"step": torch.zeros(()), "exp_avg": m, "exp_avg_sq": v, **scales}
