"""The gateway between evalscope and the engines: seeds, faults, and restarts."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from gateways import QUICK, ask, open_gateway, post
from scripted_server import Script, serving

from infir2.engines.remote import EngineGoneError
from infir2.evaluate.journal import ANSWERS
from infir2.evaluate.upstream import Patience


def test_each_sample_has_a_seed_of_its_own_and_is_kept(tmp_path: Path) -> None:
    script = Script()
    with serving(script) as server, open_gateway(tmp_path, [server.url]) as gateway:
        texts = [ask(gateway, seed=7, stream=False, n=1)[1] for _ in range(4)]
        assert ask(gateway)[0] == 410, "evalscope asks no prompt more than k times"
    assert len(set(texts)) == 4
    seeds = {request["seed"] for request in script.requests}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert all(request["model"] == "tiny" for request in script.requests)
    assert not any(request.keys() & {"stream", "n"} for request in script.requests)
    assert script.keys == {"Bearer secret"}
    rows = [json.loads(line) for line in (tmp_path / ANSWERS).read_text().splitlines()]
    assert [row["sample"] for row in rows] == [0, 1, 2, 3]
    assert {row["seed"] for row in rows} == seeds


def test_one_request_for_all_samples_gets_those_that_are_known(tmp_path: Path) -> None:
    script = Script(faults=dict.fromkeys(range(4, 7), "html"))
    body = {"messages": [{"role": "user", "content": "q"}], "n": 4, "do_sample": True}
    with serving(script) as server, open_gateway(tmp_path, [server.url]) as gateway:
        status, answer = post(gateway, body)
        assert (status, [each["index"] for each in answer["choices"]]) == (200, [0, 1, 2])
        assert post(gateway, body)[0] == 410
    assert not any(request.keys() & {"n", "do_sample"} for request in script.requests)
    with serving(script) as server, open_gateway(tmp_path, [server.url]) as gateway:
        choices = post(gateway, body | {"n": 400})[1]["choices"]
    assert len({each["message"]["content"] for each in choices}) == 4
    assert all(each["usage"]["completion_tokens"] == 3 for each in choices)
    assert len(script.requests) == 7


def test_after_a_restart_answers_come_from_the_disk(tmp_path: Path) -> None:
    script = Script()
    with serving(script) as server:
        with open_gateway(tmp_path, [server.url]) as gateway:
            before = [ask(gateway)[1] for _ in range(3)]
        with (tmp_path / ANSWERS).open("ab") as file:
            file.write(b'{"benchmark": "aime24", "prompt": "torn')
        with open_gateway(tmp_path, [server.url]) as gateway:
            after = [ask(gateway)[1] for _ in range(4)]
    assert after[:3] == before
    assert len(script.requests) == 4
    lines = (tmp_path / ANSWERS).read_text().splitlines()
    assert [json.loads(line)["sample"] for line in lines] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("fault", "counted"),
    [
        ("500", "500"), ("429", "429"), ("503", "503"), ("drop", "hung up"), ("cut", "cut"),
        ("html", "cut"), ("nochoices", "cut"), ("empty", "empty"), ("null", "empty"),
    ],
)  # fmt: skip
def test_a_fault_is_asked_again(tmp_path: Path, fault: str, counted: str) -> None:
    script = Script(faults={1: fault})
    with serving(script) as server, open_gateway(tmp_path, [server.url]) as gateway:
        assert ask(gateway)[0] == 200
        assert sum(gateway.upstream.faults.values()) == 1
        found = next(iter(gateway.upstream.faults))
    assert found == counted
    assert len(script.requests) == 2
    assert json.loads((tmp_path / ANSWERS).read_text())["attempts"] == 2


def test_a_request_that_hangs_is_asked_again(tmp_path: Path) -> None:
    patience = replace(QUICK, request_seconds=1.0, bad_answers=9)
    script = Script(faults={1: "hang"})
    with serving(script) as server, open_gateway(tmp_path, [server.url], patience) as gateway:
        assert ask(gateway)[0] == 200
        assert gateway.upstream.faults["timeout"] >= 1


def test_a_model_that_says_nothing_has_said_nothing(tmp_path: Path) -> None:
    script = Script(always="empty")
    with serving(script) as server, open_gateway(tmp_path, [server.url]) as gateway:
        assert ask(gateway) == (200, "")
    assert len(script.requests) == QUICK.bad_answers
    assert json.loads((tmp_path / ANSWERS).read_text())["attempts"] == QUICK.bad_answers


def test_an_answer_that_never_comes_is_missing_and_the_next_run_asks_it(tmp_path: Path) -> None:
    script = Script(always="html")
    with serving(script) as server:
        with open_gateway(tmp_path, [server.url]) as gateway:
            status, message = ask(gateway)
            assert (status, "no answer: cut: " in message) == (410, True)
            (reason,) = gateway.missing.values()
            assert "no JSON" in reason or "without a choice" in reason
        assert (tmp_path / ANSWERS).read_text() == ""
        script.always = ""
        with open_gateway(tmp_path, [server.url]) as gateway:
            assert ask(gateway)[0] == 200


def test_a_repeated_request_after_a_missing_answer_takes_no_other_samples_place(
    tmp_path: Path,
) -> None:
    script = Script(faults={1: "400"})
    with serving(script) as server, open_gateway(tmp_path, [server.url]) as gateway:
        assert ask(gateway)[0] == 410
        assert [ask(gateway)[0] for _ in range(3)] == [200] * 3
        assert [ask(gateway)[0] for _ in range(2)] == [410] * 2
        assert len(gateway.missing) == 1
    assert len(script.requests) == 4


def test_a_prompt_beyond_the_context_is_counted_once(tmp_path: Path) -> None:
    script = Script(always="context")
    with serving(script) as server:
        for _ in range(2):
            with open_gateway(tmp_path, [server.url]) as gateway:
                status, message = ask(gateway)
                assert (status, "maximum context length" in message) == (410, True)
                assert gateway.missing == {}
    (row,) = (json.loads(line) for line in (tmp_path / ANSWERS).read_text().splitlines())
    assert row["refused"]["reason"] == "beyond_context"
    assert len(script.requests) == 1


def test_the_assistants_turn_begins_as_the_recipe_says(tmp_path: Path) -> None:
    script = Script(answer=lambda body: {"content": "so\n</think>\n5"})
    with serving(script) as server, open_gateway(tmp_path, [server.url], begin="<think>\n") as g:
        assert ask(g) == (200, "<think>\nso\n</think>\n5")
        script.answer = lambda body: {"content": "5", "reasoning_content": "so"}
        assert ask(g) == (200, "<think>\nso\n</think>\n5")
        script.answer = lambda body: {"content": "<think>\nso</think>5"}
        assert ask(g) == (200, "<think>\nso</think>5")
    request = script.requests[0]
    assert request["messages"][-1] == {"role": "assistant", "content": "<think>\n"}
    assert request["continue_final_message"] is True
    assert request["add_generation_prompt"] is False


def test_requests_are_spread_over_the_engines_that_answer(tmp_path: Path) -> None:
    scripts = [Script(latency=0.05), Script(latency=0.05), Script()]
    with ExitStack() as stack:
        urls = [stack.enter_context(serving(script)).url for script in scripts[:2]]
        with serving(scripts[2]) as ended:
            urls.append(ended.url)
        gateway = stack.enter_context(open_gateway(tmp_path, urls))
        with ThreadPoolExecutor(8) as threads:
            found = threads.map(lambda i: ask(gateway, f"q{i % 10}")[0], range(40))
            assert list(found) == [200] * 40
    counts = [len(script.requests) for script in scripts[:2]]
    assert sum(counts) == 40
    assert min(counts) >= 12
    assert max(script.most_running for script in scripts) >= 2


def test_more_requests_than_the_engines_get_at_one_time_wait(tmp_path: Path) -> None:
    script = Script(latency=0.05)
    with (
        serving(script) as server,
        open_gateway(tmp_path, [server.url], parallel=3) as gateway,
        ThreadPoolExecutor(12) as threads,
    ):
        answers = list(threads.map(lambda i: ask(gateway, f"q{i}"), range(12)))
    assert [status for status, _ in answers] == [200] * 12
    assert script.most_running == 3


def test_an_engine_that_died_and_came_back_on_another_port_is_used(tmp_path: Path) -> None:
    script = Script()
    with ExitStack() as stack:
        with serving(script) as server:
            gateway = stack.enter_context(open_gateway(tmp_path, [server.url]))
            assert ask(gateway)[0] == 200
        threads = stack.enter_context(ThreadPoolExecutor(1))
        waiting = threads.submit(ask, gateway)
        time.sleep(0.2)
        assert not waiting.done()
        server = stack.enter_context(serving(script))
        gateway.replace_engine(0, server.url, "secret")
        assert waiting.result()[0] == 200
        assert gateway.upstream.faults["gone"] >= 1


class Process:
    """A server of ours that ends as soon as it is ready, `lives` times; then it stays, or not."""

    has_ended = True

    def __init__(self, stack: ExitStack, lives: int, last: Script | None = None) -> None:
        self.stack, self.lives, self.last = stack, lives, last

    async def start(self) -> tuple[str, str]:
        self.lives -= 1
        if self.lives < 0 and self.last is None:
            raise EngineGoneError("it does not start")
        server = serving(self.last or Script())
        if self.lives < 0:
            return self.stack.enter_context(server).url, "secret"
        with server as ended:
            return ended.url, "secret"

    async def watch(self) -> None:
        """It ends, and does not hang."""


def test_an_engine_of_ours_that_ended_is_started_again(tmp_path: Path) -> None:
    script = Script()
    with ExitStack() as stack:
        gateway = stack.enter_context(open_gateway(tmp_path, []))
        gateway.open_engines([], [Process(stack, 2, script)])
        with ThreadPoolExecutor(4) as threads:
            assert list(threads.map(lambda _: ask(gateway)[0], range(4))) == [200] * 4
        assert gateway.upstream.faults["restart"] == 2
    assert len(script.requests) == 4


def test_an_engine_of_ours_that_does_not_start_is_given_up(tmp_path: Path) -> None:
    patience = replace(QUICK, outage_seconds=0.5)
    with ExitStack() as stack:
        gateway = stack.enter_context(open_gateway(tmp_path, [], patience))
        gateway.open_engines([], [Process(stack, 1)])
        assert ask(gateway)[0] == 410
        assert 1 <= gateway.upstream.faults["restart"] <= 3


def test_without_any_engine_the_known_answers_stay(tmp_path: Path) -> None:
    patience = Patience(outage_seconds=0.2, first_wait_seconds=0.05)
    with serving(Script()) as server, open_gateway(tmp_path, [server.url], patience) as gateway:
        assert ask(gateway)[0] == 200
        url = server.url
    with open_gateway(tmp_path, [url], patience) as gateway:
        assert [ask(gateway)[0] for _ in range(3)] == [200, 410, 410]
        assert all(reason.startswith("gone: ") for reason in gateway.missing.values())


def test_a_refused_key_ends_everything_and_a_wrong_one_of_a_client_nothing(tmp_path: Path) -> None:
    script = Script(always="401")
    with serving(script) as server, open_gateway(tmp_path, [server.url]) as gateway:
        body = {"messages": [{"role": "user", "content": "q"}]}
        assert post(gateway, body, key="wrong")[0] == 403
        assert ask(gateway)[0] == ask(gateway)[0] == 410
        assert "refuses the key" in str(gateway.failure)
    assert len(script.requests) == 1
