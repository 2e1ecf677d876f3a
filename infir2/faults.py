"""Named points where a test injects a fault; `fault("save.before_rename")` is a no-op by default.

The environment variable `INFIR2_FAULTS` holds a comma-separated list of `point:n[:action]`: when
this process passes `point` for the n-th time (counted from 1), it performs `action`.

    kill     SIGKILL to this process, which cannot clean up (default)
    term     SIGTERM to this process, as from a scheduler that preempts it
    exit     exit with code 1 immediately, as a library that aborts
    enospc   raise the OSError of a full disk
    nan      return True: the caller replaces its value by NaN
    hang     sleep forever

Example: `INFIR2_FAULTS=save.after_shard:2,train.step:7:term`.
"""

import errno
import functools
import os
import signal
import threading
import time
from collections import Counter

from infir2.errors import ConfigError

VARIABLE = "INFIR2_FAULTS"

POINTS = (
    "save.before_shard",  # before each tensor file of a checkpoint
    "save.after_shard",  # a tensor file is written and synced
    "save.before_manifest",  # all files but the manifest are written
    "save.before_rename",  # the checkpoint is complete under its temporary name
    "save.after_rename",  # the checkpoint is published; older ones are not yet removed
    "save.during_retention",  # an old checkpoint is renamed; its files are not yet deleted
    "train.start",  # model and data are loaded; no step is done
    "train.step",  # before each optimizer step
    "train.loss",  # the loss of a micro-batch is computed
    "validate",  # before each micro-batch of a validation
    "rollout.group",  # all responses of a group are complete, but not yet in the journal
    "evaluate",  # for each response of an evaluation that has ended, once it is kept
)
ACTIONS = ("kill", "term", "exit", "enospc", "nan", "hang")

_passes: Counter[str] = Counter()
_passes_lock = threading.Lock()


@functools.lru_cache(maxsize=8)
def parse_faults(text: str) -> dict[tuple[str, int], str]:
    """{(point, n): action} of an `INFIR2_FAULTS` value.

    Raises ConfigError for an unknown point or action and for a malformed item.
    """
    faults = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        point, _, rest = item.partition(":")
        number, _, action = rest.partition(":")
        if point not in POINTS:
            raise ConfigError(
                f"{VARIABLE}: unknown point '{point}'; the points are {', '.join(POINTS)}."
            )
        if not number.isdecimal() or int(number) < 1:
            raise ConfigError(f"{VARIABLE}: '{item}' must be point:n[:action] with n >= 1.")
        if (action or "kill") not in ACTIONS:
            raise ConfigError(
                f"{VARIABLE}: unknown action '{action}' in '{item}'; "
                f"the actions are {', '.join(ACTIONS)}."
            )
        faults[point, int(number)] = action or "kill"
    return faults


def fault(point: str) -> bool:
    """Pass a named point, and perform the action that `INFIR2_FAULTS` names for it.

    Returns True for `nan`. Raises OSError (ENOSPC) for `enospc`.
    """
    text = os.environ.get(VARIABLE)
    if not text:
        return False
    faults = parse_faults(text)
    assert point in POINTS, f"fault point {point!r} is missing from POINTS"
    with _passes_lock:  # several threads write the files of a checkpoint
        _passes[point] += 1
        action = faults.get((point, _passes[point]))
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    elif action == "exit":
        os._exit(1)
    elif action == "enospc":
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} (injected at {point})")
    elif action == "hang":
        time.sleep(1e6)
    return action == "nan"
