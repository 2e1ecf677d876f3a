"""The tasks of the package reasoning-gym: problems by number and level, and their scorers.

A task's problem is a function of its seed, level and number, so that a process that scores an
answer makes the problem again. The package is an extra: pip install 'infir2[gym]'.

Some scorers evaluate an answer as Python, which a model has written: an audit hook of the process
that scores refuses it, and what a program would do.
"""

import difflib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from infir2.errors import ConfigError
from infir2.verify.functions import call_function

SCORER = f"{__name__}:score_answer"
EVALUATES = "its scorer evaluates the answer as a program"
REFUSED = (
    *("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.kill", "subprocess.", "socket."),
    *("os.remove", "os.rename", "os.rmdir", "os.truncate", "os.mkdir", "ctypes."),
)
TRIAL_SECONDS = 60.0
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


def require_task(task: str, seconds: float = TRIAL_SECONDS) -> None:
    """Raises ConfigError unless the package is installed, has the task, and makes a problem whose
    answer the task's scorer accepts, within `seconds`."""
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
    _require_scorer(task, seconds)


def _require_scorer(task: str, seconds: float) -> None:
    """Raises ConfigError for a task that makes no problem, or whose scorer rejects its answer.

    A process with bounded memory tries it: some tasks make all their problems at once.
    """
    item = (None, None, task, 0, 0, 0)
    (outcome,) = call_function(SCORER, [item], seconds, is_own=False)
    if EVALUATES in outcome.detail:
        cause = (
            "its scorer evaluates answers as programs, which infir2 does not do with a model's text"
        )
    elif outcome.reason:
        detail = f"{outcome.reason}: {outcome.detail}"
        cause = f"it makes no problem whose own answer can be scored ({detail})"
    elif not outcome.value:
        cause = "its scorer gives nothing for the answer of its own problem"
    else:
        return
    raise ConfigError(f"rl.reward = reasoning_gym:{task}: {cause}; name another task.")


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


def prepare() -> None:
    """Of a process that scores: import the package, and install the guard."""
    import reasoning_gym.factory  # noqa: F401

    sys.dont_write_bytecode = True
    sys.addaudithook(_guard)


def score_answer(
    answer: str | None, question: str | None, task: str, seed: int, level: int, number: int
) -> float | None:
    """The score of an answer, 0 to 1; None if the task makes another problem in this process.

    Without a question it is a trial: the problem's own answer is scored. Raises what the scorer
    raises, and RuntimeError if it evaluates the answer as a program.
    """
    try:
        problem = make_problem(task, seed, level, number)
    except Exception:  # whatever the package raises
        if question is None:
            raise
        return None
    if question is None:
        answer = str(problem["answer"])
    elif problem["question"] != question:
        return None
    with _guard.scoring():
        return float(_dataset(task, seed, level).score_answer(answer, problem))


class _Guard:
    """An audit hook: while an answer is scored, no text becomes a program, and none acts."""

    def __init__(self) -> None:
        self._is_on = self._has_refused = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._is_on and _is_refused(event, arguments):
            self._has_refused = True
            raise RuntimeError(EVALUATES)

    @contextmanager
    def scoring(self) -> Iterator[None]:
        self._is_on, self._has_refused = True, False
        try:
            yield
        finally:
            self._is_on = False
            if self._has_refused:  # the scorer may have caught the error
                raise RuntimeError(EVALUATES)


def _is_refused(event: str, arguments: tuple[Any, ...]) -> bool:
    if event == "compile":  # from a text and not, as imports, from a file
        return not isinstance(arguments[1], str) or not os.path.isfile(arguments[1])
    if event == "open":
        return bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return event.startswith(REFUSED)


_guard = _Guard()
