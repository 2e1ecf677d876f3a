"""Values that are possible but hardly meant, such as a learning rate of 2: `infir2 check` asks."""

from collections.abc import Iterator, Mapping
from typing import Any

# {dotted key: (lowest, highest) usual value}; wide enough for toy models and for 7B.
USUAL = {
    "model.shape.rope_theta": (1e3, 1e8),
    "model.shape.rms_eps": (1e-8, 1e-4),
    "model.shape.init_std": (0, 0.5),
    "optimizer.beta1": (0.5, 0.99),
    "optimizer.beta2": (0.9, 0.9999),
    "optimizer.eps": (1e-20, 1e-5),
    "optimizer.weight_decay": (0, 0.5),
    "optimizer.clip_norm": (0, 100),
    "schedule.learning_rate": (1e-9, 1e-2),
    "schedule.warmup_fraction": (0, 0.5),
    "train.epochs": (0, 50),
    "rl.group_size": (2, 512),
    "rl.mini_batches": (1, 64),
    "rl.clip_low": (0.01, 0.5),
    "rl.clip_high": (0.01, 1),
    "rl.correction_cap": (1, 10),
    "rl.temperature": (0.3, 2),
    "rl.overlong_penalty": (0, 2),
    "rl.max_mismatch_kl": (1e-4, 1),
    "rl.max_mismatch_prob_error": (1.001, 10),
    "evaluate.temperature": (0, 2),
}


def unusual_values(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield a phrase for each value of a recipe (by dotted key) that was hardly meant."""
    for key, (lowest, highest) in USUAL.items():
        value = values.get(key)
        if value is not None and not lowest <= value <= highest:
            yield f"{key} = {value:g} is outside the usual {lowest:g} to {highest:g}"
    beta1, beta2 = (values.get(f"optimizer.beta{n}", n) for n in (1, 2))
    if beta1 > beta2:
        yield f"optimizer.beta1 = {beta1:g} is above optimizer.beta2 = {beta2:g}"
    total, warmup = (values.get(f"schedule.{name}_steps", 0) for name in ("total", "warmup"))
    if total and warmup > total / 2:
        yield f"schedule.warmup_steps = {warmup} is more than half of total_steps = {total}"
    yield from _without_effect(values)


def _without_effect(values: Mapping[str, Any]) -> Iterator[str]:
    """Phrases about schedules and penalties that do not do what their keys say."""
    kind, decay = values.get("schedule.kind"), values.get("schedule.decay_steps", 0)
    if values.get("schedule.final_learning_rate") and (
        kind == "constant" or (kind == "wsd" and not decay)
    ):
        yield "schedule.final_learning_rate has no effect without a decay"
    total, start = values.get("schedule.total_steps", 0), values.get("schedule.decay_from_step", -1)
    if 0 <= start < total - decay:
        yield f"the decay ends at step {start + decay}, before schedule.total_steps = {total}"
    if values.get("rl.overlong_penalty", 1) != 1 and not values["rl.overlong_buffer_tokens"]:
        yield "rl.overlong_penalty has no effect without rl.overlong_buffer_tokens"
