"""Episodes of several turns: tokens in, tokens out, and only the policy's tokens are trained."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stages import lines, options, run

from infir2.config.schema import RlSection
from infir2.data import ChatTokenizer, Prompt, load_tokenizer
from infir2.demo.tokenizer import build_vocabulary, write_tokenizer
from infir2.engines.generate import continue_completion
from infir2.engines.types import Completion
from infir2.errors import DataError
from infir2.rl.dynamic_sampling import GroupGenerator, RunningGroup
from infir2.rl.groups import Group, Response, training_samples
from infir2.rl.prompts import DrawnPrompt
from infir2.rl.turns import Episodes, turn_spans
from infir2.verify.environments import calculate
from infir2.verify.functions import close_functions
from infir2.verify.pool import Outcome

CALL = "<calculator>2+3</calculator>"
ASK = {"role": "user", "content": "2+3=?"}
RL = RlSection(environment="calculator", max_turns=3, max_response_tokens=200)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    directory = tmp_path_factory.mktemp("words")
    write_tokenizer(directory, build_vocabulary([CALL, "=?error\\boxed{}"]))
    return load_tokenizer(directory)


def prompt(**fields: Any) -> Prompt:
    return Prompt("0/p", [ASK], "5", None, "rl.jsonl:3", fields)


def turn(tokenizer: ChatTokenizer, text: str, ended: bool = True) -> Completion:
    token_ids = tokenizer.encode_text(text) + [tokenizer.eos_token_ids[-1]] * ended
    logprobs = np.linspace(-1, -2, len(token_ids)).astype(np.float32)
    return Completion("p/0", token_ids, logprobs, "stop", 0)


def answer(episodes: Episodes, response: Completion, **fields: Any) -> Completion:
    (answered,) = episodes.answer([response], prompt(**fields))
    return answered


@pytest.mark.parametrize("ended", [True, False])
def test_the_tokens_are_those_of_the_conversation(tokenizer: ChatTokenizer, ended: bool) -> None:
    """After a turn with its end token, or with a stop text, whose end token the answer has."""
    begun = turn(tokenizer, CALL, ended)
    answered = answer(Episodes(RL, tokenizer), begun)
    said = {"role": "assistant", "content": CALL}
    conversation = [ASK, said, {"role": "user", "content": "5"}]
    whole = tokenizer.apply_chat_template(conversation, add_generation_prompt=True)
    asked, _ = tokenizer.encode_prompt([ASK])
    assert [*asked, *answered.token_ids] == whole
    assert answered.outside == ((len(begun.token_ids), len(answered.token_ids)),)
    assert answered.finish == "length", "to be continued"
    assert (
        answered.rollout_logprobs[: len(begun.token_ids)].tolist()
        == begun.rollout_logprobs.tolist()
    )


def test_an_episode_ends_without_a_call_at_the_last_turn_and_at_the_limit(
    tokenizer: ChatTokenizer,
) -> None:
    episodes, response = Episodes(RL, tokenizer), turn(tokenizer, CALL)
    unfinished = replace(response, finish="length")
    assert answer(episodes, unfinished) is unfinished
    for number in range(1, RL.max_turns):
        response = answer(episodes, response)
        assert response.finish == "length"
        assert len(turn_spans(response)) == number + 1
        response = continue_completion(response, turn(tokenizer, CALL))
    assert answer(episodes, response) is response, "three turns"
    assert episodes.turns(response, "<think>") == [f"<think>{CALL}", CALL, CALL]
    final = turn(tokenizer, "\\boxed{5}")
    assert answer(episodes, final) is final, "no call"
    short = Episodes(RL.model_copy(update={"max_response_tokens": 18}), tokenizer)
    assert len(answer(short, turn(tokenizer, CALL)).token_ids) == 18
    whole = turn(tokenizer, CALL)
    full = Episodes(RL.model_copy(update={"max_response_tokens": len(whole.token_ids)}), tokenizer)
    assert answer(full, whole) is whole, "no room for an answer, so this turn is rated"


def test_only_the_policys_tokens_are_trained(tokenizer: ChatTokenizer) -> None:
    first, last = turn(tokenizer, CALL), turn(tokenizer, "\\boxed{5}")
    episode = continue_completion(answer(Episodes(RL, tokenizer), first), last)
    responses = [Response(episode, "", "ok", 1.0), Response(last, "", "wrong", 0.0)]
    rl = RL.model_copy(update={"loss_mean": "response"})
    sample, other = training_samples([Group("0/p", prompt(), [7, 8], responses)], rl)
    n, m, k = len(first.token_ids), len(episode.token_ids), len(last.token_ids)
    expected = [False] * 2 + [True] * n + [False] * (m - n - k) + [True] * k
    assert sample.loss_mask.tolist() == expected
    assert sample.token_ids[2:].tolist() == episode.token_ids
    logprobs = sample.token_inputs["rollout_logprobs"]
    assert logprobs[sample.loss_mask].tolist() == [*first.rollout_logprobs, *last.rollout_logprobs]
    assert not logprobs[~sample.loss_mask].any()
    sums = [each.token_inputs["weights"][each.loss_mask].sum() for each in (sample, other)]
    assert sums[0] == pytest.approx(sums[1]), "each response weighs the same, its answers nothing"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2+3", "5"),
        ("12 * (3 + 4)", "84"),
        ("-2**10", "-1024"),
        ("1/4", "0.25"),
        ("7//2 + 7%2", "4"),
        ("2**0.5", "1.4142135623730951"),
        ("10**320 + 1", f"1{'0' * 319}1"),
        ("1/0", "error"),
        ("9**9**9", "error"),
        ("10**999*10**999", "error"),
        ("(-8)**0.5", "error"),
        ("1e308*10", "error"),
        ("__import__('os')", "error"),
        ("abs(1)", "error"),
        ("True+1", "error"),
        ("'a'*3", "error"),
        ("(" * 400, "error"),
        ("-" * 499 + "1", "error"),
        ("1+" * 300 + "1", "error"),
        ("", "error"),
        ("\0", "error"),
    ],
)
def test_the_calculator_knows_numbers_and_nothing_else(text: str, value: str) -> None:
    assert calculate(text) == value or (value == "error" and calculate(text) == "-1")


ENVIRONMENTS = """
class Countdown:
    def reset(self, row): self.left = row["start"]
    def step(self, action):
        self.left -= 1
        return str(self.left) if self.left > 0 else None
