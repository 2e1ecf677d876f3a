"""The reference's scripts work with its paths and environment variables, and stay thin."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted([*ROOT.glob("scripts/*/*.sh"), *ROOT.glob("eval/*.sh")])
STAGES = {
    "scripts/CPT/InfiR2_CPT_FP8_7b.sh": ("cpt", "qwen2.5-7b/cpt.toml", 1),
    "scripts/CPT/InfiR2_CPT_FP8_7b_decay.sh": ("cpt", "qwen2.5-7b/cpt-decay.toml", 1),
    "scripts/CPT/InfiR2_CPT_FP8_1.5b.sh": ("cpt", "qwen2.5-1.5b/cpt.toml", 1),
    "scripts/CPT/InfiR2_CPT_FP8_1.5b_decay.sh": ("cpt", "qwen2.5-1.5b/cpt-decay.toml", 1),
    "scripts/SFT/InfiR2_SFT_FP8_stage1.sh": ("sft", "qwen2.5-7b/sft1.toml", 2),
    "scripts/SFT/InfiR2_SFT_FP8_stage2.sh": ("sft", "qwen2.5-7b/sft2.toml", 2),
    "scripts/RL/InfiR2_RL_FP8_stage1_4node.sh": ("rl", "qwen2.5-7b/rl1.toml", 4),
    "scripts/RL/InfiR2_RL_FP8_stage2_4node.sh": ("rl", "qwen2.5-7b/rl2.toml", 4),
    # the reference's newest names
    "scripts/CPT/InfiR2_CPT_FP8_7B.sh": ("cpt", "qwen2.5-7b/cpt.toml", 1),
    "scripts/CPT/InfiR2_CPT_FP8_7B_decay.sh": ("cpt", "qwen2.5-7b/cpt-decay.toml", 1),
    "scripts/CPT/InfiR2_CPT_FP8_1.5B.sh": ("cpt", "qwen2.5-1.5b/cpt.toml", 1),
    "scripts/CPT/InfiR2_CPT_FP8_1.5B_decay.sh": ("cpt", "qwen2.5-1.5b/cpt-decay.toml", 1),
    "scripts/SFT/InfiR2_SFT_FP8_1.5B_stage1.sh": ("sft", "qwen2.5-1.5b/sft1.toml", 2),
    "scripts/SFT/InfiR2_SFT_FP8_1.5B_stage2.sh": ("sft", "qwen2.5-1.5b/sft2.toml", 2),
    "scripts/SFT/InfiR2_SFT_FP8_7B_stage1.sh": ("sft", "qwen2.5-7b/sft1.toml", 2),
    "scripts/SFT/InfiR2_SFT_FP8_7B_stage2.sh": ("sft", "qwen2.5-7b/sft2.toml", 2),
    "scripts/RL/InfiR2_RL_FP8_7B_stage1_4node.sh": ("rl", "qwen2.5-7b/rl1.toml", 4),
    "scripts/RL/InfiR2_RL_FP8_7B_stage2_4node.sh": ("rl", "qwen2.5-7b/rl2.toml", 4),
}
EVALS = {
    "eval/aime24_eval.sh": ("aime24", "32"),
    "eval/aime25_eval.sh": ("aime25", "32"),
    "eval/gpqa_eval.sh": ("gpqa_diamond", "32"),
    "eval/livecodebenchv5_eval.sh": ("live_code_bench", "8"),
}
EVALS |= {f"scripts/{path}": values for path, values in EVALS.items()}


@pytest.fixture
def variables(tmp_path: Path) -> dict[str, str]:
    """A clean environment, whose `infir2` is this checkout's."""
    tools = tmp_path / "bin"
    tools.mkdir()
    put(tools / "infir2", f'exec {shlex.quote(sys.executable)} -m infir2 "$@"')
    put(tools / "python3", "exit 1")  # it has no SGLang
    return {"PATH": f"{tools}:/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}


@pytest.fixture
def asked(variables: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """The same for evaluations: its `infir2` prints its arguments and whether it has a key."""
    show = "import json, os, sys; print(json.dumps([*sys.argv[1:], os.environ[sys.argv[0]]]))"
    show = show.replace("sys.argv[0]", "'INFIR2_ENGINE_KEY'")
    put(tmp_path / "bin/infir2", f'exec {shlex.quote(sys.executable)} -c "{show}" "$@"')
    return variables | {"MODEL_PATH": "/models/a b", "DATASET_LOCAL": "/data/d"}


def put(tool: Path, text: str) -> None:
    tool.write_text(f"#!/bin/sh\n{text}\n")
    tool.chmod(0o755)


def script(
    path: str, variables: dict[str, str], *words: str, cwd: Path = ROOT
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["bash", str(ROOT / path), *words], env=variables, capture_output=True, text=True, cwd=cwd
    )


def test_every_script_is_thin_executable_and_tested() -> None:
    assert {str(path.relative_to(ROOT)) for path in SCRIPTS} == {
        *STAGES,
        *EVALS,
        "eval/run_benchmark.sh",
    }
    for path in SCRIPTS:
        assert len(path.read_text().splitlines()) <= 15, path
        assert os.access(path, os.X_OK), path


@pytest.mark.parametrize("path", STAGES)
def test_a_stage_starts_its_recipe_on_its_nodes(
    path: str, variables: dict[str, str], tmp_path: Path
) -> None:
    verb, recipe, nodes = STAGES[path]
    result = script(
        path, variables | {"DRY_RUN": "1", "MASTER_ADDR": "n1"}, "--run.seed=5", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    words = shlex.split(result.stdout.splitlines()[-1])
    assert words[-3:-1] == [verb, next(word for word in words if word.endswith(recipe))]
    assert words[-1] == "--run.seed=5"
    assert Path(words[-2]).is_file()
    assert (
        "store_type=file" if nodes == 1 else f"--nodes {nodes} --gpus-per-node 8"
    ) in result.stdout
    slurm = script(
        path, variables | {"DRY_RUN": "1", "LAUNCHER": "slurm", "NODES": "3", "GPUS_PER_NODE": "4"}
    )
    assert "#SBATCH --nodes=3" in slurm.stdout
    assert "#SBATCH --gpus-per-node=4" in slurm.stdout


def words_of(text: str) -> tuple[dict[str, str], str]:
    """(what an evaluation is told, its key) from what the `infir2` of `asked` printed."""
    *words, key = json.loads(text)
    first = words.index("eval")
    given = dict(zip(words[first + 2 :: 2], words[first + 3 :: 2], strict=True))
    return given | {"model": words[first + 1], "before": " ".join(words[:first])}, key


@pytest.mark.parametrize("path", EVALS)
def test_an_evaluation_has_the_references_defaults(path: str, asked: dict[str, str]) -> None:
    name, batch = EVALS[path]
    given, key = words_of(script(path, asked).stdout)
    assert given == {
        "model": "/models/a b",
        "before": "",
        "--benchmarks": name,
        "--data": "/data/d",
        "--run.dir": f"runs/eval/{name}",
        "--model": "a b",
        "--parallel": batch,
        "--samples": "0",  # those of docs/recipe.md
        "--max-tokens": "0",
        "--temperature": "0.65",
        "--top-p": "0.95",
        "--engine": "native",
        "--python": "",
        "--engines": "1",
        "--tensor-parallel": "1",
        "--port": "8801",
    }
    assert key == ""


def test_variables_change_an_evaluation(asked: dict[str, str], tmp_path: Path) -> None:
    words = {
        "MODEL_PATH": "http://127.0.0.1:5/v1",
        "SERVED_NAME": "x",
        "EVAL_WORK_DIR": "out",
        "MAX_NEW_TOKENS": "100",
        "GENERATED_NUM": "2",
        "TEMPERATURE": "0.1",
        "TOP_P": "0.5",
        "EVAL_BATCH": "7",
        "API_PORT": "9",
        "TP_SIZE": "4",
        "API_KEY": "secret",
        "ENGINES": "2",
    }
    put(tmp_path / "bin/python3", "echo /sglang/bin/python3")
    result = script("eval/aime24_eval.sh", asked | words, "--seed", "5")
    given, key = words_of(result.stdout)
    assert key == "secret"
    wanted = {
        **{"model": "http://127.0.0.1:5/v1", "--model": "x", "--run.dir": "out/aime24"},
        **{"--max-tokens": "100", "--samples": "2", "--temperature": "0.1", "--top-p": "0.5"},
        **{"--parallel": "7", "--port": "9", "--tensor-parallel": "4", "--engines": "2"},
        **{"--engine": "sglang", "--python": "/sglang/bin/python3", "--seed": "5"},
    }
    assert given | wanted == given


@pytest.mark.parametrize("path", EVALS)
def test_a_job_runs_on_all_its_nodes_and_is_queued_again(path: str, asked: dict[str, str]) -> None:
    lines = [line for line in (ROOT / path).read_text().splitlines() if line.startswith("#SBATCH")]
    said = " ".join(lines)
    for option in ("--ntasks-per-node=1", "--requeue", "--signal=TERM@300", "--open-mode=append"):
        assert option in said
    given, _ = words_of(script(path, asked | {"SLURM_JOB_ID": "7"}).stdout)
    assert given["before"] == "launch slurm --in-job --"


@pytest.mark.parametrize("path", EVALS)
def test_a_dry_run_can_be_pasted_and_shows_no_key(path: str, asked: dict[str, str]) -> None:
    keyed = asked | {"API_KEY": "secret"}
    dry = script(path, keyed | {"DRY_RUN": "1"})
    assert dry.returncode == 0, dry.stderr
    assert "secret" not in dry.stdout
    pasted = subprocess.run(["bash", "-c", dry.stdout], env=keyed, capture_output=True, text=True)
    assert words_of(pasted.stdout) == words_of(script(path, keyed).stdout)


@pytest.mark.parametrize("path", ["eval/gpqa_eval.sh", "scripts/eval/gpqa_eval.sh"])
def test_a_script_finds_its_neighbor_inside_a_job(
    path: str, asked: dict[str, str], tmp_path: Path
) -> None:
    """Started by its path in a job that was submitted elsewhere; and the copy that sbatch runs."""
    inside = script(
        path,
        asked | {"DRY_RUN": "1", "SLURM_SUBMIT_DIR": str(tmp_path)},
        cwd=tmp_path,
    )
    assert inside.returncode == 0, inside.stderr
    copy = tmp_path / "slurm_script"
    copy.write_text((ROOT / path).read_text())
    copied = script(
        str(copy), asked | {"DRY_RUN": "1", "SLURM_SUBMIT_DIR": str(ROOT)}, cwd=tmp_path
    )
    assert copied.stdout == inside.stdout != ""


def test_an_evaluation_without_a_model_or_questions_says_so(asked: dict[str, str]) -> None:
    for name in ("MODEL_PATH", "DATASET_LOCAL"):
        result = script("eval/gpqa_eval.sh", asked | {name: ""})
        assert result.returncode == 2
        assert "set MODEL_PATH to a model or a URL, DATASET_LOCAL" in result.stderr
