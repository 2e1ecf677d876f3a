"""Rewards of one's own: functions in processes that can be killed."""

import atexit
import os
import threading
from collections.abc import Sequence
from typing import Any

from infir2.verify.pool import Outcome, Pool

_lock = threading.Lock()
_pools: dict[tuple[int, str], Pool] = {}  # by process id, because of forks, and by function


def call_function(
    name: str, items: Sequence[Sequence[Any]], seconds: float, is_own: bool = True
) -> list[Outcome]:
    """What `module:function` returns for each list of arguments, in order.

    A call that takes longer than `seconds` is killed, and its process is replaced. Only a function
    of the user's own (`is_own`) has this process's keys and as much memory as it wants. Raises
    ConfigError if the function cannot be imported.
    """
    return _pool(name, is_own).run(items, seconds)


def require_function(name: str) -> None:
    """Raises ConfigError if `module:function` cannot be imported."""
    _pool(name).start()


def _pool(name: str, is_own: bool = True) -> Pool:
    with _lock:
        key = (os.getpid(), name)
        if key not in _pools:
            remedy = f"install or fix the module of {name}, or set PYTHONPATH"
            size = min(8, max(2, (os.cpu_count() or 1) // 2))
            own: dict[str, Any] = {"memory_bytes": 0, "has_keys": True} if is_own else {}
            _pools[key] = Pool(name, size, remedy=remedy, **own)
        return _pools[key]


@atexit.register
def close_functions() -> None:
    """Terminate the processes of all functions; the next call starts new ones."""
    with _lock:
        own = [_pools.pop(key) for key in list(_pools) if key[0] == os.getpid()]
    for pool in own:
        pool.close()
