"""Every reward against closed forms, and what happens when one fails."""

import json
import math
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from infir2.config.schema import RewardSection, RlSection
from infir2.data import Prompt
from infir2.engines.types import Completion
from infir2.errors import ConfigError, DataError
from infir2.preflight.rewards import require_rewards
from infir2.rl.dynamic_sampling import collect_rollouts
from infir2.rl.groups import Group, Response, training_samples
from infir2.rl.rewards import FailureBudget, find_reward, rate
from infir2.rl.step_metrics import _reward_metrics
from infir2.verify.functions import close_functions

THOUGHT = "<think>hm</think> "
PROGRAM = "```python\nprint(sum(map(int, input().split())))\n```"
TESTS = json.dumps([{"input": "1 2", "output": "3"}])


def prompt(label: str = "5", **fields: Any) -> Prompt:
    return Prompt("0/p", [{"role": "user", "content": "q"}], label, None, "rl.jsonl:7", fields)


def completion(number: int = 0, tokens: int = 2) -> Completion:
    return Completion(f"p/{number}", [5] * tokens, np.zeros(tokens, np.float32), "stop", 3)


def recipe(*rewards: str | tuple[str, float], **keys: Any) -> RlSection:
    named = [each if isinstance(each, tuple) else (each, 1.0) for each in rewards]
    sections = tuple(RewardSection(name=name, weight=weight) for name, weight in named)
    return RlSection(reward=sections, **keys)


def value(name: str, text: str, label: str = "5", **fields: Any) -> float:
    (score,) = find_reward(name, recipe(name))([text], prompt(label, **fields))
    return score.value


@pytest.mark.parametrize(
    ("name", "label", "right", "wrong"),
    [
        ("math", "1/2", [r"\boxed{0.5}", THOUGHT + r"\boxed{\frac12}"], [r"\boxed{2}", "0.5"]),
        ("answer", "5", [r"\boxed{5}", "Answer: 5", "**Answer:** 5"], ["5", "Answer: 6"]),
        (
            "require_thinking",
            "5",
            [THOUGHT + r"\boxed{5}", r"hm</think>\boxed{5}"],
            [r"\boxed{5}", r"<think>\boxed{5}", r"\boxed{5}</think>", r"\boxed{5}<think>x"],
        ),
        (
            "format",
            "",
            [THOUGHT + r"\boxed{no matter}"],
            [
                r"\boxed{5}",
                THOUGHT + "5",
                r"<think></think>\boxed{5}",
                THOUGHT + THOUGHT + r"\boxed{5}",
                r"<think>hm<think>hm</think>\boxed{5}",
                r"<think>\boxed{5}</think>",
            ],
        ),
        ("choice", "C", ["Answer: (C)", r"\boxed{C}", "Answer: C) 12"], ["C", "Answer: ABCD"]),
        (
            "code",
            TESTS,
            [PROGRAM, f"{THOUGHT}first\n```python\nprint(0)\n```\nor\n{PROGRAM}\nthat is it"],
            ["", "print(3)", "```python\nprint(4)\n```", f"<think>{PROGRAM}", "```\n```"],
        ),
    ],
)  # fmt: skip
def test_what_earns_the_reward_and_what_does_not(
    name: str, label: str, right: list[str], wrong: list[str]
) -> None:
    scores = find_reward(name, recipe(name))([*right, *wrong], prompt(label))
    assert [score.value for score in scores] == [1.0] * len(right) + [0.0] * len(wrong)
    assert [score.reason == "ok" for score in scores] == [score.value > 0 for score in scores]


def test_the_reward_is_the_weighted_sum_and_its_parts_are_kept() -> None:
    keys: dict[str, Any] = {"max_response_tokens": 10, "overlong_buffer_tokens": 5}
    rl = recipe("math", ("format", 0.25), overlong_penalty=0.5, **keys)
    texts = [THOUGHT + r"\boxed{5}", r"\boxed{5}", THOUGHT + r"\boxed{6}", ""]
    completions = [completion(0), completion(1), completion(2), completion(3, tokens=10)]
    responses = rate(completions, texts, prompt(), rl)
    assert [response.reward for response in responses] == [1.25, 1.0, 0.25, -0.5]
    assert [response.raw for response in responses] == [1.25, 1.0, 0.25, 0.0]
    assert [response.correct for response in responses] == [True, True, False, False]
    assert responses[3].parts == {"math": 0.0, "format": 0.0, "overlong": -0.5}
    metrics = _reward_metrics(responses)
    assert metrics == {
        "reward": 0.5,
        "reward_raw": 0.625,
        "accuracy": 0.5,
        "reward_math": 0.5,
        "reward_format": 0.125,
        "reward_overlong": -0.125,
        "reward_failures": 0,
    }


