"""The order of prompts: duplicates, weights, resting prompts, and tasks that get harder."""

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stages import assert_same_state, curve, make_rl_start, options, run

import infir2.rl.dynamic_sampling
from infir2.config import load
from infir2.config.schema import RewardSection, RlRecipe, RlSection
from infir2.data import ChatTokenizer, Prompt, load_tokenizer
from infir2.engines.types import Completion
from infir2.errors import ConfigError, DataError
from infir2.preflight.data import check_sources
from infir2.preflight.rewards import require_rewards
from infir2.rl.groups import Group, Response
from infir2.rl.prompts import DrawnPrompt, PromptStream
from infir2.rl.rewards import find_reward, rate
from infir2.verify import gym
from infir2.verify.functions import close_functions


@pytest.fixture(scope="module")
def tokenizer(world: Path) -> ChatTokenizer:
    return load_tokenizer(world / "tokenizer")


def prompts(*texts: str, source: int = 0) -> list[Prompt]:
    return [
        Prompt(f"{source}/rl.jsonl:{n}", [{"role": "user", "content": text}], "5", None, "")
        for n, text in enumerate(texts, 1)
    ]


def group(drawn: DrawnPrompt, *rewards: float, part: str = "math") -> Group:
    responses = [
        Response(
            Completion("", [5], np.zeros(1), "stop", 0),
            "",
            "ok" if reward == 1 else "wrong",
            reward,
            {part: reward},
        )
        for reward in rewards
    ]
    return Group(drawn.name, drawn.prompt, drawn.token_ids, responses)


def names(drawn: list[DrawnPrompt]) -> list[str]:
    return [each.name for each in drawn]


def test_equal_prompts_are_dropped_and_counted(tokenizer: ChatTokenizer) -> None:
    rows = prompts("1+2=?", "1 + 2=?", " 1+2=?\n", "é?", "e\u0301?", "É?", "1+3=?")
    stream = PromptStream(rows, tokenizer, RlSection(), seed=0)
    assert stream.num_duplicates == 3
    drawn = {each.prompt.id for each in stream.draw(4)}
    assert drawn == {f"0/rl.jsonl:{n}" for n in (1, 2, 4, 7)}, "the first of equal ones stays"


def test_sources_are_mixed_by_weight_and_else_all_rows_equally_often(
    tokenizer: ChatTokenizer,
) -> None:
    few, many = prompts("a", "b"), prompts(*map(str, range(8)), source=1)
    for weights, share in (((1.0, 1.0), 0.2), ((3.0, 1.0), 0.75)):
        stream = PromptStream([*few, *many], tokenizer, RlSection(), 0, None, weights)
        drawn = stream.draw(4096)
        counts = Counter(each.prompt.id[0] for each in drawn)
        assert counts["0"] / 4096 == pytest.approx(share, abs=0.01)
        assert len(set(names(drawn))) == 4096, "each source has epochs of its own"


@pytest.mark.parametrize(
    ("second", "sentence"),
    [
        (["1 " * 50], "none of its prompts has at most 30 tokens: raise rl.max_prompt_tokens"),
        (["1 " * 50, "a"], "none of its prompts that no earlier source has has at most 30 tokens"),
        (["B", " a"], "each of its prompts is also in an earlier source; remove"),
        ([], "none of its rows is a usable prompt; fix or remove"),
    ],
)
def test_a_source_that_gives_no_prompt_is_named_with_the_cause(
    tokenizer: ChatTokenizer, second: list[str], sentence: str
) -> None:
    rows, rl = [*prompts("a", "b"), *prompts(*second, source=1)], RlSection(max_prompt_tokens=30)
    with pytest.raises(DataError, match=rf"data\.sources\.1: {sentence}"):
        PromptStream(rows, tokenizer, rl, 0, None, (1.0, 2.0))
    assert PromptStream(rows, tokenizer, rl, 0, None, (1.0, 1.0)).draw(2)


