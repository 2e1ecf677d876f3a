"""Learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

import math

from infir2.config.schema import ScheduleSection


def warmup_steps(schedule: ScheduleSection) -> int:
    """Length of the linear warm-up in optimizer steps."""
    return schedule.warmup_steps or round(schedule.warmup_fraction * schedule.total_steps)


def learning_rate(schedule: ScheduleSection, step: int) -> float:
    """Learning rate of optimizer step `step` (the first step is 1).

    wsd: linear warm-up, stable at the peak, then a decay of `decay_steps` to `final_learning_rate`
    (arXiv 2404.06395, section 4); cosine: warm-up, then a half cosine over the rest; constant:
    warm-up, then the peak.
    """
    peak, final = schedule.learning_rate, schedule.final_learning_rate
    warmup = warmup_steps(schedule)
    if step <= warmup:
        return peak * step / warmup
    if schedule.kind == "constant":
        return peak
    if schedule.kind == "cosine":
        return _fall(peak, final, (step - warmup) / max(1, schedule.total_steps - warmup), "cosine")
    start = schedule.decay_from_step
    if start < 0:
        start = schedule.total_steps - schedule.decay_steps
    if step <= start or schedule.decay_steps == 0:
        return peak
    return _fall(peak, final, (step - start) / schedule.decay_steps, schedule.decay_shape)


def _fall(peak: float, final: float, progress: float, shape: str) -> float:
    progress = min(1.0, progress)
    share = 0.5 * (1 + math.cos(math.pi * progress)) if shape == "cosine" else 1 - progress
    return final + (peak - final) * share