def test_a_penalty_for_length_is_no_signal_and_a_format_is() -> None:
    def group(texts: list[str], rl: RlSection) -> Group:
        completions = [completion(i, 1 + 9 * i) for i in range(len(texts))]
        return Group("0/p", prompt(), [3], rate(completions, texts, prompt(), rl))

    keys: dict[str, Any] = {"max_response_tokens": 10, "overlong_buffer_tokens": 5}
    assert not group(["", ""], recipe("math", **keys)).has_signal
    assert group(["", THOUGHT + r"\boxed{6}"], recipe("math", "format", **keys)).has_signal


def test_a_field_of_the_row_chooses() -> None:
    rl = RlSection(
        reward_field="extra.kind",
        reward=(
            RewardSection(name="choice"),
            RewardSection(name="math", rows=("gsm8k", "1")),
            RewardSection(name="format", weight=0.5, rows=("gsm8k",)),
        ),
    )
    texts = [THOUGHT + r"\boxed{C}"]
    by_kind = {
        kind: rate([completion()], texts, prompt("C", **{"extra.kind": kind}), rl)[0].parts
        for kind in ("choice", "gsm8k", 1)
    }
    assert by_kind == {
        "choice": {"choice": 1.0},
        "gsm8k": {"math": 1.0, "format": 0.5},
        1: {"math": 1.0},
    }


FUNCTIONS = """
import time, os
import numpy as np
calls = 0
def length(response, row): return len(response) / row["target"]
def scalar(response, row): return np.float32(0.5)
def boolean(response, row): return True
def text(response, row): return "0.5"
def nothing(response, row): return None
def nan(response, row): return float("nan")
def huge(response, row): return 10 ** 400
def raises(response, row): raise KeyError("no such key")
def leaves(response, row): os._exit(0)
def exits(response, row): raise SystemExit(0)
def prints(response, row): print("x" * 10**6); return 1
def hangs_if_long(response, row):
    while len(response) > 3: pass
    return 1
"""


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "own_rewards.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    close_functions()


def test_a_function_gets_the_response_and_the_row(functions: None) -> None:
    assert value("own_rewards:length", "four", target=8) == 0.5
    assert value("own_rewards:scalar", "x") == 0.5
    assert value("own_rewards:boolean", "x") == 1.0
    assert value("own_rewards:prints", "x") == 1.0


@pytest.mark.parametrize(
    ("name", "detail"),
    [
        ("text", "'0.5', which is no number"),
        ("nothing", "'None', which is no number"),
        ("nan", "nan, which is no finite number"),
        ("huge", "no finite number"),
        ("raises", "KeyError: 'no such key'"),
        ("leaves", "its process died"),
        ("exits", "SystemExit"),
    ],
)
def test_a_function_that_fails_gives_no_reward(functions: None, name: str, detail: str) -> None:
    (score,) = find_reward(f"own_rewards:{name}", recipe("math"))(["x"], prompt())
    assert score.reason == "reward_error"
    assert detail in score.detail


def test_a_function_that_hangs_is_killed_and_the_next_call_works(functions: None) -> None:
    rl = recipe("own_rewards:hangs_if_long", reward_seconds=1.0)
    responses = rate([completion(i) for i in range(3)], ["a", "long", "b"], prompt(), rl)
    assert [response.reward for response in responses] == [1.0, 0.0, 1.0]
    assert [response.reason for response in responses] == ["ok", "reward_timeout", "ok"]
    assert responses[1].detail == "timeout: stopped after 1.0 s"
    assert not responses[1].is_rated


