"""What is refused before the first step: schedules that do not fit the data or the branch."""

from typing import Any

import pytest

from infir2.config.schema import ScheduleSection, TrainRecipe, TrainSection
from infir2.errors import ConfigError
from infir2.model import ModelConfig
from infir2.train.plan import check_branch, check_positions, complete_schedule


def schedule_of(**values: Any) -> ScheduleSection:
    return ScheduleSection(**({"kind": "wsd", "learning_rate": 1e-3} | values))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"decay_steps": 100}, "schedule.decay_steps (100) must not exceed"),
        ({"warmup_steps": 21}, "schedule.warmup_steps (21) must not exceed"),
        ({"warmup_fraction": 0.5, "decay_steps": 11}, "plus the warm-up must not exceed"),
        ({"warmup_steps": 9, "decay_steps": 5, "decay_from_step": 8}, "inside the warm-up"),
    ],
)
def test_epochs_too_short_for_the_phases_are_refused(values: dict, sentence: str) -> None:
    recipe = TrainRecipe(schedule=schedule_of(**values), train=TrainSection(epochs=2.0))
    with pytest.raises(ConfigError) as error:
        complete_schedule(recipe, steps_per_epoch=10)
    assert sentence in str(error.value)
    assert "20 steps" in str(error.value)


def test_epochs_that_fit_set_the_length() -> None:
    schedule = schedule_of(warmup_steps=4, decay_steps=6)
    recipe = TrainRecipe(schedule=schedule, train=TrainSection(epochs=1.5))
    assert complete_schedule(recipe, steps_per_epoch=10).total_steps == 15


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"total_steps": 300, "decay_steps": 100}, "schedule.total_steps (300) must be greater"),
        ({"total_steps": 350, "decay_steps": 100}, "set schedule.decay_from_step to 300"),
        (
            {"total_steps": 900, "decay_steps": 100, "decay_from_step": 200},
            "the decay starts at step 200",
        ),
    ],
)
def test_a_branch_before_which_the_decay_lies_is_refused(values: dict, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_branch(schedule_of(**values), 300)
    assert sentence in str(error.value)


def test_a_decay_from_the_branch_on_is_accepted() -> None:
    check_branch(schedule_of(total_steps=400, decay_steps=100, decay_from_step=300), 300)
    check_branch(schedule_of(total_steps=400, decay_steps=100), 300)


@pytest.mark.parametrize(
    ("num_tokens", "prompt_tokens", "sentence"),
    [
        (64, 0, ""),
        (40, 24, ""),
        (65, 0, "key = 65 exceeds the model's 64 positions (max_position_embeddings); set it to "),
        (41, 24, "key = 41 after a prompt of 24 tokens exceeds .* set it to at most 40"),
        (1, 64, "remove the longest prompts"),
    ],
)
def test_positions_that_the_model_lacks_are_refused(
    num_tokens: int, prompt_tokens: int, sentence: str
) -> None:
    sizes = {"vocab_size": 8, "hidden_size": 8, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}
    config = ModelConfig("llama", **sizes, head_dim=4, ffn_size=8, max_positions=64)
    if not sentence:
        check_positions(config, "key", num_tokens, prompt_tokens)
        return
    with pytest.raises(ConfigError, match=sentence.replace("(", r"\(").replace(")", r"\)")):
        check_positions(config, "key", num_tokens, prompt_tokens)
