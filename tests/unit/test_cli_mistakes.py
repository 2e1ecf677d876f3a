"""What a mistake on the command line gets: an exit code and one sentence that says what to do."""

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed
from mistakes import each, sentence_of
from stages import WORLD, options, run

import infir2.demo.world
from infir2.cli import main
from infir2.demo.world import make_demo_world
from infir2.errors import ConfigError
from infir2.launch.torchrun import Layout, check_machine

ROOT = Path(__file__).resolve().parents[2]
# In {braces}: the recipes' directory.
MISTAKES = [
    # verbs and help
    ("help nonsense", 2, "nonsense is not a verb; `infir2 --help` lists the verbs."),
    ("tokenise x.jsonl", 2, "tokenise is not a verb; did you mean tokenize?"),
    # recipes and keys
    ("cpt {demo}/ctp.toml", 2, "there is no such recipe file; did you mean {demo}/cpt.toml?"),
    ("cpt {demo}", 2, "{demo}: this is a directory; name a recipe, a .toml file"),
    ("cpt {demo}/cpt.toml --lr=1e-3", 2, "Did you mean --schedule.learning_rate=1e-3?"),
    ("cpt {demo}/cpt.toml --learning-rate=1", 2, "Did you mean --schedule.learning_rate=1?"),
    ("cpt {demo}/cpt.toml run.seed=5", 2, "Did you mean --run.seed=5?"),
    ("cpt {demo}/cpt.toml -run.seed=5", 2, "Did you mean --run.seed=5?"),
    ("cpt {demo}/cpt.toml --resume", 2, "--help`. The same command, run again, resumes."),
    ("cpt {demo}/cpt.toml --dry-run", 2, "infir2 check RECIPE.toml checks everything"),
    ("cpt {demo}/cpt.toml --json", 2, "--json is not an option of infir2 cpt"),
    (
        "cpt {demo}/cpt.toml --schedule.learning_rate=32k",
        2,
        "schedule.learning_rate must be a number without a unit, not '32k'.",
    ),
    (
        "cpt {demo}/cpt.toml --data.sequence_tokens=8K",
        2,
        "data.sequence_tokens must be an integer without a unit, not '8K'.",
    ),
    ("cpt {demo}/cpt.toml --parallel.timeout_seconds=10min", 2, "must be a number without a unit"),
    ("cpt {demo}/cpt.toml --run.dir={demo}/cpt.toml", 2, "name a directory that can be."),
    (
        "cpt {demo}/cpt.toml --data.tokenizer=gpt2",
        2,
        "gpt2 has no tokenizer.json: there is",
    ),
    # models
    (
        "sft {demo}/sft1.toml --model.path=Qwen/Qwen2.5-1.5B",
        2,
        "Qwen/Qwen2.5-1.5B is not a local directory, and infir2 downloads nothing. Download the "
        "model first: hf download Qwen/Qwen2.5-1.5B --local-dir models/Qwen2.5-1.5B; then name",
    ),
    (
        "sft {demo}/sft1.toml --model.path=https://huggingface.co/Qwen/Qwen3-8B",
        2,
        "hf download Qwen/Qwen3-8B --local-dir models/Qwen3-8B",
    ),
    ("sft {demo}/sft1.toml", 2, "model.path: runs/demo/cpt does not exist; run the stage"),
    ("sft {demo}/sft1.toml --model.path=file.gguf", 2, "import hf file.gguf --to DIR."),
    ("rl {demo}/rl1.toml", 2, "model.path: runs/demo/sft2 does not exist; run the stage"),
    ("rl {demo}/rl1.toml --model.path=run --rollout.model=", 2, "rollout.model is empty: name"),
    ("rl {demo}/rl1.toml --model.path=run", 2, "rollout.model: runs/demo/sft2-fp8 does not exist"),
    (
        "rl {demo}/rl1.toml --model.path=run --rollout.model=run",
        2,
        "rollout.model: run is a run directory, and the engine loads an export: infir2 export fp8",
    ),
    ("eval {demo}/eval.toml --run.dir=e --model.path=Qwen/Q", 2, "hf download Qwen/Q --local-dir"),
    ("eval {demo}/eval.toml --run.dir=e --model.path=empty", 2, "is not a run directory and has"),
    ("eval run --run.dir=e", 2, "run: this is a directory; name a recipe, a .toml file (a model"),
    ("eval http://127.0.0.1:1/v1", 2, "is no recipe; infir2 eval http://127.0.0.1:1/v1 --bench"),
    ("eval {demo}/eval.toml --accept-changes", 2, "--accept-changes is not an option of infir2 ev"),
    # conversions
    ("export HF run --to o", 2, "did you mean hf?"),
    ("export hf nope --to o", 3, "SRC: nope does not exist; run the stage that writes it"),
    ("export fp8 Qwen/Qwen3-8B --to o", 3, "hf download Qwen/Qwen3-8B --local-dir models/Qwen3-8B"),
    ("export hf run --to empty/../hf", 2, "exists already, and another command or another input"),
    ("import hf Qwen/Qwen3-8B --to o", 3, "hf download Qwen/Qwen3-8B"),
    ("tokenize x.jsonl --tokenizer nope --out o", 2, "nope has no tokenizer.json: there is"),
    # reports and the demo
    ("report run --to file.gguf/x.html", 2, "the page cannot be written (File exists, errno 17"),
    ("report run --too x", 2, "did you mean --to?"),
    ("demo file.gguf", 2, "infir2 demo DIR names a directory to write to"),
    # launch
    ("launch", 2, "the following arguments are required: torchrun|ray|slurm; see"),
    ("launch torchrun -- train x.toml", 2, "one of cpt, sft, rl, eval, not train, and its arg"),
    ("launch torchrun --nproc-per-node 8 -- sft x.toml", 2, "write --gpus-per-node M."),
    ("launch torchrun --gpu-per-node=8 -- sft x.toml", 2, "did you mean --gpus-per-node?"),
    ("launch slurm --partition=h100 -- sft x.toml", 2, "write --sbatch=--partition=NAME."),
    ("launch torchrun -- sft {demo}/sft1.toml --run.seed 5", 2, "write it as --run.seed=5."),
    (
        "launch torchrun -- sft x.toml --gpus-per-node 8 --run.seed=5",
        2,
        "write infir2 launch torchrun --gpus-per-node 8 -- sft x.toml --run.seed=5",
    ),
    ("launch torchrun -- --dry-run sft x.toml", 2, "launch torchrun --dry-run -- sft x.toml"),
    (
        "launch torchrun --gpus-per-node 9999 -- sft {demo}/sft1.toml",
        2,
        "--gpus-per-node 9999, and this machine has ",
    ),
    (
        "launch torchrun --nodes 2 --endpoint node1 -- sft {demo}/sft1.toml",
        2,
        "--endpoint node1: write HOST:PORT, such as node1:29400",
    ),
]


