"""AdamW whose moments are smaller than FP32, or lie in the host's memory."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from infir2.errors import CheckpointError
from infir2.numerics.adamw import Hyper, adamw_, new_moment


class CompactAdamW(torch.optim.Optimizer):
    """AdamW on FP32 masters with moments in "fp32", "bf16" or "fp8" (docs/numerics.md).

    `offload` keeps the moments in pinned host memory and brings them to the parameter's device one parameter at a time.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], betas: tuple[float, float], eps: float, states: str, offload: bool) -> None:
        self.states, self.offload = states, offload
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(self.new_state(parameter))
        state["step"] += 1
        names = [name for name in ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale") if name in state]
        here = {name: state[name].to(parameter.device, non_blocking=True) for name in names}
        beta1, beta2 = group["betas"]
        hyper = Hyper(int(state["step"]), group["lr"], beta1, beta2, group["eps"], group["weight_decay"])
        moments = (here["exp_avg"], here.get("exp_avg_scale"), here["exp_avg_sq"], here.get("exp_avg_sq_scale"))
        assert parameter.grad is not None
        adamw_(parameter, parameter.grad, *moments, hyper)
        for name in names:
            if here[name] is not state[name]:
                state[name].copy_(here[name], non_blocking=True)

    def new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Zero moments: exp_avg and exp_avg_sq, with "fp8" also their scales; `step` on the host."""
        device = "cpu" if self.offload else parameter.device
        state = {"step": torch.zeros(())}
        for name in ("exp_avg", "exp_avg_sq"):
            moment, scale = new_moment(parameter, self.states, device)
            state[name] = moment
            if scale is not None:
                state[f"{name}_scale"] = scale
        return state

    def load_state(self, parameter: Tensor, stored: dict[str, Tensor | None]) -> None:
        """Take the moments of a checkpoint. Raises CheckpointError where they have another format."""
        state = self.new_state(parameter)
        for name, moment in state.items():
            found = stored[name]
            if found is None or found.shape != moment.shape or found.dtype != moment.dtype:
                raise CheckpointError(
                    f"the checkpoint's AdamW moments are not in optimizer.states = {self.states!r}; resume with the format it was saved in"
                )
            moment.copy_(found)
        self.state[parameter] = state
