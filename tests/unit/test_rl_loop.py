"""RL on a tiny model: engine and trainer agree to the last bit, a stop loses nothing, dynamic
sampling ends."""

import json
import queue
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from stages import (
    assert_each_step_once,
    assert_same_state,
    curve,
    lines,
    make_rl_start,
    options,
    run,
)

import infir2.rl.dynamic_sampling
import infir2.rl.pipeline
from infir2.checkpoint import open_checkpoint
from infir2.cli import main
from infir2.config.schema import RlSection
from infir2.data import Prompt
from infir2.engines.native import NativeEngine
from infir2.engines.types import Completion
from infir2.errors import ConfigError
from infir2.model import ModelConfig
from infir2.parallel.ranks import Ranks
from infir2.preflight.objective import check_objective
from infir2.rl.dynamic_sampling import Rollouts
from infir2.rl.groups import Group, Response, training_samples
from infir2.rl.journal import Journal
from infir2.rl.policy_update import PolicyUpdate, split_evenly
from infir2.rl.reference import ReferencePolicy
from infir2.rl.step_metrics import rollout_metrics

STEP_PARTS = ("generate", "verify", "logprobs", "update", "publish", "wait")


def reward_even_lengths(completions, texts, prompt, rl):  # type: ignore[no-untyped-def]
    """A reward that an untrained model earns in half of its answers."""
    return [
        Response(
            completion,
            text,
            "wrong" if sum(completion.token_ids) % 2 else "ok",
            float(sum(completion.token_ids) % 2 == 0),
        )
        for completion, text in zip(completions, texts, strict=True)
    ]