@pytest.fixture(scope="module")
def place(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a run, its export, an empty directory and a file that is no model."""
    directory = tmp_path_factory.mktemp("place")
    run(options(world, directory / "run", "cpt", schedule__total_steps=4))
    run(["export", "hf", str(directory / "run"), "--to", str(directory / "hf")])
    (directory / "hf" / "infir2.json").write_text("{}")  # of another command
    (directory / "empty").mkdir()
    (directory / "file.gguf").write_text("x")
    return directory


@each(MISTAKES)
def test_a_mistake_gets_one_sentence_and_leaves_nothing_behind(
    place: Path,
    world: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: str,
    code: int,
    sentence: str,
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    demo = str(ROOT / "recipes" / "demo")
    arguments = words.replace("{demo}", demo).split()
    if arguments[0] in ("sft", "rl"):
        arguments.append(f"--data.tokenizer={world / 'tokenizer'}")
        arguments.append(f"--data.sources.0.path={world / 'rl1.jsonl'}")
    said = sentence_of(capsys, place, arguments, code)
    assert sentence.replace("{demo}", demo) in said


def test_too_many_processes_run_only_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(ConfigError, match="this machine has 2 GPUs that can be used"):
        check_machine(Layout(ranks_per_node=8))
    check_machine(Layout(ranks_per_node=2))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    check_machine(Layout(ranks_per_node=9999, cpu=True))


@pytest.fixture
def web_server() -> Iterator[int]:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_a_port_of_another_program_is_named_and_that_of_this_job_is_used(web_server: int) -> None:
    with pytest.raises(ConfigError, match=f"127.0.0.1:{web_server}: another program uses this"):
        check_machine(Layout(nodes=2, endpoint=f"127.0.0.1:{web_server}"))
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    check_machine(Layout(nodes=2, endpoint=f"127.0.0.1:{store.port}"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    check_machine(Layout(nodes=2, endpoint=f"127.0.0.1:{port}"))


def test_a_report_goes_into_a_directory(place: Path, tmp_path: Path) -> None:
    assert main(["report", str(place / "run"), "--to", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").exists()


def test_a_repeated_export_says_that_it_is_done(
    place: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", "hf", str(place / "run"), "--to", str(tmp_path / "o")]
    assert main(command) == 0
    written = capsys.readouterr().out
    assert f"{tmp_path / 'o'}: " in written
    assert "tensors in 1 safetensors file." in written
    before = {path: path.read_bytes() for path in (tmp_path / "o").iterdir()}
    assert main(command) == 0
    assert "is there already, written by this command: " in capsys.readouterr().out
    assert {path: path.read_bytes() for path in (tmp_path / "o").iterdir()} == before
    run(options(world, tmp_path / "other", "cpt", schedule__total_steps=4, run__seed=3))
    capsys.readouterr()
    assert main(["export", "hf", str(tmp_path / "other"), *command[3:]]) == 2
    assert "another command or another input made it" in capsys.readouterr().err


def test_a_repeated_import_says_that_it_is_done(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["import", "hf", str(place / "hf"), "--to", str(tmp_path / "o")]
    assert main(command) == 0
    assert f"{tmp_path / 'o'}: converted from {place / 'hf'}, " in capsys.readouterr().out
    assert main(command) == 0
    assert "o is there already, written by this command: " in capsys.readouterr().out
    assert main(["import", "fp8", *command[2:]]) == 2
    assert "another command or another input made it" in capsys.readouterr().err


def test_a_report_prints_its_stages_as_json(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation = {"kind": "evaluation", "step": 1, "avg_at_k": 0.5, "low": 0.4, "high": None}
    (tmp_path / "eval-x").mkdir()
    (tmp_path / "eval-x" / "metrics.jsonl").write_text(json.dumps(evaluation) + "\n")
    page = tmp_path / "page.html"
    runs = [str(place / "run"), str(tmp_path / "eval-x")]
    assert main(["report", *runs, "--to", str(page), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["report"] == str(page)
    (stage,) = result["stages"]
    assert [stage[name] for name in ("stage", "avg_at_k", "low", "high")] == ["x", 0.5, 0.4, None]


def test_a_finished_run_says_that_it_is_finished(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = options(world, tmp_path / "run", "cpt", schedule__total_steps=4)
    run(command)
    first = capsys.readouterr().err
    assert "cpt: qwen2, 0.0547 M parameters, on cpu (1 thread), FP8 emulated, 1 process" in first
    assert f"cpt: finished: step 4 is saved in {tmp_path / 'run'}" in first
    run(command)
    assert f"cpt: {tmp_path / 'run'} is finished: step 4 of 4 is saved." in capsys.readouterr().err


def test_quiet_leaves_results_and_errors(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run([*options(world, tmp_path / "run", "cpt", schedule__total_steps=4), "--quiet"])
    assert capsys.readouterr() == ("", "")
    assert main(["--quiet", "cpt", "gone.toml"]) == 2
    assert "gone.toml: there is no such recipe file" in capsys.readouterr().err


def test_a_silent_command_says_what_it_does(tmp_path: Path) -> None:
    code = (
        "import sys, time; import infir2.terminal as terminal; import infir2.cli.report as report\n"
        "from infir2.cli import main\n"
        "terminal._PULSE_SECONDS = 0.2\n"
        "report.report = lambda _: time.sleep(1)\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "report"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    lines = result.stderr.splitlines()
    assert len(lines) >= 3
    assert set(lines) <= {f"infir2: report is starting, {n} s so far" for n in (0, 1)}


def test_data_says_what_it_wrote_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(directory: Path, seed: int) -> None:
        make_demo_world(directory, seed, WORLD)

    monkeypatch.setattr(infir2.demo.world, "make_demo_world", write)
    command = ["data", "demo", "--to", str(tmp_path / "w")]
    assert main(command) == 0
    assert "rows: cpt.jsonl " in capsys.readouterr().out
    assert main(command) == 0
    assert "w is there already, written by this command: " in capsys.readouterr().out
    assert main([*command, "--seed", "9"]) == 2