class Broken(Countdown):
    def step(self, action): raise RuntimeError("no more")
class Hangs(Countdown):
    def step(self, action):
        while True: pass
"""


def test_an_environment_of_ones_own(
    tokenizer: ChatTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sees the row and every turn; one that raises or hangs ends the run with the row."""
    (tmp_path / "own_worlds.py").write_text(ENVIRONMENTS)
    monkeypatch.syspath_prepend(tmp_path)

    def episodes(name: str) -> Episodes:
        own = {"environment": f"own_worlds:{name}", "reward_seconds": 1.0}
        return Episodes(RL.model_copy(update=own), tokenizer)

    response = turn(tokenizer, "2")
    for said in ("2", "1"):
        response = answer(episodes("Countdown"), response, start=3)
        start, end = response.outside[-1]
        assert said in tokenizer.decode(response.token_ids[start:end])
        response = continue_completion(response, turn(tokenizer, "2"))
    for name, sentence in (("Broken", "RuntimeError: no more"), ("Hangs", "timeout")):
        with pytest.raises(
            DataError, match=rf"rl\.jsonl:3: rl\.environment = own_worlds:{name} .*{sentence}"
        ):
            answer(episodes(name), turn(tokenizer, "2"), start=3)
    close_functions()


def test_only_what_a_chunk_has_generated_is_asked_about_and_in_one_call(
    tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[list[str]]] = []

    def call(name: str, items: list[Any], seconds: float) -> list[Outcome]:
        calls.append([turns for _, _, turns in items])
        return [Outcome("5") for _ in items]

    class Memory:
        def add_unfinished(self, key: str, responses: Any) -> None: ...

    monkeypatch.setattr("infir2.rl.turns.call_function", call)
    rl = RL.model_copy(update={"environment": "own:World", "group_size": 4})
    generator = GroupGenerator(None, tokenizer, rl, 0, Memory(), None)  # type: ignore[arg-type]
    finished, begun = turn(tokenizer, "4"), replace(turn(tokenizer, "3"), finish="length")
    before = RunningGroup(DrawnPrompt("0/p", prompt(), [7]), [finished, None, begun, None])
    responses = [finished, turn(tokenizer, CALL), begun, turn(tokenizer, "2")]
    after = generator._record("key", responses, before)
    assert calls == [[[CALL], ["2"]]]
    assert isinstance(after, RunningGroup)
    assert [len(each.outside) for each in after.responses if each] == [0, 1, 0, 1]