def test_a_solved_prompt_rests_for_the_stated_epochs(tokenizer: ChatTokenizer) -> None:
    rl = RlSection(rest_epochs=2)
    stream = PromptStream(prompts("a", "b", "c"), tokenizer, rl, seed=0)
    first = stream.draw(3)
    solved = next(each for each in first if each.prompt.id.endswith(":1"))
    half = next(each for each in first if each.prompt.id.endswith(":2"))
    stream.observe([group(solved, 1, 1), group(half, 1, 0)])
    state = json.loads(json.dumps(stream.state))
    later = names(stream.draw(7))
    assert sorted(later[:4]) == [
        "1/0/rl.jsonl:2",
        "1/0/rl.jsonl:3",
        "2/0/rl.jsonl:2",
        "2/0/rl.jsonl:3",
    ]
    assert sorted(later[4:]) == ["3/0/rl.jsonl:1", "3/0/rl.jsonl:2", "3/0/rl.jsonl:3"]
    again = PromptStream(prompts("a", "b", "c"), tokenizer, rl, 0, state)
    assert names(again.draw(7)) == later, "a resumed run goes on with the same prompts"
    assert again.named(later[0]) is not None
    assert again.named("1/0/rl.jsonl:9") is None


def test_all_prompts_may_rest_and_return(tokenizer: ChatTokenizer) -> None:
    stream = PromptStream(prompts("a", "b"), tokenizer, RlSection(rest_epochs=3), seed=0)
    stream.observe([group(each, 1, 1) for each in stream.draw(2)])
    assert {name.split("/")[0] for name in names(stream.draw(2))} == {"4"}


def reward_even_sums(completions, texts, prompt, rl):  # type: ignore[no-untyped-def]
    return [
        Response(
            each,
            text,
            "wrong" if sum(each.token_ids) % 2 else "ok",
            float(sum(each.token_ids) % 2 == 0),
        )
        for each, text in zip(completions, texts, strict=True)
    ]