@pytest.mark.parametrize("name", ["no_such_module:f", "own_rewards:no_such_function"])
def test_a_function_that_is_not_there_is_named_before_the_run(functions: None, name: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot start .*{name}"):
        require_rewards(recipe(name))


class Server(ThreadingHTTPServer):
    """Answers by the response's text, and keeps what it received."""

    received: ClassVar[list[tuple[dict[str, Any], str | None]]] = []


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Server.received.append((body, self.headers["Authorization"]))
        reply = body["response"]
        if reply.startswith("status"):
            asked_before = [each for each, _ in Server.received if each["response"] == reply]
            status = 200 if reply.endswith("then 200") and len(asked_before) > 1 else 503
            status = 307 if reply == "status 307" else status
            reply = '{"reward": 0.25}'
        else:
            status = 200
        self.send_response(status)
        self.send_header("Content-Length", str(len(reply)))
        self.send_header("Location", "http://127.0.0.1:1/")
        self.end_headers()
        for byte in reply.encode() if reply == "trickle" else [reply.encode()]:
            self.wfile.write(byte if isinstance(byte, bytes) else bytes([byte]))
            time.sleep(0.5 * (reply == "trickle"))

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Server.received.clear()
    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/score"
        server.shutdown()


def test_a_server_gets_all_of_the_row_and_its_number_is_the_reward(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFIR2_REWARD_KEY", "secret")
    texts = ['{"reward": 0.5}', '{"reward": 1, "more": []}', "status 503 then 200"]
    scores = find_reward(server, recipe(server))(texts, prompt("7", kind="x"))
    assert [(score.value, score.reason) for score in scores] == [
        (0.5, "wrong"),
        (1.0, "ok"),
        (0.25, "wrong"),
    ]
    (body, key), *_ = [each for each in Server.received if each[0]["response"] == texts[0]]
    question = [{"role": "user", "content": "q"}]
    assert body == {"response": texts[0], "prompt": question, "label": "7", "row": {"kind": "x"}}
    assert key == "Bearer secret"


@pytest.mark.parametrize(
    ("reply", "detail", "requests"),
    [
        ("no JSON", "the server's answer is not", 1),
        ('{"score": 1}', "the server's answer is not", 1),
        ('{"reward": null}', "which is no number", 1),
        ('{"reward": NaN}', "no finite number", 1),
        ("[" * 100_000, "the server's answer is not", 1),
        ("status 503", "status 503", 3),
        ("status 307", "redirects", 1),
    ],
)
def test_a_server_that_fails_gives_no_reward(
    server: str, reply: str, detail: str, requests: int
) -> None:
    (score,) = find_reward(server, recipe(server, reward_seconds=1.0))([reply], prompt())
    assert score.reason == "reward_error"
    assert detail in score.detail
    assert len(Server.received) == requests


def test_a_server_that_is_too_slow_gives_no_reward(server: str) -> None:
    (score,) = find_reward(server, recipe(server, reward_seconds=1.0))(["trickle"], prompt())
    assert score.reason == "reward_timeout"
    assert "no whole answer in 1 s" in score.detail
    assert len(Server.received) == 3


def test_a_server_that_is_not_there_gives_no_reward() -> None:
    url = "http://127.0.0.1:1/x"
    scores = find_reward(url, recipe(url))(["a", "b"], prompt())
    assert {score.reason for score in scores} == {"reward_error"}


def test_failures_are_named_left_out_and_end_the_run_over_the_budget(
    functions: None, capsys: pytest.CaptureFixture[str]
) -> None:
    rl = recipe("math", "own_rewards:hangs_if_long", reward_seconds=1.0, reward_failures=2)
    texts = [r"\boxed{5}", "x", "y"]
    responses = rate([completion(i) for i in range(3)], texts, prompt(), rl)
    budget = FailureBudget(rl.reward_failures)
    budget.spend(prompt(), responses)
    budget.spend(prompt(), responses)
    assert "rl.jsonl:7: the reward failed for 1 of 3 responses" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"rl\.jsonl:7: .* more than rl\.reward_failures \(2\)"):
        budget.spend(prompt(), responses)
    group = Group("0/p", prompt(), [3], responses)
    assert not group.has_signal, "the only good answer has no reward"
    assert len(training_samples([group], rl)) == 2
    assert _reward_metrics(responses)["reward_failures"] == 1


def test_the_budget_is_that_of_a_step_whichever_versions_sampled() -> None:
    failed = Response(completion(), "", "reward_error", 0.0)
    later = Response(Completion("p", [5], np.zeros(1), "stop", 4), "", "jail_error", 0.0)
    budget = FailureBudget(1)
    for _ in range(3):  # --rollout-only: one version for all steps
        budget.begin()
        budget.spend(prompt(), [failed])
    with pytest.raises(DataError):  # rl.partial: versions alternate within a step
        budget.spend(prompt(), [later])


def test_the_sampling_of_a_step_begins_its_budget() -> None:
    begun: list[int] = []

    class Generator:
        def begin(self) -> None:
            begun.append(1)

    class Stream:
        state: ClassVar[dict[str, Any]] = {}

        def observe(self, groups: list[Group]) -> None:
            assert not groups

    rl = RlSection().model_copy(update={"prompts_per_step": 0})
    for count in (1, 2):
        collect_rollouts(Stream(), Generator(), rl, [], [], lambda _: [])  # type: ignore[arg-type]
        assert sum(begun) == count


def test_an_advantage_is_that_of_the_responses_that_have_a_reward() -> None:
    reasons = [("ok", 1.0), ("reward_error", 0.0), ("wrong", 0.0)]
    responses = [
        Response(completion(i), "", reason, reward) for i, (reason, reward) in enumerate(reasons)
    ]  # type: ignore[arg-type]
    samples = training_samples([Group("0/p", prompt(), [3], responses)], RlSection())
    advantages = [sample.token_inputs["advantages"][1] for sample in samples]
    assert advantages == pytest.approx([1, -1], abs=1e-5)
    assert not math.isnan(sum(advantages))
