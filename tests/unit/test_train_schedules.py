"""Learning-rate curves against their closed forms."""

import math

import pytest

from infir2.config.schema import ScheduleSection
from infir2.train.schedules import learning_rate

WSD = ScheduleSection(
    kind="wsd",
    learning_rate=1e-4,
    final_learning_rate=1e-5,
    warmup_steps=10,
    total_steps=100,
    decay_steps=20,
)


def test_wsd_warms_up_stays_and_decays() -> None:
    assert learning_rate(WSD, 1) == pytest.approx(1e-5)
    assert learning_rate(WSD, 10) == learning_rate(WSD, 80) == 1e-4
    assert learning_rate(WSD, 90) == pytest.approx(5.5e-5)
    assert learning_rate(WSD, 100) == pytest.approx(1e-5)


def test_wsd_decay_from_a_stable_step_is_the_same_curve_moved() -> None:
    early = WSD.model_copy(update={"decay_from_step": 40, "total_steps": 60})
    assert [learning_rate(early, 40 + i) for i in range(21)] == [
        learning_rate(WSD, 80 + i) for i in range(21)
    ]


def test_linear_decay() -> None:
    linear = WSD.model_copy(update={"decay_shape": "linear", "final_learning_rate": 0.0})
    assert learning_rate(linear, 95) == pytest.approx(0.25e-4)


def test_cosine_with_a_fractional_warmup() -> None:
    cosine = ScheduleSection(
        kind="cosine",
        learning_rate=2e-5,
        final_learning_rate=2e-6,
        warmup_fraction=0.05,
        total_steps=200,
    )
    assert learning_rate(cosine, 5) == pytest.approx(1e-5)
    assert learning_rate(cosine, 105) == pytest.approx(
        2e-6 + 1.8e-5 * 0.5 * (1 + math.cos(math.pi / 2))
    )
    assert learning_rate(cosine, 200) == pytest.approx(2e-6)


def test_constant_after_warmup() -> None:
    constant = ScheduleSection(kind="constant", learning_rate=1e-6, warmup_steps=4, total_steps=10)
    assert [learning_rate(constant, step) for step in (2, 4, 10)] == [5e-7, 1e-6, 1e-6]
