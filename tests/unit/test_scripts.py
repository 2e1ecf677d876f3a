"""The reference's scripts work with its paths and environment variables, and stay thin."""

import http.server
import json
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
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
    "eval/aime24_eval.sh": ("aime24", 31000, "32"),
    "eval/aime25_eval.sh": ("aime25", 31000, "32"),
    "eval/gpqa_eval.sh": ("gpqa_diamond", 26000, "8"),
    "eval/livecodebenchv5_eval.sh": ("live_code_bench", 27000, "8"),
}
EVALS |= {f"scripts/{path}": values for path, values in EVALS.items()}


@pytest.fixture
def variables(tmp_path: Path) -> dict[str, str]:
    """A clean environment.

    Its `infir2` is this checkout's, and its `evalscope` prints its arguments.
    """
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "infir2").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m infir2 "$@"\n')
    show = "import json, sys; print(json.dumps(sys.argv[1:]))"
    (tools / "evalscope").write_text(
        f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c {shlex.quote(show)} "$@"\n'
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    return {"PATH": f"{tools}:/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}


@pytest.fixture
def port() -> Iterator[str]:
    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield str(server.server_port)
    server.shutdown()


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
        "eval/run_evalscope.sh",
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


@pytest.mark.parametrize("path", EVALS)
def test_an_evaluation_asks_the_users_server(
    path: str, variables: dict[str, str], port: str, tmp_path: Path
) -> None:
    dataset, max_tokens, samples = EVALS[path]
    result = script(
        path,
        variables
        | {
            "API_PORT": port,
            "SERVED_NAME": "x",
            "DATASET_LOCAL": "/data/d",
            "EVAL_WORK_DIR": "out",
        },
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    given = dict(zip(said[1::2], said[2::2], strict=True))
    assert (given["--datasets"], given["--repeats"], given["--model"], given["--work-dir"]) == (
        dataset,
        samples,
        "x",
        "out",
    )
    assert given["--api-url"] == f"http://127.0.0.1:{port}/v1"
    assert json.loads(given["--generation-config"]) == {
        "max_tokens": max_tokens,
        "temperature": 0.65,
        "top_p": 0.95,
    }
    arguments = json.loads(given["--dataset-args"])[dataset]
    assert arguments["local_path"] == "/data/d"
    assert arguments["filters"] == {"remove_until": "</think>"}
    if dataset.startswith("aime"):
        assert (
            arguments["system_prompt"]
            == r"Please reason step by step, and put your final answer within \boxed{}."
        )
    if dataset == "live_code_bench":
        assert arguments["extra_params"] == {"start_date": "2024-08-01", "end_date": "2025-02-01"}


@pytest.mark.parametrize("path", EVALS)
def test_a_dry_run_needs_neither_evalscope_nor_a_server_and_can_be_pasted(
    path: str, variables: dict[str, str], tmp_path: Path
) -> None:
    dataset, max_tokens, _ = EVALS[path]
    dry = script(
        path,
        variables
        | {"PATH": "/usr/bin:/bin", "DRY_RUN": "1", "EVAL_WORK_DIR": "a b", "API_PORT": "1"},
        cwd=tmp_path,
    )
    assert dry.returncode == 0, dry.stderr
    pasted = subprocess.run(
        ["bash", "-c", dry.stdout], env=variables, capture_output=True, text=True
    )
    given = json.loads(pasted.stdout)
    assert given[given.index("--work-dir") + 1] == "a b"
    assert json.loads(given[given.index("--generation-config") + 1])["max_tokens"] == max_tokens
    assert dataset in json.loads(given[given.index("--dataset-args") + 1])


@pytest.mark.parametrize("path", ["eval/gpqa_eval.sh", "scripts/eval/gpqa_eval.sh"])
def test_a_script_finds_its_neighbor_inside_a_job(
    path: str, variables: dict[str, str], tmp_path: Path
) -> None:
    """Started by its path in a job that was submitted elsewhere; and the copy that sbatch runs."""
    inside = script(
        path,
        variables | {"DRY_RUN": "1", "SLURM_SUBMIT_DIR": str(tmp_path)},
        cwd=tmp_path,
    )
    assert inside.returncode == 0, inside.stderr
    copy = tmp_path / "slurm_script"
    copy.write_text((ROOT / path).read_text())
    copied = script(
        str(copy), variables | {"DRY_RUN": "1", "SLURM_SUBMIT_DIR": str(ROOT)}, cwd=tmp_path
    )
    assert copied.stdout == inside.stdout != ""


def test_environment_variables_change_an_evaluation(variables: dict[str, str], port: str) -> None:
    words = {
        "MAX_NEW_TOKENS": "100",
        "GENERATED_NUM": "2",
        "TEMPERATURE": "0.1",
        "TOP_P": "0.5",
        "EVAL_BATCH": "7",
        "API_PORT": port,
    }
    given = json.loads(script("eval/aime24_eval.sh", variables | words).stdout)
    assert json.loads(given[given.index("--generation-config") + 1]) == {
        "max_tokens": 100,
        "temperature": 0.1,
        "top_p": 0.5,
    }
    assert (given[given.index("--repeats") + 1], given[given.index("--eval-batch-size") + 1]) == (
        "2",
        "7",
    )
    assert "local_path" not in given[given.index("--dataset-args") + 1]


def test_a_missing_program_or_server_is_reported_in_one_sentence(variables: dict[str, str]) -> None:
    absent = script("eval/gpqa_eval.sh", variables | {"API_PORT": "1", "MODEL_PATH": "/models/m"})
    assert absent.returncode == 2
    assert "no server answers at http://127.0.0.1:1/v1: serve /models/m" in absent.stderr
    without = script("eval/gpqa_eval.sh", variables | {"PATH": "/usr/bin:/bin"})
    assert without.returncode == 2
    assert "evalscope is not installed" in without.stderr


def test_a_key_is_in_no_argument_and_in_no_output(
    variables: dict[str, str], tmp_path: Path
) -> None:
    """Of evalscope, of curl and of the printed command, which still passes the key on."""
    for tool in ("evalscope", "curl"):
        (tmp_path / "bin" / tool).write_text(
            f'#!/bin/sh\necho "$0 $*" >> {tmp_path}/seen\n'
            f"[ {tool} = curl ] && cat >> {tmp_path}/header\n"
            f'echo "$EVALSCOPE_API_KEY" >> {tmp_path}/{tool}-key\n'
        )
        (tmp_path / "bin" / tool).chmod(0o755)
    keyed = variables | {"API_KEY": "secret"}
    run = script("eval/aime24_eval.sh", keyed)
    dry = script("eval/aime24_eval.sh", keyed | {"DRY_RUN": "1"})
    assert (run.returncode, dry.returncode) == (0, 0)
    pasted = subprocess.run(["bash", "-c", dry.stdout], env=keyed, capture_output=True, text=True)
    assert pasted.returncode == 0
    assert (tmp_path / "seen").read_text().count("evalscope") == 2
    for text in (run.stdout, run.stderr, dry.stdout, (tmp_path / "seen").read_text()):
        assert "secret" not in text
    assert (tmp_path / "header").read_text() == "Authorization: Bearer secret\n"
    assert (tmp_path / "evalscope-key").read_text() == "secret\nsecret\n"