@pytest.fixture(scope="module")
def start(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A little-trained model and its FP8 export."""
    return make_rl_start(world, tmp_path_factory.mktemp("start"))


def words(world: Path, start: Path, name: Path, **values: object) -> list[str]:
    given = {
        "schedule__total_steps": 4,
        "checkpoint__save_every": 2,
        "schedule__learning_rate": 1e-3,
        "rl__mini_batches": 2,
    }
    given |= {"model__path": start / "cpt", "rollout__model": start / "fp8", **values}
    return options(world, name, "rl1", **given)


def test_the_engine_is_the_trainer_and_the_policy_moves(
    world: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(infir2.rl.dynamic_sampling, "rate", reward_even_lengths)
    run(words(world, start, tmp_path / "rl"))
    trained = lines(tmp_path / "rl", "train")
    assert [line["policy_version"] for line in trained] == [1, 2, 3, 4]
    assert max(line["mismatch_mean"] for line in trained) <= 1e-7
    assert max(line["mismatch_max"] for line in trained) <= 1e-4
    assert all(line["trained_tokens"] > 0 and line["gradient_norm"] > 0 for line in trained)
    assert sum(line["capped_fraction"] for line in trained) == 0
    assert (tmp_path / "rl" / "samples.jsonl").read_text().count("\n") >= 4
    for line in trained:  # a step's time has no other part worth a name
        parts = sum(line[f"{part}_seconds"] for part in STEP_PARTS)
        assert line["seconds"] - 0.5 <= parts <= line["seconds"]
    assert all(line["generate_seconds"] > 0 for line in trained)
    assert trained[0]["publish_seconds"] == 0 < trained[1]["publish_seconds"]


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_an_engine_of_another_precision_than_the_trainer(
    precision: str, world: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It samples from another policy, close to the trainer's, and gets its weights each step."""
    monkeypatch.setattr(infir2.rl.dynamic_sampling, "rate", reward_even_lengths)
    files = start / "fp8"
    if precision == "bf16":
        files = tmp_path / "bf16"
        assert main(["export", "hf", str(start / "cpt"), "--to", str(files)]) == 0
    given = {"fp8__enabled": str(precision == "bf16").lower(), "rollout__model": files}
    asked = words(world, start, tmp_path / "rl", **given)
    assert main(["check", *asked[1:]]) != 0  # never by accident
    run([*asked, f"--rollout.precision={precision}"])
    trained = lines(tmp_path / "rl", "train")
    assert [line["policy_version"] for line in trained] == [1, 2, 3, 4]
    for line in trained:
        assert 0 < line["mismatch_mean"] < 0.3  # of random weights
        assert line["mismatch_equal"] < 0.5


def test_a_reference_an_entropy_bonus_and_two_passes(
    world: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The KL to the policy's own start is 0 at first; a second pass has other ratios than 1."""
    monkeypatch.setattr(infir2.rl.dynamic_sampling, "rate", reward_even_lengths)
    objective = {"rl__kl_coefficient": 0.1, "rl__reference": start / "fp8", "rl__clip_high": 1e-4}
    objective |= {"rl__entropy_coefficient": 0.01, "rl__loss": "gspo", "rl__loss_mean": "response"}
    steps = {}
    for passes in (1, 2):
        few = {"schedule__total_steps": 3 - passes, "rl__mini_batches": 1, "rl__passes": passes}
        run(words(world, start, tmp_path / str(passes), **objective, **few))
        steps[passes] = lines(tmp_path / str(passes), "train")
    first, second = steps[1]
    assert first["reference_kl"] == first["clip_fraction"] == 0
    assert second["reference_kl"] > 0
    (both,) = steps[2]
    assert both["reference_kl"] > 0
    assert both["clip_fraction"] > 0
    assert both["trained_tokens"] == 2 * first["trained_tokens"]


def test_a_reference_of_another_shape_is_refused(start: Path) -> None:
    rl = RlSection(reference=str(start / "fp8"), kl_coefficient=0.1)
    policy = ModelConfig.from_hf(json.loads((start / "fp8" / "config.json").read_text()))
    other = replace(policy, num_layers=policy.num_layers + 1)
    with pytest.raises(ConfigError, match=r"rl\.reference: .* has num_layers = "):
        ReferencePolicy(rl, other, torch.float32, torch.device("cpu"), 64)
    with pytest.raises(ConfigError, match=r"rl\.reference: .* has num_layers = "):
        check_objective(rl, other)
    assert check_objective(rl, policy).detail == f"grpo, KL to {start / 'fp8'}"


@pytest.mark.parametrize(
    ("values", "sentence", "checked"),
    [
        (
            {"rl__loss": "no_module:f"},
            "rl.loss: no_module:f cannot be imported (",
            "FAIL  objective  rl.loss: the process that checks answers cannot start "
            "(ModuleNotFoundError: No module named 'no_module'); install or fix the module of no_",
        ),
        ({"rl__loss": "grop"}, "rl.loss = 'grop' is unknown; did you mean grpo?", ""),
        (
            {"rl__reference": "nowhere", "rl__kl_coefficient": 0.1},
            "rl.reference: nowhere does not exist",
            "FAIL  objective  rl.reference: nowhere does not exist",
        ),
        ({"rl__kl_coefficient": 0.1}, "rl.reference is missing", ""),
    ],
)
def test_a_loss_that_cannot_be_is_one_sentence(
    world: Path,
    start: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    values: dict[str, object],
    sentence: str,
    checked: str,
) -> None:
    arguments = words(world, start, tmp_path / "rl", **values)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
    assert main(["check", *arguments]) == (1 if checked else 2)
    said = capsys.readouterr()
    assert (checked or sentence) in said.out + said.err


def test_truncated_responses_are_not_trained_and_still_count() -> None:
    logprobs = np.zeros(2, dtype=np.float32)
    responses = [
        Response(
            Completion(name, [5, 6], logprobs, finish, 0), "", "ok" if reward else "wrong", reward
        )
        for name, finish, reward in (("a", "stop", 1.0), ("b", "length", 0.0))
    ]
    group = Group("0/p", Prompt("p", [], "", None, ""), [3], responses)
    whole = training_samples([group], RlSection())
    (kept,) = training_samples([group], RlSection(mask_truncated=True))
    assert [sample.token_inputs["advantages"][0] for sample in whole] == pytest.approx(
        [1, -1], abs=1e-5
    )
    assert kept.token_inputs["advantages"][0] == whole[0].token_inputs["advantages"][0]
    assert training_samples([group], RlSection(mask_truncated=False))[1].loss_mask.sum() == 2


def test_an_evaluation_in_the_loop_keeps_every_answer(
    world: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(infir2.rl.dynamic_sampling, "rate", reward_even_lengths)
    problems = {"evaluate__problems__0__path": world / "heldout.jsonl", "rl__evaluate_every": 1}
    limits = {"evaluate__max_problems": 3, "evaluate__max_response_tokens": 4}
    few = {"schedule__total_steps": 2, "checkpoint__save_every": 2}
    run(words(world, start, tmp_path / "rl", **problems, **limits, **few))
    evaluations = lines(tmp_path / "rl", "evaluation")
    assert [scores["step"] for scores in evaluations] == [1, 2]
    for line in lines(tmp_path / "rl", "train"):  # what the evaluation took is no part of a step
        assert sum(line[f"{part}_seconds"] for part in STEP_PARTS) <= line["seconds"]
    for scores in evaluations:
        kept = tmp_path / "rl" / "evaluations" / f"step-{scores['step']}.jsonl"
        rows = [json.loads(line) for line in kept.read_text().splitlines()]
        assert len(rows) == 3 * scores["k"]
        assert sum(row["reward"] for row in rows) / len(rows) == pytest.approx(scores["avg_at_k"])
        assert scores["low"] <= scores["avg_at_k"] <= scores["high"]


def test_a_killed_run_repeats_its_rollouts_and_ends_the_same(
    world: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(infir2.rl.dynamic_sampling, "rate", reward_even_lengths)
    run(words(world, start, tmp_path / "a"))

    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    real = infir2.rl.pipeline.RolloutPipeline._collect
    calls = []

    def collect_thrice(self, *arguments):  # type: ignore[no-untyped-def]
        calls.append(self._engine.policy_version)
        return die() if len(calls) == 4 else real(self, *arguments)

    monkeypatch.setattr(infir2.rl.pipeline.RolloutPipeline, "_collect", collect_thrice)
    with pytest.raises(Killed):
        main(words(world, start, tmp_path / "b"))
    assert calls == [0, 1, 2, 3]
    monkeypatch.setattr(infir2.rl.pipeline.RolloutPipeline, "_collect", real)
    run(words(world, start, tmp_path / "b"))
    monkeypatch.setattr(infir2.rl.loop, "make_trainer", die)  # a finished run needs no model
    run(words(world, start, tmp_path / "b"))
    names = (
        "loss",
        "reward",
        "gradient_norm",
        "response_tokens",
        "groups_sampled",
        "policy_version",
    )
    assert curve(tmp_path / "b", *names) == curve(tmp_path / "a", *names)
    assert_same_state(tmp_path / "b", tmp_path / "a")


def test_finished_groups_are_kept_and_the_rest_is_sampled_again(
    world: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in step 4 after two groups: the resumed run samples only the others."""
    asked: list[tuple[int, str]] = []  # policy version and request
    real = NativeEngine.submit

    def submit(self, request):  # type: ignore[no-untyped-def]
        asked.append((self.policy_version, request.id))
        return real(self, request)

    monkeypatch.setattr(NativeEngine, "submit", submit)
    monkeypatch.setattr(infir2.rl.dynamic_sampling, "rate", reward_even_lengths)
    run(words(world, start, tmp_path / "a"))
    after_step_2 = {request for version, request in asked if version >= 2}

    class Killed(BaseException):
        pass

    finish, done = infir2.rl.dynamic_sampling.GroupGenerator._finish, []

    def finish_or_die(self, key, completions, answer):  # type: ignore[no-untyped-def]
        if completions[0].policy_version == 3 and len(done) == 2:
            raise Killed
        done.extend([key] * (completions[0].policy_version == 3))
        return finish(self, key, completions, answer)

    monkeypatch.setattr(infir2.rl.dynamic_sampling.GroupGenerator, "_finish", finish_or_die)
    with pytest.raises(Killed):
        main(words(world, start, tmp_path / "b"))
    monkeypatch.setattr(infir2.rl.dynamic_sampling.GroupGenerator, "_finish", finish)
    kept = tmp_path / "b" / "rollouts" / "step-4-0.jsonl"
    assert kept.read_text().count("\n") == 2
    kept.write_text(kept.read_text() + '{"key": "cut by the ki')
    asked.clear()
    run(words(world, start, tmp_path / "b"))
    again = {request for _, request in asked}
    kept_of_step_3 = (tmp_path / "b" / "rollouts" / "step-3-0.jsonl").read_text().count("\n")
    assert again < after_step_2
    assert len(after_step_2) - len(again) == 4 * (
        kept_of_step_3 + 2
    )  # groups of four responses that were not sampled again
    names = (
        "loss",
        "reward",
        "gradient_norm",
        "response_tokens",
        "groups_sampled",
        "policy_version",
        "mismatch_max",
    )
    assert curve(tmp_path / "b", *names) == curve(tmp_path / "a", *names)
    assert_same_state(tmp_path / "b", tmp_path / "a")
    assert [json.loads(line)["key"] for line in kept.read_text().splitlines()][:2] == done[:2]


def test_asynchronous_samples_the_next_step_while_one_trains(
    world: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each update but the last starts after the engine has started on the next step's responses."""
    versions: queue.Queue[int] = queue.Queue()  # of what is sampled in the background
    generate = infir2.rl.dynamic_sampling.generate_groups
    update = PolicyUpdate.__call__

    def generate_and_record(engine, *arguments):  # type: ignore[no-untyped-def]
        if threading.current_thread() is not threading.main_thread():
            versions.put(engine.policy_version)
        return generate(engine, *arguments)

    updates = []

    def update_once_sampling(*words):  # type: ignore[no-untyped-def]
        updates.append(versions.get(timeout=60) if len(updates) < 3 else None)
        return update(*words)

    monkeypatch.setattr(infir2.rl.dynamic_sampling, "rate", reward_even_lengths)
    monkeypatch.setattr(infir2.rl.dynamic_sampling, "generate_groups", generate_and_record)
    monkeypatch.setattr(PolicyUpdate, "__call__", update_once_sampling)
    run(
        words(
            world,
            start,
            tmp_path / "rl",
            rl__max_off_policy_steps=1,
            rl__over_sample_prompts=3,
            rl__mini_batches=1,
        )
    )
    assert updates == [0, 1, 2, None]  # beside step n, step n + 1 from version n - 1
    trained = lines(tmp_path / "rl", "train")
    assert [line["staleness"] for line in trained] == [0, 1, 1, 1]
    assert [line["policy_version"] for line in trained] == [1, 2, 3, 4]
    assert trained[0]["mismatch_max"] <= 1e-4
    assert (
        min(line["mismatch_mean"] for line in trained[1:]) > 1e-4
    )  # the policy has moved: importance weights see it
    assert_each_step_once(tmp_path / "rl", 4)
    for line in trained[1:]:  # what is sampled ahead is no part of the step
        here = sum(line[f"{part}_seconds"] for part in STEP_PARTS[2:])
        assert line["generate_seconds"] > 0
        assert line["seconds"] - 0.5 <= here <= line["seconds"]


def test_responses_longer_than_a_forward_pass_are_trained(
    world: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is alone in its pass; the gradient is that of larger passes."""
    monkeypatch.setattr(infir2.rl.dynamic_sampling, "rate", reward_even_lengths)
    values = {"schedule__total_steps": 1, "rl__mini_batches": 1}
    for name, tokens in (("wide", 2048), ("narrow", 8)):
        run(words(world, start, tmp_path / name, data__micro_batch_tokens=tokens, **values))
    wide, narrow = (lines(tmp_path / name, "train")[0] for name in ("wide", "narrow"))
    assert narrow["trained_tokens"] == wide["trained_tokens"] > 0
    assert narrow["gradient_norm"] == pytest.approx(wide["gradient_norm"], rel=1e-2)
    assert narrow["gradient_norm"] > 0


@pytest.mark.parametrize("overlong_buffer", [0, 8])
def test_wrong_answers_end_within_the_budget_and_change_nothing(
    world: Path, start: Path, tmp_path: Path, overlong_buffer: int
) -> None:
    """An untrained model is never right: no group has signal, with a length penalty too."""
    values = {"schedule__total_steps": 10240, "train__stop_after_step": 2}
    values["rl__overlong_buffer_tokens"] = overlong_buffer
    run(words(world, start, tmp_path / "rl", **values))
    trained = lines(tmp_path / "rl", "train")
    assert [
        (line["groups_sampled"], line["groups_without_signal"], line["skipped"]) for line in trained
    ] == [(4, 4, True)] * 2
    assert {line["event"] for line in lines(tmp_path / "rl", "event")} == {"nothing_to_train"}
    assert open_checkpoint(tmp_path / "rl").step == 2
    assert all(line["accuracy"] == 0 for line in trained)
    assert (sum(line["reward"] for line in trained) < 0) == bool(overlong_buffer)


def test_signal_is_a_verdict_that_differs() -> None:
    """Not a reward that differs: training on wrong answers of several lengths taught shortness."""
    completion = Completion("p/0", [1], np.zeros(1, dtype=np.float32), "length", 0)
    prompt = Prompt("p", [{"role": "user", "content": "1+1"}], "2", None, "rows.jsonl:1")

    def has_signal(*responses: tuple[bool, float]) -> bool:
        rewarded = [
            Response(completion, "", "ok" if correct else "wrong", reward)
            for correct, reward in responses
        ]
        return Group("0/p", prompt, [1], rewarded).has_signal

    assert not has_signal((False, 0.0), (False, -0.3), (False, -1.0))
    assert not has_signal((True, 1.0), (True, 0.4))
    assert has_signal((False, 0.0), (True, 1.0))
    assert has_signal((False, 0.0), (True, 0.0))


def test_metrics_of_a_step_tell_why_a_reward_is_flat() -> None:
    def response(length: int, reason: str, finish: str = "stop", version: int = 4) -> Response:
        logprobs = np.zeros(length, dtype=np.float32)
        completion = Completion("p/0", [1] * length, logprobs, finish, version)
        return Response(completion, "", reason, float(reason == "ok"))

    def group(*responses: Response) -> Group:
        return Group("0/p", Prompt("p", [], "2", None, ""), [1], list(responses))

    rollouts = Rollouts(
        [group(response(2, "ok"), response(4, "oom"))],
        [
            group(response(6, "ok"), response(8, "ok", version=3)),
            group(response(10, "no_answer", "length"), response(30, "timeout")),
            group(response(10, "reward_timeout"), response(10, "reward_error")),
        ],
    )
    assert rollout_metrics(rollouts, step=5, seconds=2.0) == {
        "tokens_per_second": 40.0,
        "reward": 0.5,
        "reward_raw": 0.5,
        "reward_failures": 2,
        "prompts_resting": 0,
        "accuracy": 0.5,
        "response_tokens": 10.0,
        "response_tokens_p50": 9.0,
        "response_tokens_p95": pytest.approx(23),
        "truncated_fraction": 1 / 8,
        "no_answer_fraction": 1 / 8,
        "verifier_timeout_fraction": 2 / 8,
        "verifier_error_fraction": 2 / 8,
        "groups_sampled": 4,
        "groups_without_signal": 3,
        "groups_all_right": 1,
        "groups_all_wrong": 1,
        "groups_unfinished": 0,
        "staleness": 1,
    }


def test_a_group_with_signal_is_not_all_wrong_though_no_response_earns_1() -> None:
    def graded(*rewards: float) -> Group:
        completion = Completion("p/0", [1], np.zeros(1, np.float32), "stop", 0)
        responses = [Response(completion, "", "wrong", each, {"m:f": each}) for each in rewards]
        return Group("0/p", Prompt("p", [], "2", None, ""), [1], responses)

    rollouts = Rollouts([graded(0.25, 0.5)], [graded(0.5, 0.5), graded(0, 0)])
    metrics = rollout_metrics(rollouts, step=1, seconds=1.0)
    names = ("groups_sampled", "groups_without_signal", "groups_all_right", "groups_all_wrong")
    assert [metrics[name] for name in names] == [3, 2, 0, 2]


def test_an_engine_with_other_weights_is_refused(
    world: Path, start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(
        [
            "export",
            "fp8",
            str(start / "hf"),
            "--to",
            str(tmp_path / "fp32"),
            "--scale-format",
            "fp32",
        ]
    )
    assert main(words(world, start, tmp_path / "rl", rollout__model=tmp_path / "fp32")) == 1
    assert "between the trainer and the rollout engine" in capsys.readouterr().err


def test_a_journal_that_the_disk_refuses_costs_its_lines_and_not_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = Journal(tmp_path, Ranks(), lambda: None)
    journal.open(1, 1, 0)
    journal.begin(1)
    (tmp_path / "rollouts" / "step-1-0.jsonl").mkdir()
    response = Response(
        Completion("p/0", [1, 2], np.array([-0.5, -1.25], dtype=np.float32), "stop", 0),
        "a",
        "ok",
        1.0,
    )
    journal.add("first", [response])
    journal.add("second", [response])
    assert capsys.readouterr().err.count("cannot be written") == 1
    (tmp_path / "rollouts" / "step-1-0.jsonl").rmdir()
    journal.add("third", [response])
    again = Journal(tmp_path, Ranks(), lambda: None)
    again.open(1, 1, 0)
    assert all(
        again.get(key)[0].completion.rollout_logprobs.tolist() == [-0.5, -1.25]
        for key in ("first", "second", "third")
    )


def test_a_resumed_run_needs_nothing_of_the_run_it_began_with(world: Path, tmp_path: Path) -> None:
    start = make_rl_start(world, tmp_path / "start")
    words = options(
        world,
        tmp_path / "run",
        "rl1",
        model__path=start / "cpt",
        rollout__model=start / "fp8",
        rl__evaluate_every=1,
    )
    words += [
        f"--evaluate.problems.0.path={world / 'heldout.jsonl'}",
        "--evaluate.max_problems=2",
        "--evaluate.max_response_tokens=4",
    ]
    words += ["--data.tokenizer=", "--evaluate.samples=1"]
    run([*words, "--schedule.total_steps=1"])
    shutil.rmtree(start / "cpt")
    run([*words, "--schedule.total_steps=2", "--accept-changes"])
    assert [step for step, _ in curve(tmp_path / "run", "loss")] == [1, 2]


@pytest.mark.parametrize(
    ("num_groups", "sizes"), [(5, [2, 1, 1, 1]), (3, [1, 1, 1]), (8, [2, 2, 2, 2]), (0, [])]
)
def test_mini_batches_are_as_many_as_asked_for(num_groups: int, sizes: list[int]) -> None:
    groups = list(range(num_groups))
    parts = split_evenly(groups, 4)  # type: ignore[type-var]
    assert [len(part) for part in parts] == sizes
    assert [group for part in parts for group in part] == groups
