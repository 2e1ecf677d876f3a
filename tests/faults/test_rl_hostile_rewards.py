"""Hostile responses through the rewards of answers and of code: none hangs, none leaves a process
or memory behind, and none that cheats earns anything.

INFIR2_ALL_CASES=1 (`make test-faults`) sends 10,000.
"""

import itertools
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile_answers import hostile_answers
from stages import of_today
from test_cheats import CHEATS

from infir2.config.schema import RewardSection, RlSection
from infir2.data import Prompt
from infir2.data.labels import code_label
from infir2.engines.types import Completion
from infir2.rl.groups import Response
from infir2.rl.rewards import rate
from infir2.verify.process import living_descendants

sys.path.insert(0, str(Path(__file__).parents[1] / "hostile"))
from mutate_programs import mutants

EVERYTHING = bool(os.environ.get("INFIR2_ALL_CASES"))
COUNTS = {"math": 8000, "code": 2000} if EVERYTHING else {"math": 48, "code": 16}
GROUP = 16
SECONDS = 1.0
TESTS = [{"input": "20 22\n", "output": "42"}, {"fn_name": "f", "args": [20, 22], "expected": 42}]
PROGRAM = "def f(a, b):\n    return a + b + 1\n\na, b = map(int, input().split())\nprint(f(a, b))"
AROUND = (
    "{}",
    "<think>x</think>{}",
    "Answer: {}",
    "$$\\boxed{{{}}}$$",
    "```python\n{}\n```",
    "<think>{}",
)


def responses_to(name: str, label: str, texts: list[str]) -> list[Response]:
    rl = RlSection(reward=(RewardSection(name=name),), reward_seconds=SECONDS)
    completions = [Completion(str(i), [5], np.zeros(1), "stop", 0) for i in range(len(texts))]
    return rate(completions, texts, Prompt("p", [], label, None, "rl.jsonl:1"), rl)


def hostile(name: str, count: int) -> list[str]:
    chance = random.Random(count)
    if name == "math":
        boxed = (f"\\boxed{{{answer}}}" for answer in hostile_answers(count, seed=21))
        return [chance.choice(AROUND).format(answer) for answer in boxed]
    programs = itertools.islice(mutants(PROGRAM, seed=21), count)
    return [f"```python\n{program}\n```" for _, program in programs]


def memory_kib() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


def zombies() -> int:
    found = 0
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            state, parent = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        found += state == "Z" and int(parent) == os.getpid()
    return found


@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("name", "label"), [("math", "3/17"), ("code", code_label(TESTS, "label"))], ids=COUNTS
)
def test_hostile_responses_cost_no_more_than_their_limit(name: str, label: str) -> None:
    texts = hostile(name, COUNTS[name])
    responses_to(name, label, texts[:GROUP])  # starts the processes that stay
    before = (len(living_descendants(os.getpid())), len(os.listdir("/proc/self/fd")))
    memory, reasons, slowest = memory_kib(), Counter[str](), 0.0
    for first in range(0, len(texts), GROUP):
        start = time.monotonic()
        group = responses_to(name, label, texts[first : first + GROUP])
        slowest = max(slowest, time.monotonic() - start)
        reasons.update(response.reason for response in group)
    after = (len(living_descendants(os.getpid())), len(os.listdir("/proc/self/fd")))
    assert reasons["ok"] == reasons["jail_error"] == reasons["reward_error"] == 0, reasons
    assert reasons.total() == len(texts)
    assert slowest < 120, "16 limits of a second, with the starts of processes"
    assert after[0] <= before[0] + 4, "workers are replaced, and jails end"
    assert after[1] <= before[1] + 16
    assert zombies() == 0
    assert memory_kib() - memory < 64 << 10, "responses leave nothing in memory"


@pytest.mark.parametrize(
    ("program", "tests"),
    [cheat[1:] for cheat in of_today(CHEATS, 6)],
    ids=[cheat[0] for cheat in of_today(CHEATS, 6)],
)
def test_a_program_that_cheats_earns_nothing(program: str, tests: list[dict[str, Any]]) -> None:
    label = code_label(tests, "label")
    (response,) = responses_to("code", label, [f"<think>x</think>\n```python\n{program}\n```"])
    assert response.reward == 0
    assert response.is_rated


# What a response may try on the text that is searched for the answer; the label is 8.
ANSWERS_THAT_CHEAT = (
    *("8", "Answer 8", "\\boxed 8", "\\boxed{8", "boxed{8}", "\\boxed{}", "\\boxed{7}8", "\\fbox8"),
    *("<think>\\boxed{8}", "\\boxed{8}<think>", "<think>\\boxed{8}</think>", "\\boxed{8}</think>"),
    *("\\boxed{8}\\boxed{7}", "\\boxed{7 or 8}", "\\boxed{7, 8}", "\\boxed{8 \\text{or} 7}"),
    *("\\boxed{x}", "\\boxed{n}", "\\boxed{3+5}", "\\boxed{2^3}", "\\boxed{\\sqrt{64}}"),
    *("\\boxed{\\text{the label}}", "\\boxed{8=8}", "\\boxed{x=8=7}", "\\boxed{\\{7,8\\}}"),
    *("\\boxed{[0,10]}", "\\boxed{x\\in\\{7,8\\}}", "\\boxed{8\\pm 1}", "\\boxed{>7}"),
    *("\\boxed{\\mathbb{R}}", "\\boxed{0x}", "\\boxed{NaN}", "\\boxed{8\\text{ or }9}"),
)  # fmt: skip


def test_an_answer_that_cheats_earns_nothing() -> None:
    texts = list(ANSWERS_THAT_CHEAT)
    earned = [
        text
        for text, each in zip(texts, responses_to("math", "8", texts), strict=True)
        if each.reward
    ]
    assert earned == []
