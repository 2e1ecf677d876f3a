"""The `infir2` command: arguments of each verb, exit codes, messages on stderr."""

import contextlib
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from test_config_load import RECIPE

from infir2 import errors
from infir2.cli import VERBS, main
from infir2.config.keys import leaf_keys
from infir2.config.schema import RlRecipe
from infir2.processes import ProcessSignals

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    for name in (
        "HF_CHECKPOINT",
        "DATA_DIR",
        "DATA_PATH",
        "SAVE_DIR",
        "LOAD_DIR",
        "REF_LOAD",
        "RANK",
    ):
        monkeypatch.delenv(name, raising=False)
    Path("x.toml").write_text(RECIPE)
    return "x.toml"


@pytest.fixture
def replace(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple]]:
    """Replace functions of a module by fakes.

    Returns the list of calls: (function, *arguments).
    """

    def put(module: str, *functions: str, raises: BaseException | None = None) -> list[tuple]:
        calls: list[tuple] = []

        def make(function: str) -> Callable[..., str]:
            def record(*arguments: object) -> str:
                calls.append((function, *arguments))
                if raises is not None:
                    raise raises
                return "written"

            return record

        real = importlib.import_module(module)
        for function in functions:
            if hasattr(real, function):
                monkeypatch.setattr(real, function, make(function))
        return calls

    return put


def test_training_gets_the_recipe_and_the_kind(
    recipe: str, replace: Callable[..., list[tuple]]
) -> None:
    calls = replace("infir2.train.loop", "run_training")
    assert main(["sft", recipe, "--run.seed=5", "--accept-changes"]) == 0
    assert main(["cpt", recipe, "--data.batch_samples=0", "--data.batch_sequences=3"]) == 0
    (_, loaded, kind), (_, second, second_kind) = calls
    assert (kind, loaded.recipe.run.seed, loaded.accept_changes) == ("sft", 5, True)
    assert (second_kind, second.recipe.data.batch_sequences, second.accept_changes) == (
        "cpt",
        3,
        False,
    )


