"""Compare a response's boxed answer with the reference: RL's reward and the benchmarks' score."""

import atexit
import os
import threading
from collections.abc import Sequence
from typing import cast

from infir2.verify.answers import (
    AnswerFormat,
    extract_answer,
    is_missing_label,
    quick_decision,
    reference_text,
    too_hard,
)
from infir2.verify.pool import UNLIMITED_SECONDS, Pool
from infir2.verify.verdict import Reason, Verdict

ITEM_SECONDS = 5.0

_lock = threading.Lock()
_pools: dict[int, Pool] = {}  # by process id: a forked child cannot use its parent's workers


def check_math(
    response: str,
    answer: str,
    seconds: float = ITEM_SECONDS,
    answer_format: AnswerFormat = "boxed",
) -> Verdict:
    r"""Compare the final answer after a response's last `</think>` with the reference answer.

    The final answer is the last `\boxed{}`; with answer_format "answer_line" also the last line
    `Answer: ...`. Equal spellings and different plain integers are decided in this process in
    microseconds. Other answers are compared in a worker process (equivalence.py), which is killed
    after `seconds` of wall clock. A response that ends inside its think block has no answer. Raises
    ConfigError if workers cannot start.

    Example: check_math("so <think>..</think> \\boxed{1/2}", "\\frac{1}{2}").correct is True.
    """
    return check_math_batch([(response, answer)], seconds, answer_format=answer_format)[0]


def check_math_batch(
    pairs: Sequence[tuple[str, str]],
    item_seconds: float = ITEM_SECONDS,
    batch_seconds: float = UNLIMITED_SECONDS,
    answer_format: AnswerFormat = "boxed",
) -> list[Verdict]:
    """`check_math` of each (response, answer), in order.

    Every item has its own `item_seconds`: one that hangs, dies or runs out of memory does not
    affect the others. If a caller sets `batch_seconds`, items that do not start within them get the
    reason "timeout".
    """
    answers = [extract_answer(response, answer_format) for response, _ in pairs]
    verdicts = [
        _decide_in_process(extracted, reference)
        for extracted, (_, reference) in zip(answers, pairs, strict=True)
    ]
    undecided = [index for index, verdict in enumerate(verdicts) if verdict is None]
    items = [(reference_text(pairs[index][1]), answers[index] or "") for index in undecided]
    outcomes = shared_pool().run(items, item_seconds, batch_seconds) if items else []
    for index, (_, extracted), outcome in zip(undecided, items, outcomes, strict=True):
        reason = cast(Reason, outcome.reason or ("ok" if outcome.value is True else "wrong"))
        verdicts[index] = Verdict(reason, extracted, outcome.detail, outcome.seconds)
    return cast(list[Verdict], verdicts)


def _decide_in_process(extracted: str | None, reference: str) -> Verdict | None:
    if extracted is None:
        return Verdict("no_answer")
    if is_missing_label(reference):  # it would equal its own spelling
        return Verdict("wrong", extracted)
    if (
        len(extracted) <= 10 * len(reference) + 1000
        and (same := quick_decision(reference_text(reference), extracted)) is not None
    ):
        return Verdict("ok" if same else "wrong", extracted)
    if problem := too_hard(extracted):
        return Verdict("wrong", extracted[:100], problem)
    return None


def shared_pool() -> Pool:
    """This process's workers, which start with the first answer that needs them and end at exit."""
    with _lock:
        if os.getpid() not in _pools:
            size = min(16, max(4, (os.cpu_count() or 1) // 2))
            _pools[os.getpid()] = Pool("infir2.verify.equivalence:equivalent", size)
        return _pools[os.getpid()]


@atexit.register
def close_workers() -> None:
    """Terminate the worker processes; the next check starts new ones."""
    with _lock:
        pool = _pools.pop(os.getpid(), None)
    if pool is not None:
        pool.close()
