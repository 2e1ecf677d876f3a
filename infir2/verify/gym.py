"""The tasks of the package reasoning-gym: problems by number and level, and their scorers.

A task's problem is a function of its seed, level and number, so that a process that scores an
answer makes the problem again. The package is an extra: pip install 'infir2[gym]'.
"""

import difflib
from functools import lru_cache
from typing import Any

from infir2.errors import ConfigError

MAX_LEVEL = 50
PROBLEMS = 1 << 30  # of an endless data set; problems are made when they are read


@lru_cache(maxsize=64)
def _dataset(task: str, seed: int, level: int) -> Any:
    from reasoning_gym.factory import CURRICULA, DATASETS, create_dataset

    options = {"seed": seed, "size": PROBLEMS}
    if task not in CURRICULA or not level:
        return create_dataset(task, **options)
    curriculum = CURRICULA[task]()
    curriculum.set_global_level(level)
    return DATASETS[task][0](config=curriculum.generate_configuration(options))


def require_task(task: str) -> None:
    """Raises ConfigError unless the package is installed, has the task, and can make a problem."""
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ConfigError(
            f"rl.reward = reasoning_gym:{task} needs the package reasoning-gym ({error}): "
            "pip install 'infir2[gym]'."
        ) from error
    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, 1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(DATASETS))}."
        raise ConfigError(f"rl.reward = reasoning_gym:{task} is no task of reasoning-gym; {hint}")
    try:
        make_problem(task, 0, 0, 0)
    except Exception as error:  # whatever the package raises
        raise ConfigError(
            f"rl.reward = reasoning_gym:{task} makes no problem ({error}); name another task."
        ) from error


def make_problem(task: str, seed: int, level: int, number: int) -> dict[str, Any]:
    """A problem with its `question` and `answer`; level 0 is the task's own default."""
    problem: dict[str, Any] = _dataset(task, seed, level)[number]
    return problem


def highest_level(task: str, seed: int, level: int) -> int:
    """The highest level up to `level` that the task's curriculum has and that makes a problem."""
    from reasoning_gym.factory import CURRICULA

    steps = CURRICULA[task]().attributes.values() if task in CURRICULA else ()
    level = min(level, MAX_LEVEL, max((len(each.levels) - 1 for each in steps), default=0))
    while level:
        try:
            make_problem(task, seed, level, 0)
            break
        except Exception:  # a level that the package itself refuses
            level -= 1
    return level


def score_answer(
    answer: str | None, question: str, task: str, seed: int, level: int, number: int
) -> float:
    """The score of an answer, 0 to 1. Raises ValueError if the task made another problem."""
    problem = make_problem(task, seed, level, number)
    if problem["question"] != question:
        raise ValueError(f"{task} makes another problem number {number} in another process")
    return float(_dataset(task, seed, level).score_answer(answer, problem))
