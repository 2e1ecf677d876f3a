"""Rollouts that are kept, and trained on again: the same weights, or one sentence."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from stages import assert_same_state, curve, guessing, lines, make_guessing_start, options, run

import infir2.rl.loop
from infir2.cli import main
from infir2.config import load
from infir2.config.schema import RlRecipe, RlSection
from infir2.data import Prompt
from infir2.engines.types import Completion
from infir2.errors import ConfigError
from infir2.report.groups import groups_html
from infir2.report.page import write_report
from infir2.report.read import read_runs
from infir2.rl.dynamic_sampling import Rollouts
from infir2.rl.groups import Group, Response
from infir2.rl.kept_rollouts import LastKept, sampling_origin, write_kept
from infir2.rl.policy_update import PolicyUpdate

STEPS = 3
VALUES = {
    "schedule__total_steps": STEPS,
    "rl__mini_batches": 1,
    "rl__evaluate_every": 0,
    "rl__max_response_tokens": 24,
    "rl__chunk_tokens": 10,
    "rl__partial": "true",
    "rl__over_sample_prompts": 9,
}
NAMES = ("loss", "reward", "gradient_norm", "response_tokens", "groups_sampled", "mismatch_max")


@pytest.fixture(scope="module")
def start(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_guessing_start(world, tmp_path_factory.mktemp("start"))


def words(world: Path, start: Path, run_dir: Path, **values: object) -> list[str]:
    return options(world, run_dir, "rl1", **(VALUES | guessing(start) | values))


@pytest.fixture(scope="module")
def kept(world: Path, start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("kept") / "run"
    run(words(world, start, directory, rl__keep_rollouts="true"))
    return directory


def test_training_on_kept_rollouts_repeats_the_run_bit_for_bit(
    world: Path, start: Path, kept: Path, tmp_path: Path
) -> None:
    run([*words(world, start, tmp_path / "b"), f"--train-only={kept}"])
    assert curve(tmp_path / "b", *NAMES) == curve(kept, *NAMES)
    assert_same_state(tmp_path / "b", kept)
    assert not (tmp_path / "b" / "rollouts").exists(), "nothing is sampled"


def test_kept_rollouts_have_the_log_probabilities_of_both(kept: Path) -> None:
    for step in range(1, STEPS + 1):
        path = kept / "kept_rollouts" / f"step-{step}.jsonl"
        header, *groups = [json.loads(line) for line in path.read_text().splitlines()]
        assert header["groups"] == len(groups)
        differences = []
        for group in groups:
            for response in group["responses"]:
                trainer = response["trainer_logprobs"]
                rollout = response["completion"]["rollout_logprobs"]
                assert len(trainer) == (len(rollout) if group["trained"] else 0)
                differences += [abs(a - b) for a, b in zip(trainer, rollout, strict=False)]
        logged = lines(kept, "train")[step - 1]["mismatch_max"]
        assert max(differences) == pytest.approx(logged, abs=1e-6)


def test_log_probabilities_of_the_trainer_are_at_their_tokens_around_an_environments_answer(
    tmp_path: Path,
) -> None:
    rollout = np.array([-1, -2, 0, 0, -3], dtype=np.float32)
    completion = Completion("p/0", [11, 12, 13, 14, 15], rollout, "stop", 0, outside=((2, 4),))
    asked = Prompt("p", [{"role": "user", "content": "q"}], "5", None, "rl.jsonl:1")
    group = Group("0/p", asked, [7], [Response(completion, "", "ok", 1.0)])
    key = np.array([7, 11, 12, 13, 14, 15], dtype=np.int32).tobytes()
    scored = {key: np.array([-1.5, -2.25, -3.125], dtype=np.float32)}
    write_kept(tmp_path, 1, Rollouts([group]), {}, scored, lambda ids: "x" * len(ids))
    step, shown = (tmp_path / "kept_rollouts" / f"{name}-1.jsonl" for name in ("step", "shown"))
    (response,) = json.loads(step.read_text().splitlines()[1])["responses"]
    assert response["trainer_logprobs"] == [-1.5, -2.25, 0, 0, -3.125]
    (response,) = json.loads(shown.read_text())["responses"]
    assert response["differences"] == [-0.5, -0.25, 0, 0, -0.125]
    assert len(response["pieces"]) == 5


def test_a_step_without_samples_keeps_no_log_probabilities_of_the_one_before() -> None:
    recipe = SimpleNamespace(rl=RlSection(keep_rollouts=True))
    update = PolicyUpdate(recipe, None, None, None, {b"earlier": np.zeros(1)})  # type: ignore[arg-type]
    update([], 1e-6)
    assert update.kept_logprobs == {}


@pytest.mark.parametrize(
    "option",
    [
        "--run.seed=7",
        "--data.sources=[{path = 'x.jsonl'}]",
        "--data.system_prompt=Think.",
        "--rollout.precision=bf16",
    ],
)
def test_rollouts_go_on_from_the_same_prompts_and_weights_only(
    world: Path, start: Path, tmp_path: Path, option: str
) -> None:
    arguments = words(world, start, tmp_path)[1:]
    recipe, changed = (
        load(RlRecipe, arguments[:1], [*arguments[1:], *more]).recipe for more in ([], [option])
    )
    origin = sampling_origin(recipe, "a")
    kept = LastKept(2, {}, json.loads(json.dumps(origin)))
    kept.require(origin)
    name = option[2:].partition("=")[0]
    with pytest.raises(ConfigError, match=rf"2 steps that were sampled with {name} = "):
        kept.require(sampling_origin(changed, "a"))
    with pytest.raises(ConfigError, match=r"sampled with the digest .* = 'a', and now it is 'b'"):
        kept.require(sampling_origin(recipe, "b"))
    with pytest.raises(ConfigError, match="a run that trains"):
        LastKept(2, {}).require(origin)
    LastKept(0, {}).require(origin)


def test_rollouts_without_training_then_training(
    world: Path,
    start: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first step is that of an ordinary run; the others come from the same weights."""
    sampled = words(world, start, tmp_path / "a")
    run([*sampled, "--train.stop_after_step=1", "--rollout-only"])
    first = tmp_path / "a" / "kept_rollouts" / "step-1.jsonl"
    before = first.stat().st_mtime_ns
    assert main(["check", *sampled, "--rollout-only"]) == 0
    assert "steps whose rollouts it has: 1" in capsys.readouterr().out
    run([*sampled, "--rollout-only"])
    assert not list((tmp_path / "a").glob("checkpoints/step-*"))
    assert sorted(path.name[5] for path in first.parent.glob("step-*")) == ["1", "2", "3"]
    assert first.stat().st_mtime_ns == before, "what is kept is not sampled again"
    versions = {
        response["completion"]["policy_version"]
        for path in (tmp_path / "a" / "kept_rollouts").glob("step-*")
        for line in path.read_text().splitlines()[1:]
        for response in json.loads(line)["responses"]
    }
    assert versions == {0}
    with monkeypatch.context() as patch:
        patch.setattr(infir2.rl.loop, "open_engine", lambda *_: pytest.fail("loads an engine"))
        assert main([*sampled, "--run.seed=77", "--rollout-only"]) == 2
    assert "3 steps that were sampled with run.seed = " in capsys.readouterr().err
    lenient = {"rl__max_mismatch_kl": 1e9, "rl__max_mismatch_prob_error": 1e9}
    run([*words(world, start, tmp_path / "b", **lenient), "--train-only", str(tmp_path / "a")])
    run(words(world, start, tmp_path / "c", schedule__total_steps=1))
    assert curve(tmp_path / "b", *NAMES)[:1] == curve(tmp_path / "c", *NAMES)