def test_rl_with_a_calculator_trains_what_the_engine_sampled(world: Path, tmp_path: Path) -> None:
    """The trainer's log-probabilities are the engine's, so tokens, positions and masks are too."""
    texts = [row.read_text() for row in world.glob("*.jsonl")]
    write_tokenizer(tmp_path / "words", build_vocabulary([*texts, CALL]))
    words = {"data__tokenizer": tmp_path / "words"}
    talks = [
        {
            "messages": [
                {"role": "user", "content": f"{n}?"},
                {"role": "assistant", "content": "<calculator>1+1</calculator>"},
                {"role": "user", "content": "2"},
                {"role": "assistant", "content": f"\\boxed{{{2 + n % 2}}}"},
            ]
        }
        for n in range(64)
    ]
    problems = [{"prompt": f"{n}?", "label": "2"} for n in range(24)]
    for name, rows in (("talks", talks), ("problems", problems)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    run(options(world, tmp_path / "cpt", "cpt", schedule__total_steps=4, **words))
    rates = {"schedule__learning_rate": 1e-2, "schedule__final_learning_rate": 1e-2}
    sft = words | rates | {"schedule__total_steps": 40, "train__validate_every": 0}
    sft |= {"data__sources__0__path": tmp_path / "talks.jsonl", "model__path": tmp_path / "cpt"}
    run(options(world, tmp_path / "sft", "sft1", **sft))
    run(["export", "hf", str(tmp_path / "sft"), "--to", str(tmp_path / "hf")])
    run(["export", "fp8", str(tmp_path / "hf"), "--to", str(tmp_path / "fp8")])
    rl = words | {
        "data__sources__0__path": tmp_path / "problems.jsonl",
        "model__path": tmp_path / "sft",
        "rollout__model": tmp_path / "fp8",
        "rl__environment": "calculator",
        "rl__max_response_tokens": 48,
        "schedule__total_steps": 2,
        "schedule__learning_rate": 1e-3,
    }
    run(options(world, tmp_path / "a", "rl1", **rl))
    run(options(world, tmp_path / "b", "rl1", **rl, train__stop_after_step=1))
    run(options(world, tmp_path / "b", "rl1", **rl))
    steps = [lines(tmp_path / name, "train") for name in "ab"]
    assert [line["loss"] for line in steps[0]] == [line["loss"] for line in steps[1]]
    assert max(line["mismatch_max"] for line in steps[0]) <= 1e-4
    assert max(line["accuracy"] for line in steps[0]) > 0
    samples = [
        json.loads(line) for line in (tmp_path / "a" / "samples.jsonl").read_text().splitlines()
    ]
    answered = "</calculator>\nuser\n2\nassistant\n"
    assert any(answered in sample["response"] for sample in samples)
