"""Is the boxed answer of a response the reference answer? The reward of mathematics RL and the score of the benchmarks."""

import atexit
import os
import threading
from collections.abc import Sequence
from typing import cast

from infir2.verify.answers import extract_answer, quick_decision, reference_text, too_hard
from infir2.verify.pool import Pool
from infir2.verify.verdict import Reason, Verdict

ITEM_SECONDS = 5.0
BATCH_SECONDS = 600.0

_lock = threading.Lock()
_pools: dict[int, Pool] = {}  # by process id: a forked child has no part in its parent's workers


def check_math(response: str, answer: str, seconds: float = ITEM_SECONDS) -> Verdict:
    r"""Compare the last `\boxed{}` after the last `</think>` of a response with the reference answer.

    Equal spellings, and different plain integers, are decided here in microseconds; anything else goes to the
    math-verify library in a worker process that is killed after `seconds` of wall clock. Raises ConfigError when workers
    cannot start. A response that stops inside its think block has no answer.

    Example: check_math("so <think>..</think> \\boxed{1/2}", "\\frac{1}{2}").correct is True.
    """
    return check_math_batch([(response, answer)], seconds)[0]


def check_math_batch(
    pairs: Sequence[tuple[str, str]],
    item_seconds: float = ITEM_SECONDS,
    batch_seconds: float = BATCH_SECONDS,
) -> list[Verdict]:
    """`check_math` of each (response, answer), in order. An item that hangs, dies or exhausts memory costs its neighbours nothing.

    Items that are not begun within `batch_seconds` get the reason "timeout".
    """
    verdicts = [_decide_here(response, answer) for response, answer in pairs]
    places = [place for place, found in enumerate(verdicts) if found is None]
    items = [
        (reference_text(pairs[place][1]), extract_answer(pairs[place][0]) or "") for place in places
    ]
    outcomes = shared_pool().run(items, item_seconds, batch_seconds) if items else []
    for place, (_, found), outcome in zip(places, items, outcomes, strict=True):
        reason = cast(Reason, outcome.reason or ("ok" if outcome.value is True else "wrong"))
        verdicts[place] = Verdict(reason, found, outcome.detail, outcome.seconds)
    return cast(list[Verdict], verdicts)


def _decide_here(response: str, answer: str) -> Verdict | None:
    found = extract_answer(response)
    if found is None:
        return Verdict("no_answer")
    if (
        len(found) <= 10 * len(answer) + 1000
        and (same := quick_decision(reference_text(answer), found)) is not None
    ):
        return Verdict("ok" if same else "wrong", found)
    if problem := too_hard(found):
        return Verdict("wrong", found[:100], problem)
    return None


def shared_pool() -> Pool:
    """The workers of this process: started by the first answer that needs the library, ended at exit."""
    with _lock:
        if os.getpid() not in _pools:
            size = min(16, max(4, (os.cpu_count() or 1) // 2))
            _pools[os.getpid()] = Pool("infir2.verify.equivalence:equivalent", size)
        return _pools[os.getpid()]


@atexit.register
def close_workers() -> None:
    """End the worker processes now; the next check starts new ones."""
    with _lock:
        pool = _pools.pop(os.getpid(), None)
    if pool is not None:
        pool.close()
