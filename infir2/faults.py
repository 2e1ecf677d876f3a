"""Named places where a test can strike: `fault("save.before_rename")` does nothing unless `INFIR2_FAULTS` is set.

`INFIR2_FAULTS` is a comma-separated list of `point:n[:action]`: at the n-th passing of `point` (counted from 1 in this
process) do `action`. Actions: `kill` (default; SIGKILL to this process, nothing can clean up), `term` (SIGTERM, as a
scheduler that preempts), `exit` (this process ends by itself, as a library that aborts), `enospc` (OSError as from a full
disk), `nan` (the value at hand becomes NaN), `hang` (sleep for ever).
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
    "save.after_shard",  # a tensor file is complete and synced
    "save.before_manifest",  # all files but the manifest are there
    "save.before_rename",  # the checkpoint is complete under its temporary name
    "save.after_rename",  # published, older ones not yet removed
    "save.during_retention",  # an old checkpoint is taken out of sight, its files not yet deleted
    "train.start",  # model and data are loaded, no step is done
    "train.step",  # the trainer is about to begin an optimizer step
    "train.loss",  # a micro-batch's loss is there
    "validate",  # before a micro-batch of a validation
    "rollout.group",  # all responses to a prompt are there, not yet written down
    "evaluate",  # a response of an evaluation is there
)
ACTIONS = ("kill", "term", "exit", "enospc", "nan", "hang")

_passings: Counter[str] = Counter()
_counting = threading.Lock()


@functools.lru_cache(maxsize=8)
def parse_faults(text: str) -> dict[tuple[str, int], str]:
    """{(point, n): action} of an `INFIR2_FAULTS` value; ConfigError names what is not understood."""
    faults = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        point, _, rest = item.partition(":")
        number, _, action = rest.partition(":")
        if point not in POINTS:
            raise ConfigError(
                f"{VARIABLE}: unknown point '{point}'; the points are {', '.join(POINTS)}."
            )
        if not number.isdecimal() or int(number) < 1:
            raise ConfigError(f"{VARIABLE}: '{item}' must read point:n[:action] with n >= 1.")
        if (action or "kill") not in ACTIONS:
            raise ConfigError(
                f"{VARIABLE}: unknown action '{action}' in '{item}'; the actions are {', '.join(ACTIONS)}."
            )
        faults[point, int(number)] = action or "kill"
    return faults


def fault(point: str) -> bool:
    """Pass the named point; acts only where `INFIR2_FAULTS` says so. OSError(ENOSPC) for `enospc`, True for `nan`."""
    text = os.environ.get(VARIABLE)
    if not text:
        return False
    faults = parse_faults(text)
    assert point in POINTS, f"fault point {point!r} is missing from POINTS"
    with _counting:  # files of a checkpoint are written by several threads
        _passings[point] += 1
        action = faults.get((point, _passings[point]))
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