def test_the_report_shows_groups_and_survives_damaged_ones(kept: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(kept, run_dir, ignore=shutil.ignore_patterns("checkpoints", "rollouts"))
    shown = run_dir / "kept_rollouts" / f"shown-{STEPS}.jsonl"
    first, *others = shown.read_text().splitlines()
    row = json.loads(first)
    row["prompt"]["messages"][-1]["content"] = "<script>alert(1)</script>"
    row["responses"][0] |= {"pieces": ["a", "<b>", "c"], "differences": [0.0, -0.7, 0.2]}
    row["responses"][0]["parts"] = {"math": 1.0, "overlong": -0.25}
    damaged = ['{"trained": true}', "[7]", "nonsense", json.dumps(row | {"responses": 3})]
    shown.write_text("\n".join([json.dumps(row), *damaged, *others]) + "\n")
    page = write_report([run_dir], tmp_path / "report.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    colored = 'a<i class="d3" title="0.7">&lt;b&gt;</i><i class="d2" title="0.2">c</i>'
    assert colored in page
    assert '<span class="badge">overlong −0.25</span>' in page
    num_shown = sum(
        len(path.read_text().splitlines()) for path in shown.parent.glob("shown-*.jsonl")
    )
    assert page.count('<details class="sample group"') == num_shown - len(damaged)
    assert page.count('class="sample"><summary><span class="badge') >= num_shown
    (small,) = [groups_html(run, 3000) for run in read_runs([run_dir])]
    assert 0 < len(small) < 6000


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def lose_a_line(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def change_a_reward(path: Path) -> None:
    path.write_text(path.read_text().replace('"reward": 1.0', '"reward": 9.0', 1))


@pytest.mark.parametrize(
    ("harm", "option", "code", "sentence"),
    [
        (cut, "", 4, "step-2.jsonl is damaged or not complete"),
        (lose_a_line, "", 4, "step-2.jsonl is damaged or not complete"),
        (change_a_reward, "", 4, "step-2.jsonl is damaged or not complete"),
        (Path.unlink, "", 4, "set train.stop_after_step = 1"),
        (None, "--rl.temperature=0.9", 2, "was sampled with rl.temperature = 1.0"),
        (None, "--rl.group_size=5", 2, "was sampled with rl.group_size = 4"),
        (None, "--rollout-only", 2, "exclude each other"),
    ],
)
def test_rollouts_of_another_recipe_or_cut_short_are_refused(
    world: Path,
    start: Path,
    kept: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    harm: object,
    option: str,
    code: int,
    sentence: str,
) -> None:
    shutil.copytree(kept / "kept_rollouts", tmp_path / "a" / "kept_rollouts")
    if callable(harm):
        harm(tmp_path / "a" / "kept_rollouts" / "step-2.jsonl")
    arguments = [*words(world, start, tmp_path / "b"), f"--train-only={tmp_path / 'a'}"]
    arguments += filter(None, [option])
    assert main(arguments) == code
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
    if "damaged" not in sentence:  # which only a reading of all steps can tell
        assert "resumed" not in error
        assert " parameters, on cpu" not in error, "refused before a model is built"
        assert main(["check", *arguments]) == (1 if "excl" not in sentence else 2)
        said = capsys.readouterr()
        assert sentence in said.out + said.err


def test_a_directory_without_rollouts_is_named(
    world: Path, start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words(world, start, tmp_path / "b"), f"--train-only={tmp_path}"]) == 2
    assert "has no kept_rollouts" in capsys.readouterr().err