def test_environment_variables_in_use_are_logged_once(
    recipe: str,
    replace: Callable[..., list[tuple]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    replace("infir2.train.loop", "run_training")
    monkeypatch.setenv("HF_CHECKPOINT", "models/hf")
    assert main(["sft", recipe]) == 0
    assert (
        capsys.readouterr().err
        == "infir2: environment variable HF_CHECKPOINT sets model.path to 'models/hf'.\n"
    )
    monkeypatch.setenv("RANK", "1")
    assert main(["sft", recipe]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (errors.ConfigError("a key."), 2, "infir2: error: a key."),
        (errors.OutputExistsError("there."), 2, "infir2: error: there."),
        (errors.CheckFailedError("differs."), 1, "infir2: error: differs."),
        (errors.CheckpointCorruptError("file."), 3, "infir2: error: file."),
        (errors.DataError("row."), 4, "infir2: error: row."),
        (errors.NonFiniteError("nan."), 17, "infir2: error: nan."),
        (errors.Preempted("saved at step 3."), 75, "infir2: saved at step 3."),
        (errors.Interrupted("saved at step 3."), 130, "infir2: saved at step 3."),
        (
            KeyboardInterrupt(),
            130,
            "infir2: Stopped before the first step; nothing was saved. "
            "Run the same command to start again.",
        ),
    ],
)
def test_each_error_has_its_exit_code_and_one_line(
    recipe: str,
    replace: Callable[..., list[tuple]],
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    text: str,
) -> None:
    replace("infir2.train.loop", "run_training", raises=error)
    assert main(["sft", recipe]) == code
    assert capsys.readouterr().err == f"{text}\n"


@pytest.mark.parametrize(
    ("stopped", "variables", "reported"),
    [
        (True, {}, ""),
        (False, {}, "infir2: error: a key.\n"),
        (False, {"INFIR2_RANKS_DIR": "somewhere"}, ""),
        (False, {"GROUP_RANK": "1"}, ""),
    ],
    ids=[
        "rank 0 has reported it",
        "rank 0 reports nothing",
        "infir2 launch does not kill rank 0",
        "rank 0 is on another node",
    ],
)
def test_a_rank_lets_rank_0_report_a_common_error(
    recipe: str,
    replace: Callable[..., list[tuple]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stopped: bool,
    variables: dict[str, str],
    reported: str,
) -> None:
    """A rank whose exit would make torchrun kill rank 0 waits for torchrun's SIGTERM.

    The signal means that rank 0 has exited.
    """
    waited = []

    def wait(signals: ProcessSignals, seconds: float) -> bool:
        waited.append(seconds)
        if stopped:
            os.kill(os.getpid(), signal.SIGTERM)
        return real_wait(signals, 0.5)

    real_wait = ProcessSignals.wait_for_termination
    monkeypatch.setattr(ProcessSignals, "wait_for_termination", wait)
    replace("infir2.train.loop", "run_training", raises=errors.ConfigError("a key."))
    torchrun = {
        "RANK": "1",
        "GROUP_RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    for name, value in (torchrun | variables).items():
        monkeypatch.setenv(name, value)
    assert main(["sft", recipe]) == 2
    assert waited == ([] if variables else [20.0])
    assert capsys.readouterr().err == reported


def test_an_internal_error_has_its_traceback(
    recipe: str, replace: Callable[..., list[tuple]], capsys: pytest.CaptureFixture[str]
) -> None:
    replace("infir2.train.loop", "run_training", raises=ZeroDivisionError("a defect"))
    assert main(["sft", recipe]) == 70
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-2] == "ZeroDivisionError: a defect"
    assert lines[-1].startswith("infir2: internal error in `infir2 sft x.toml`; please report it")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["sfft"], "sfft is not a verb; did you mean sft?"),
        (
            ["train"],
            "train is not a verb; training is infir2 cpt, sft or rl, followed by a recipe.",
        ),
        (
            ["trian"],
            "trian is not a verb; training is infir2 cpt, sft or rl, followed by a recipe.",
        ),
        (["evaluate"], "evaluate is not a verb; did you mean eval?"),
        (
            ["a.toml", "sft"],
            "a.toml is not a verb; the verb comes first: infir2 sft a.toml",
        ),
        (["--colour"], "--colour is not a verb; `infir2 --help` lists the verbs."),
        (
            ["sft"],
            "infir2 sft needs a recipe, such as one in recipes/demo; see `infir2 sft --help`.",
        ),
        (
            ["sft", "x.toml", "--verbose"],
            "--verbose is not an option of infir2 sft; options are --section.key=value, "
            "see `infir2 sft --help`.",
        ),
        (["sft", "x.toml", "--run.seed", "5"], "option --run.seed: write it as --run.seed=5."),
        (["sft", "gone.toml"], "gone.toml: there is no such recipe file; recipes are in recipes/."),
        (
            ["export", "hf", "runs/x"],
            "the following arguments are required: --to; see `infir2 export hf --help`.",
        ),
        (
            ["export", "fp8", "m", "--to", "o", "--scale-format", "e8m0"],
            "argument --scale-format: invalid choice: 'e8m0'",
        ),
        (
            ["verify-weights", "a", "b", "c"],
            "unrecognized arguments: c; see `infir2 verify-weights --help`.",
        ),
    ],
)
def test_wrong_arguments_are_one_sentence_and_exit_2(
    recipe: str, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"infir2: error: {sentence}")
    assert output.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "call"),
    [
        ("export hf runs/a --to o", ("export_hf", Path("runs/a"), Path("o"))),
        ("export fp8 m --to o", ("export_fp8", Path("m"), Path("o"), "pow2")),
        ("export fp8 m --to o --scale-format fp32", ("export_fp8", Path("m"), Path("o"), "fp32")),
        ("export megatron m --to o", ("export_megatron", Path("m"), Path("o"))),
        ("import fp8 m --to o", ("import_fp8", Path("m"), Path("o"))),
        ("import hf m.gguf --to o", ("import_hf", Path("m.gguf"), Path("o"))),
        ("import megatron m --to o", ("import_megatron", Path("m"), Path("o"), None)),
        ("import megatron m --to o --like h", ("import_megatron", Path("m"), Path("o"), Path("h"))),
        ("verify-weights runs/a m", ("verify_weights", Path("runs/a"), Path("m"))),
        ("data demo --to d --seed 4", ("make_demo_world", Path("d"), 4)),
        ("demo d --seed 4", ("run_demo", Path("d"), 4, False)),
    ],
)
def test_arguments_reach_their_function(
    words: str,
    call: tuple,
    replace: Callable[..., list[tuple]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("infir2.convert.megatron_import.find_iteration", lambda path: path)
    monkeypatch.setattr("infir2.cli.convert._check_verified", lambda *_: None)
    functions = (
        "export_hf",
        "export_fp8",
        "export_megatron",
        "import_fp8",
        "import_hf",
        "import_megatron",
        "verify_weights",
        "make_demo_world",
        "run_demo",
    )
    parts = (
        "convert",
        "demo.world",
        "demo.stages",
    )
    calls = [replace(f"infir2.{part}", *functions) for part in parts]
    assert main(words.split()) == 0
    assert [made for module_calls in calls for made in module_calls] == [call]


@pytest.mark.parametrize(
    ("words", "runs", "page", "axis"),
    [
        ("report .", [Path()], Path("report.html"), "step"),
        ("report . ..", [Path(), Path("..")], Path("report.html"), "step"),
        ("report . --to p.html --axis time", [Path()], Path("p.html"), "time"),
        ("report . --json", [Path()], Path("report.html"), "step"),
    ],
)
def test_report_reads_the_runs_once(
    words: str,
    runs: list[Path],
    page: Path,
    axis: str,
    replace: Callable[..., list[tuple]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = replace("infir2.report.read", "read_run")
    calls = replace("infir2.report", "read_runs", "write_page")
    monkeypatch.setattr("infir2.report.stage_rows", lambda _: [])
    assert main(words.split()) == 0
    assert calls == [("read_runs", runs), ("write_page", "written", page, axis)]
    assert read == []


@pytest.mark.parametrize("words", ["--quiet report gone --json", "report --quiet gone --json"])
def test_quiet_before_the_verb_keeps_errors_as_json(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 4
    assert "gone does not exist" in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main([verb, "--help"])
    except SystemExit as stop:
        code = stop.code
    assert code == 0
    assert capsys.readouterr().out.startswith(f"usage: infir2 {verb}")


def test_help_describes_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rl", "--help"]) == 0
    text = capsys.readouterr().out
    missing = [key.name for key in leaf_keys(RlRecipe) if f"--{key.name}=" not in text]
    assert not missing
    joined = " ".join(text.split())
    assert "--schedule.learning_rate=NUMBER peak learning rate (required)" in joined
    assert "--rl.group_size=INTEGER responses per prompt (default 16)" in joined
    assert "--fp8.enabled=true|false" in joined
    assert "ROLLOUT_MAX_RESPONSE_LEN sets rl.max_response_tokens" in joined


def test_every_key_has_a_description() -> None:
    assert not [key.name for key in leaf_keys(RlRecipe) if not key.field.description]


def test_help_is_quick_and_survives_a_closed_pipe() -> None:
    environ = dict(os.environ, PYTHONUNBUFFERED="1")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(
        f"{sys.executable} -m infir2 rl --help | head -1",
        shell=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environ,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.stdout.startswith("usage: infir2 rl")
    assert result.stderr == ""
    # CPU seconds do not depend on the load of the machine: 0.2 s; importing torch takes over 2 s.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.2


def test_version_names_the_libraries(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert {"infir2", "Python", "torch", "transformers"} <= set(capsys.readouterr().out.split())


def test_help_of_a_verb_and_short_version(capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):
        main(["help", "cpt"])
    assert capsys.readouterr().out.startswith("usage: infir2 cpt")
    assert main(["-v"]) == 0
    assert capsys.readouterr().out.startswith("infir2 ")


@pytest.mark.parametrize(
    ("to", "code", "sentence"),
    [
        ("fifo", 2, "exists already"),
        ("n" * 300, 3, "File name too long"),
        ("file/x", 3, "Not a directory"),
        (b"\xff".decode(errors="surrogateescape"), 0, ""),
    ],
    ids=["fifo", "long", "below a file", "not UTF-8"],
)
def test_an_output_that_cannot_be_is_one_sentence(
    tmp_path: Path, to: str, code: int, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_text("kept")
    assert main(["data", "demo", "--to", str(tmp_path / to)]) == code
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
    assert error.count("\n") == bool(code)
    assert (tmp_path / "fifo").is_fifo()


def test_absurd_numbers_of_threads_are_refused(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """OpenMP ends the process by a signal when it cannot start them."""
    assert main(["cpt", recipe, "--run.threads=100000000"]) == 2
    assert "run.threads must be less than or equal to 4096" in capsys.readouterr().err
