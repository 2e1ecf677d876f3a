"""Which rewards there are, and what `[rl]` may say of them."""

import difflib
import re
from collections import Counter

from infir2.config.rollout_rules import Rule
from infir2.config.schema import RlSection

REWARDS = ("math", "answer", "require_thinking", "format", "choice", "code")
GYM = "reasoning_gym:"
KEY_VARIABLE = "INFIR2_REWARD_KEY"  # of servers
ENVIRONMENTS = ("calculator",)


def is_server(name: str) -> bool:
    """Whether a reward is a server's URL."""
    return name.startswith(("http://", "https://"))


def is_gym(name: str) -> bool:
    """Whether a reward is a task of reasoning-gym, which makes its own prompts."""
    return name.startswith(GYM)


def is_function(name: str) -> bool:
    """Whether a reward is a function, `package.module:function`."""
    return bool(re.fullmatch(r"[\w.]+:\w+", name)) and not name.startswith(GYM)


def _is_known(name: str) -> bool:
    is_gym = bool(re.fullmatch(rf"{GYM}\w+", name))
    return name in REWARDS or is_gym or is_function(name) or is_server(name)


def reward_rules(rl: RlSection) -> list[Rule]:
    """The rules about `rl.reward`."""
    names = [each.name for each in rl.reward]
    twice = next((name for name, count in Counter(names).items() if count > 1), "")
    chosen = next((i for i, each in enumerate(rl.reward) if each.rows and is_gym(each.name)), None)
    unused = next((i for i, each in enumerate(rl.reward) if each.rows and not rl.reward_field), 0)
    return [
        *(_known(f"rl.reward.{index}.name", name) for index, name in enumerate(names)),
        (
            rl.environment not in ("", *ENVIRONMENTS) and not is_function(rl.environment),
            "rl.environment",
            f"= {rl.environment!r} is unknown; name calculator or package.module:Class.",
        ),
        (not names, "rl.reward", "is empty; name a reward, such as math."),
        (bool(twice), "rl.reward", f"has {twice!r} twice; remove one, or add their weights."),
        (
            not rl.reward_field and any(each.rows for each in rl.reward),
            f"rl.reward.{unused}.rows",
            "has no effect without rl.reward_field, the field of the rows that chooses.",
        ),
        (
            chosen is not None,
            f"rl.reward.{chosen}.rows",
            "must be empty: a task of reasoning_gym rates the problems that it makes, and no rows.",
        ),
    ]


def _known(key: str, name: str) -> Rule:
    near = difflib.get_close_matches(name, REWARDS, 1)
    hint = f"did you mean {near[0]}?" if near else f"the rewards are {', '.join(REWARDS)}."
    return (
        not _is_known(name),
        key,
        f"= {name!r} is unknown; {hint} Or name reasoning_gym:NAME, package.module:function or "
        "the URL of a server.",
    )
