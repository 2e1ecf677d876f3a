"""What the rewards of a recipe need, known before a run starts."""

import os

from infir2.config.reward_rules import GYM, KEY_VARIABLE, is_function, is_gym, is_server
from infir2.config.schema import RlSection
from infir2.engines.http_client import check_url
from infir2.preflight.finding import Finding
from infir2.verify import run_code
from infir2.verify.functions import close_functions, require_function
from infir2.verify.gym import require_task

PROGRAM, TESTS = "print(1)", [{"input": "", "output": "1"}]


def require_rewards(rl: RlSection) -> None:
    """Raises ConfigError for a function or a task that is not there, for a URL that is none, and
    for programs on a machine without jails."""
    require_reward_urls(rl)
    if is_function(rl.environment):
        require_function(rl.environment)
    for each in rl.reward:
        if is_gym(each.name):
            require_task(each.name.removeprefix(GYM), rl.reward_seconds)
        elif is_function(each.name):
            require_function(each.name)
        elif each.name == "code":
            run_code(PROGRAM, TESTS)


def require_reward_urls(rl: RlSection) -> None:
    """Raises ConfigError for the URL of a reward that is none, or lacks its key."""
    for each in rl.reward:
        if is_server(each.name):
            check_url("rl.reward", each.name, os.environ.get(KEY_VARIABLE, ""), KEY_VARIABLE)


def check_rewards(rl: RlSection) -> Finding:
    """The finding of `require_rewards`, whose processes end again."""
    try:
        require_rewards(rl)
    finally:
        close_functions()
    names = [rl.environment, *(each.name for each in rl.reward)]
    return Finding("rewards", "ok", f"{', '.join(filter(None, names))} can be used")