@pytest.mark.costly
def test_a_resumed_run_with_resting_prompts_has_the_same_bits(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(infir2.rl.dynamic_sampling, "rate", reward_even_sums)
    start = make_rl_start(world, tmp_path / "start")
    few = tmp_path / "few.jsonl"
    few.write_text("".join((world / "rl1.jsonl").read_text().splitlines(True)[:6]))
    given: dict[str, object] = {
        "model__path": start / "cpt",
        "rollout__model": start / "fp8",
        "data__sources__0__path": few,
        "schedule__total_steps": 6,
        "checkpoint__save_every": 1,
        "rl__group_size": 2,
        "rl__mini_batches": 1,
        "rl__rest_epochs": 1,
    }
    run(options(world, tmp_path / "a", "rl1", **given))
    run(options(world, tmp_path / "b", "rl1", **given, train__stop_after_step=4))
    run(options(world, tmp_path / "b", "rl1", **given))
    metrics = ("loss", "reward", "prompts_resting", "groups_sampled")
    assert curve(tmp_path / "a", *metrics) == curve(tmp_path / "b", *metrics)
    assert_same_state(tmp_path / "a", tmp_path / "b")
    lines = [
        json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    ]
    assert max(line.get("prompts_resting", 0) for line in lines) > 0


# A package with the names that `infir2.verify.gym` uses of reasoning-gym.
PACKAGE = """
from dataclasses import dataclass
@dataclass
class Config:
    seed: int = 0
    size: int = 1
    digits: int = 1
class Sums:
    def __init__(self, config): self.config = config
    def __getitem__(self, number):
        a = (self.config.seed + number) % 10 ** self.config.digits
        return {"question": f"{a}+1=?", "answer": str(a + 1), "metadata": {}}
    def score_answer(self, answer, entry):
        while answer == "hang": pass
        return 1.0 if answer == entry["answer"] else 0.25 * bool(answer)
class Evaluated(Sums):
    def score_answer(self, answer, entry):
        try: return float(eval(answer) == eval(entry["answer"]))
        except Exception: return 0.01
class Unkind(Sums):
    def score_answer(self, answer, entry): return 0.0
class Broken(Sums):
    def score_answer(self, answer, entry): return entry["metadata"]["x"]
class Bulky(Sums):
    def __getitem__(self, number): return [bytes(2 << 30), Sums.__getitem__(self, number)][1]
class Careless(Sums):
    def score_answer(self, answer, entry):
        import os, socket, subprocess
        if answer == "keys":
            return float(any(name in os.environ for name in ("HF_TOKEN", "INFIR2_REWARD_KEY")))
        if answer == "memory": bytes(2 << 30)
        actions = {
            "eval": lambda: eval("1"), "exec": lambda: exec("1"), "system": lambda: os.system(":"),
            "run": lambda: subprocess.run(["true"]), "socket": socket.socket,
            "write": lambda: open("x", "w"), "create": lambda: os.open("x", os.O_CREAT),
            "remove": lambda: os.remove("x"), "make": lambda: os.mkdir("x"),
            "kill": lambda: os.kill(os.getpid(), 0), "compile": lambda: compile("1", "", "eval"),
        }
        try: actions.get(answer, lambda: 0)()
        except Exception: pass
        return 1.0
class Attribute:
    levels = [1, 2, 3]
class Curriculum:
    attributes = {"digits": Attribute}
    def set_global_level(self, level): self.level = level
    def generate_configuration(self, options):
        return Config(**options, digits=Attribute.levels[self.level])
DATASETS = {"sums": (Sums, Config), "evaluated": (Evaluated, Config)}
DATASETS |= {"broken": (Broken, Config), "careless": (Careless, Config), "bulky": (Bulky, Config)}
DATASETS |= {"unkind": (Unkind, Config)}
CURRICULA = {"sums": Curriculum}
def create_dataset(name, **options): return DATASETS[name][0](DATASETS[name][1](**options))
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "reasoning_gym").mkdir()
    (tmp_path / "reasoning_gym" / "__init__.py").touch()
    (tmp_path / "reasoning_gym" / "factory.py").write_text(PACKAGE)
    known = [name for name in sys.modules if name.startswith("reasoning_gym")]
    for name in known:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    gym._dataset.cache_clear()
    yield
    close_functions()
    gym._dataset.cache_clear()
    for name in [name for name in sys.modules if name.startswith("reasoning_gym")]:
        del sys.modules[name]


TASK = "reasoning_gym:sums"


def test_a_task_makes_its_prompts_and_gets_harder_when_solved(
    package: None, tokenizer: ChatTokenizer
) -> None:
    rl = RlSection(reward=(RewardSection(name=TASK, weight=2.0),), gym_problems=4)
    stream = PromptStream([], tokenizer, rl, seed=3)
    drawn = stream.draw(6)
    assert len({each.prompt.messages[0]["content"] for each in drawn}) == 6, "new ones each epoch"
    stream.observe([group(each, 2, 1, part=TASK) for each in drawn])
    assert stream.state["levels"] == {TASK: 0}, "75 % is not enough"
    stream.observe([group(each, 2, 2, part=TASK) for each in drawn])
    assert stream.state["levels"] == {TASK: 1}
    stream.observe([group(each, 2, 2, part=TASK) for each in drawn])
    assert stream.state["levels"] == {TASK: 1}, "problems of an earlier level say nothing"
    again = PromptStream([], tokenizer, rl, 3, json.loads(json.dumps(stream.state)))
    harder = again.draw(2)
    assert names(harder) == names(stream.draw(2))
    assert [each.prompt.difficulty for each in harder] == [1, 1]
    assert again.named(harder[0].name) == harder[0]
    for _ in range(3):
        again.observe([group(each, 2, 2, part=TASK) for each in again.draw(2)])
    assert again.state["levels"] == {TASK: 2}, "the highest that the package has"


@pytest.mark.parametrize("rows", [0, 24])
def test_check_counts_its_problems_with_those_of_files(
    package: None, world: Path, tmp_path: Path, tokenizer: ChatTokenizer, rows: int
) -> None:
    words = options(world, tmp_path, "rl1", rl__gym_problems=6)[1:]
    words.append(f'--rl.reward=["math", "{TASK}"]' if rows else f"--rl.reward={TASK}")
    recipe = load(
        RlRecipe, words[:1], [*words[1:], *([] if rows else ["--data.sources=[]"])]
    ).recipe
    finding, longest = check_sources(recipe, "rl", tokenizer)
    assert f"passes over {rows + 6}" in finding.detail
    assert longest["rl.max_response_tokens"] == recipe.rl.max_prompt_tokens


def test_its_scorer_is_the_reward_in_a_process_that_can_be_killed(
    package: None, tokenizer: ChatTokenizer
) -> None:
    rl = RlSection(reward=(RewardSection(name=TASK),), reward_seconds=1.0)
    (drawn,) = PromptStream([], tokenizer, rl, seed=3).draw(1)
    texts = [f"\\boxed{{{drawn.prompt.answer}}}", "Answer: 0", "no answer", "Answer: hang"]
    scores = find_reward(TASK, rl)(texts, drawn.prompt)
    assert [score.value for score in scores] == [1.0, 0.25, 0.0, 0.0]
    assert [score.reason for score in scores] == ["ok", "wrong", "no_answer", "reward_timeout"]
    completions = [Completion("p", [5], np.zeros(1, np.float32), "stop", 0)] * len(texts)
    rated = rate(completions, texts, drawn.prompt, rl)
    assert [each.is_rated for each in rated] == [True, True, True, False], "no verdict to train on"


def test_a_scorer_runs_no_program_and_has_no_keys(
    package: None, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("INFIR2_REWARD_KEY", "secret")
    name = "reasoning_gym:careless"
    require_rewards(rl := RlSection(reward=(RewardSection(name=name),)))
    (drawn,) = PromptStream([], tokenizer, rl, seed=3).draw(1)
    acts = ["eval", "exec", "system", "run", "socket", "write", "create", "remove", "make", "kill"]
    acts += ["compile"]
    scores = find_reward(name, rl)([f"Answer: {each}" for each in [*acts, "keys"]], drawn.prompt)
    assert [score.value for score in scores] == [0.0] * (len(acts) + 1)
    assert [score.reason for score in scores] == [*(["error"] * len(acts)), "wrong"]
    assert all("evaluates the answer as a program" in score.detail for score in scores[:-1])
    (score,) = find_reward(name, rl)(["Answer: memory"], drawn.prompt)
    assert (score.value, score.reason) == (0.0, "oom")


def test_another_problem_in_another_process_is_a_failure(
    package: None, tokenizer: ChatTokenizer
) -> None:
    rl = RlSection(reward=(RewardSection(name=TASK),))
    (drawn,) = PromptStream([], tokenizer, rl, seed=3).draw(1)
    drawn.prompt.messages[-1]["content"] = "another?"
    (score,) = find_reward(TASK, rl)(["Answer: 1"], drawn.prompt)
    assert (score.reason, "makes another problem" in score.detail) == ("reward_error", True)


def test_a_task_that_is_not_there_is_named_with_the_nearest(package: None) -> None:
    gym.require_task("sums")
    with pytest.raises(ConfigError, match=r"reasoning_gym:sum is no task .* did you mean sums"):
        gym.require_task("sum")
    with pytest.raises(ConfigError, match="its scorer evaluates answers as programs, which inf"):
        gym.require_task("evaluated")
    with pytest.raises(ConfigError, match="gives nothing for the answer of its own problem"):
        gym.require_task("unkind")
    with pytest.raises(
        ConfigError, match=r"no problem whose own answer can be scored .*KeyError: 'x'"
    ):
        gym.require_task("broken")
    with pytest.raises(ConfigError, match=r"no problem whose own answer can be scored \(oom"):
        gym.require_task("bulky")


@pytest.mark.skipif(not importlib.util.find_spec("reasoning_gym"), reason="needs reasoning-gym")
@pytest.mark.parametrize("task", ["chain_sum", "base_conversion", "word_sorting"])
def test_the_real_package_makes_problems_that_its_scorers_accept(task: str) -> None:
    gym.require_task(task)
    for level in (0, 1):
        problem = gym.make_problem(task, 5, level, 17)
        assert problem == gym.make_problem(task, 5, level, 17)
        words = (problem["question"], task, 5, level, 17)
        assert gym.score_answer(problem["answer"], *words) == 1
        assert gym.score_answer("no answer", *words) < 1
