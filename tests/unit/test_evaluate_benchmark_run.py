"""`infir2 eval URL --benchmarks`: results, what is missing, restarts, refusals; real evalscope."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fake_evalscope
import pytest
from scripted_server import Script, serving
from stages import make_model

from infir2.cli import main
from infir2.engines.process_guard import descendants
from infir2.evaluate import benchmark_options, engine_start, evalscope
from infir2.evaluate.upstream import Patience

FIXTURES = Path(__file__).parents[2] / "../shared/fixtures/eval"
QUESTIONS = [("How much is $2+3$?", "5"), ("How much is $7-7$?", "0"), ("How much is $2^5$?", "32")]
QUICK = Patience(bad_answers=2, outage_seconds=0.3, first_wait_seconds=0.01)


def answer(body: dict[str, Any]) -> dict[str, Any]:
    """Right for half of the seeds, and for no seed of the last question."""
    question = next(m["content"] for m in body["messages"] if m["role"] == "user")
    right = dict(QUESTIONS).get(question, "?")
    if body["seed"] % 2 or right == "32":
        right = "1"
    return {"content": f"so\n</think>\n\\boxed{{{right}}}"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data/aime24.jsonl"
    path.parent.mkdir()
    rows = [{"problem": question, "answer": int(value)} for question, value in QUESTIONS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """evalscope's place is taken, and nothing is waited for."""
    monkeypatch.setattr(evalscope, "Processes", fake_evalscope.Processes)
    monkeypatch.setattr(evalscope, "require", lambda *_: None)
    real = benchmark_options.BenchmarkOptions

    def options(**values: Any) -> benchmark_options.BenchmarkOptions:
        return real(**values, patience=QUICK)

    monkeypatch.setattr(benchmark_options, "BenchmarkOptions", options)


def command(url: str, data: Path, run: Path, *more: str) -> list[str]:
    words = ["eval", url, "--benchmarks", "aime24", "--data", str(data), "--run.dir", str(run)]
    return [*words, "--samples", "8", *more]


@pytest.mark.usefixtures("quick")
def test_a_run_writes_scores_and_every_question(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script, run = Script(answer=answer), tmp_path / "run"
    with serving(script) as server:
        assert main(command(server.url, data, run, "--json")) == 0
        (scores,) = json.loads(capsys.readouterr().out)
        assert main(command(server.url, data, run)) == 0
    assert len(script.requests) == 24, "nothing was asked twice"
    assert script.requests[0]["max_tokens"] == 31_000
    roles = [message["role"] for message in script.requests[0]["messages"]]
    assert roles == ["system", "user", "assistant"]
    result = json.loads((run / "result.json").read_text())
    questions = result["questions"]["aime24"]
    assert [question["prompt"] for question in questions] == [text for text, _ in QUESTIONS]
    recount = [sample["score"] for question in questions for sample in question["samples"]]
    assert len(recount) == 24
    assert scores["mean"] == pytest.approx(sum(recount) / 24)
    assert scores["evalscope_score"] == pytest.approx(scores["mean"], abs=5e-5)
    assert 0 < scores["low"] < scores["mean"] < scores["high"] < 1
    assert scores["all_wrong"] == scores["all_right"] == pytest.approx(scores["mean"])
    assert scores["pass_at_k"]["1"] == pytest.approx(scores["mean"])
    assert scores["pass_at_k"]["8"] == pytest.approx(2 / 3)
    assert (scores["missing"], scores["truncated_fraction"], result["complete"]) == (0, 0.0, True)
    page = (run / "result.html").read_text()
    assert page.index("question 3") < page.index("question 1")
    assert "<script" not in page
    assert all(
        json.loads((run / name).read_text()) for name in ("settings.json", "environment.json")
    )


@pytest.mark.usefixtures("quick")
def test_missing_answers_are_neither_wrong_nor_dropped_and_come_with_the_next_run(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script, run = Script(answer=answer, faults=dict.fromkeys(range(4, 100), "html")), tmp_path / "r"
    with serving(script) as server:
        assert main(command(server.url, data, run, "--parallel", "1")) == 1
        error = capsys.readouterr().err
        assert "21 of 24 answers are missing: " in error
        assert "21 answers are missing; the same command asks for them again" in error
        first = json.loads((run / "result.json").read_text())
        scores = first["benchmarks"]["aime24"]
        assert (scores["known"], first["complete"], scores["majority_at_k"]) == (3, False, None)
        assert scores["all_wrong"] <= 3 / 24 < 21 / 24 <= scores["all_right"]
        assert first["retried"]["cut"] >= 21
        before = len(script.requests)
        script.faults.clear()
        assert main(command(server.url, data, run, "--parallel", "1")) == 0
        assert len(script.requests) == before + 21
    assert json.loads((run / "result.json").read_text())["complete"] is True


@pytest.mark.usefixtures("quick")
def test_prompts_beyond_the_context_are_counted_and_a_run_with_them_ends(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(Script(answer=answer, always="context")) as server:
        assert main(command(server.url, data, tmp_path / "run", "--json")) == 0
    output = capsys.readouterr()
    (scores,) = json.loads(output.out)
    assert (scores["mean"], scores["beyond_context"], scores["missing"]) == (None, 24, 24)
    assert "no answer is known of 3 questions" in output.err


@pytest.mark.usefixtures("quick")
def test_two_runs_compare_and_other_settings_do_not_mix(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(Script(answer=answer)) as server:
        assert main(command(server.url, data, tmp_path / "a")) == 0
        assert main(command(server.url, data, tmp_path / "b", "--seed", "5")) == 0
        assert main(command(server.url, data, tmp_path / "c", "--temperature", "1.0")) == 0
        capsys.readouterr()
        for option, said in (
            (["--samples", "4"], "has a run with aime24.samples = 8, and now it is 4;"),
            (["--seed", "1"], "has a run with seed = 0, and now it is 1;"),
        ):
            assert main(command(server.url, data, tmp_path / "a", *option)) == 2
            assert said in capsys.readouterr().err
    assert main(["eval", "compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "aime24: no difference is shown" in capsys.readouterr().out
    assert main(["eval", "compare", str(tmp_path / "a"), str(tmp_path / "c")]) == 2
    assert "do not compare: temperature (0.65 and 1.0)" in capsys.readouterr().err


@pytest.mark.usefixtures("quick")
def test_what_cannot_run_is_refused_before_anything_is_asked(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Script(models=("one", "two"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").touch()
    with serving(script) as server:
        base = command(server.url, data, tmp_path / "run")
        for words, code, said in (
            ([*base, "--benchmarks", "gpqa"], 2, "did you mean gpqa_diamond?"),
            (base, 2, "(it has one, two): name one by --model"),
            ([*base, "--model", "three"], 2, "has no model 'three' (it has one, two)"),
            ([*base, "--model", "one", "--data", str(tmp_path / "no")], 4, "no does not exist"),
            (
                [*base, "--model", "one", "--run.dir", str(tmp_path / "other")],
                2, "exists and has no run of benchmarks (thesis.tex)",
            ),
            (command("http://127.0.0.1:1/v1", data, tmp_path / "run"), 2, "no engine answers at"),
            (command("models/base", data, tmp_path / "run"), 2, "models/base does not exist"),
            (["eval", server.url, "--benchmarks", "aime24"], 2, "needs --data"),
            ([*base, "--top-p", "1.5"], 2, "--top-p"),
            ([*base, "--temperature", "nan"], 2, "--temperature"),
            ([*base, "--parallel", "0"], 2, "--parallel"),
            ([*base, "--samples", "-1"], 2, "--samples"),
        ):  # fmt: skip
            assert main(words) == code, words
            error = capsys.readouterr().err
            assert said in error
    assert script.requests == []
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("quick")
def test_a_command_that_was_refused_for_its_questions_runs_with_others(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with serving(Script(answer=answer)) as server:
        words = command(server.url, data.parent, run)
        assert main([*words, "--benchmarks", "aime24,gpqa_diamond"]) == 4
        assert "has no data of gpqa_diamond" in capsys.readouterr().err
        assert main(words) == 0
        (tmp_path / "own/data/aime24").mkdir(parents=True)
        assert main(command(server.url, data, tmp_path / "own")) == 2
    assert "has no run of benchmarks (data)" in capsys.readouterr().err
    assert (tmp_path / "own/data/aime24").is_dir()


@pytest.fixture(scope="module")
def model_dir(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(world, tmp_path_factory.mktemp("model") / "hf")


@pytest.mark.usefixtures("quick")
def test_an_engine_is_started_for_a_model_and_ends_with_the_run(
    tmp_path: Path, data: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = command(str(model_dir), data, run, "--max-tokens", "3")
    assert main([*words, "--json", "--samples", "2"]) == 0
    (scores,) = json.loads(capsys.readouterr().out)
    assert (scores["known"], scores["missing"], scores["truncated_fraction"]) == (6, 0, 1.0)
    recorded = json.loads((run / "engines/engine-1.json").read_text())
    assert recorded["command"][3] == "serve"
    rows = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    texts = {json.dumps(row["response"]["choices"][0]["message"]) for row in rows}
    assert len(texts) > 1, "each sample has its own seed"
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", urlsplit(rows[0]["engine"]).port or 0), 5)
    key = (run / "engines/engine-1.key/key").read_text()
    assert key not in json.dumps(recorded)


@pytest.mark.costly
@pytest.mark.usefixtures("quick")
def test_an_engine_that_hangs_is_started_again(
    tmp_path: Path, data: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_start, "HANG_SECONDS", 4.0)
    monkeypatch.setattr(sys.modules[__name__], "QUICK", Patience(first_wait_seconds=0.1))
    run = tmp_path / "run"

    def stop() -> None:
        while not (run / "answers.jsonl").exists() or not (run / "answers.jsonl").read_text():
            time.sleep(0.05)
        for pid in descendants(os.getpid()):
            if b"\0infir2\0serve\0" in Path(f"/proc/{pid}/cmdline").read_bytes()[:200]:
                os.kill(pid, signal.SIGSTOP)

    with ThreadPoolExecutor(1) as threads:
        stopping = threads.submit(stop)
        words = command(str(model_dir), data, run, "--max-tokens", "3", "--parallel", "1")
        assert main([*words, "--samples", "4"]) == 0
        stopping.result()
    result = json.loads((run / "result.json").read_text())
    assert (result["complete"], result["retried"]["restart"]) == (True, 1)
    engines = {json.loads(line)["engine"] for line in (run / "answers.jsonl").open()}
    assert len(engines) == 2


HANGING = """
import os, sys, time

if "infir2.engines.server.engine_worker" in sys.orig_argv:
    from infir2.engines.native import NativeEngine

    steps, step = [], NativeEngine.step

    def hanging(self):
        steps.append(self)
        if len(steps) > 5 and not os.path.exists({mark!r}):
            open({mark!r}, "w").close()
            time.sleep(3600)
        return step(self)

    NativeEngine.step = hanging
"""


@pytest.mark.costly
@pytest.mark.usefixtures("quick")
def test_an_engine_that_hangs_while_its_server_is_healthy_is_started_again(
    tmp_path: Path, data: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, run = tmp_path / "site", tmp_path / "run"
    site.mkdir()
    (site / "sitecustomize.py").write_text(HANGING.format(mark=str(tmp_path / "mark")))
    paths = [str(site), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setattr(engine_start, "HANG_SECONDS", 4.0)
    monkeypatch.setattr(sys.modules[__name__], "QUICK", Patience(first_wait_seconds=0.1))
    words = command(str(model_dir), data, run, "--max-tokens", "3", "--parallel", "1")
    assert main([*words, "--samples", "4"]) == 0
    assert (tmp_path / "mark").exists()
    result = json.loads((run / "result.json").read_text())
    assert (result["complete"], result["retried"]["restart"]) == (True, 1)


@pytest.mark.costly
@pytest.mark.usefixtures("quick")
def test_a_port_in_use_is_refused_and_a_free_one_is_used(
    tmp_path: Path, data: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        words = command(str(model_dir), data, tmp_path / "run", "--port", port, "--model", "tiny")
        assert main(words) == 2
        assert f"--port: {port} is used on this machine" in capsys.readouterr().err
    assert main([*words, "--samples", "1", "--max-tokens", "3"]) == 0
    row = json.loads((tmp_path / "run/answers.jsonl").read_text().splitlines()[0])
    assert row["engine"] == f"http://127.0.0.1:{port}/v1"
    assert row["response"]["model"] == "tiny"


@pytest.mark.usefixtures("quick")
def test_a_model_that_no_engine_can_serve_is_refused_before_one_starts(
    tmp_path: Path, data: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = shutil.copytree(model_dir, tmp_path / "plain")
    config = json.loads((plain / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (plain / "tokenizer_config.json").write_text(json.dumps(config))
    (plain / "chat_template.jinja").unlink(missing_ok=True)
    for words, said in (
        (command(str(plain), data, tmp_path / "run"), "has no chat_template in"),
        (
            command(str(model_dir), data, tmp_path / "run", "--engine", "sglang"),
            "--engine sglang needs --python",
        ),
        (
            command(str(model_dir), data, tmp_path / "run", "--engine", "vllm", "--python", "no"),
            "such as vllm-env/bin/python; no does not exist.",
        ),
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert said in error
        assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_a_missing_or_other_evalscope_is_refused(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFIR2_EVALSCOPE", str(tmp_path / "none"))
    words = command("http://127.0.0.1:1/v1", data, tmp_path / "run")
    assert main(words) == 2
    assert "evalscope is not in" in capsys.readouterr().err
    python = tmp_path / "old/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho 0.17.1\n")
    python.chmod(0o755)
    monkeypatch.setenv("INFIR2_EVALSCOPE", str(tmp_path / "old"))
    for case in (words, ["eval", "--setup"]):
        assert main(case) == 2
        assert "has evalscope 0.17.1, and 1.14.1 is needed" in capsys.readouterr().err
    monkeypatch.setenv("INFIR2_EVALSCOPE", str(data.parent))
    assert main(["eval", "--setup"]) == 2
    assert "exists and is no environment" in capsys.readouterr().err


REAL = evalscope.environment_directory() / "bin/python"


@pytest.fixture
def four(tmp_path: Path) -> Path:
    """Data of all four benchmarks; AIME 2024 with the columns of the hub's copies, invented."""
    data = tmp_path / "four"
    for name in ("aime25", "gpqa", "lcb"):
        shutil.copytree(FIXTURES / name, data / name)
    (data / "AIME_2024").mkdir()
    rows = [
        {
            "ID": f"2024-III-{number}",
            "Problem": f"A shelf has {number} rows of $25$ jars. How many jars are on it?",
            "Solution": "Multiply.",
            "Answer": 25 * number,
        }
        for number in range(1, 4)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (data / "AIME_2024/aime_2024_problems.jsonl").write_text(text)
    return data


@pytest.mark.skipif(not REAL.exists(), reason="evalscope is not installed: infir2 eval --setup")
@pytest.mark.skipif(not FIXTURES.exists(), reason="the benchmark-shaped fixtures are not here")
def test_real_evalscope_gives_the_scores_that_the_result_says(
    tmp_path: Path, four: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rules = json.loads((FIXTURES / "rules.json").read_text())
    jars = {"match": "has 2 rows", "answers": ["\\boxed{050}", "\\boxed{050}", "\\boxed{51}", ""]}
    rules = [jars, {"match": "How many jars", "answers": ["no box", "75", "25.0"]}, *rules]
    turns: dict[str, int] = {}

    def scripted(body: dict[str, Any]) -> dict[str, Any]:
        asked = [m["content"] for m in body["messages"] if m["role"] == "user"][-1]
        turns[asked] = turns.get(asked, -1) + 1
        answers = next(rule["answers"] for rule in rules if rule["match"] in asked)
        return {"content": answers[turns[asked] % len(answers)]}

    names = "aime24,aime25,gpqa_diamond,live_code_bench"
    words = ["--benchmarks", names, "--data", str(four), "--run.dir", str(tmp_path / "run")]
    with serving(Script(answer=scripted)) as server:
        assert main(["eval", server.url, *words, "--samples", "4", "--json"]) == 0
    scores = {each["name"]: each for each in json.loads(capsys.readouterr().out)}
    assert (scores["aime25"]["mean"], scores["live_code_bench"]["mean"]) == (0.5, 0.5)
    assert 0 < scores["aime24"]["mean"] < 1
    assert 0 < scores["gpqa_diamond"]["mean"] < 1
    questions = json.loads((tmp_path / "run/result.json").read_text())["questions"]
    for name, each in scores.items():
        recount = [s["score"] for question in questions[name] for s in question["samples"]]
        assert each["mean"] == pytest.approx(sum(recount) / len(recount))
        assert each["evalscope_score"] == pytest.approx(each["mean"], abs=5e-5)
        assert each["missing"] == 0


SCORING = """
import sys, time
sys.path.append({directory!r})
import evalscope_driver as driver
from evalscope.metrics.math import parser

if __name__ == "__main__":
    same = [parser.compare_answers(a, b) for a, b in {pairs!r}]
    scorers = driver.Scorers()
    scorers.replace_forks()
    assert [parser.compare_answers(a, b) for a, b in {pairs!r}] == same
    try:
        scorers.run(None, ("$1$", "answer"), 0.0, "extract_answer")
        sys.exit("it had no time")
    except parser.MathEvaluationError as error:
        assert "deadline" in str(error)
    try:
        parser.compare_answers(None, "1")
        sys.exit("it compared nothing")
    except parser.MathEvaluationError:
        print(sum(each.matched for each in same))
"""


@pytest.mark.skipif(not REAL.exists(), reason="evalscope is not installed: infir2 eval --setup")
def test_our_processes_score_as_evalscopes_own_forks(tmp_path: Path) -> None:
    pairs = [("1/2", "\\frac{1}{2}"), ("2", "3"), ("x+1", "1+x"), ("", "1")]
    script = tmp_path / "score.py"
    directory = str(Path(evalscope.DRIVER).parent)
    script.write_text(SCORING.format(directory=directory, pairs=pairs))
    result = subprocess.run([REAL, script], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout.strip()) == (0, "2"), result.stderr


REFERENCE = evalscope.environment_directory(evalscope.REFERENCE) / "bin/python"


@pytest.mark.skipif(not REFERENCE.exists(), reason="needs infir2 eval --setup --profile reference")
@pytest.mark.skipif(not FIXTURES.exists(), reason="the benchmark-shaped fixtures are not here")
def test_the_references_own_evalscope_sends_its_words(
    tmp_path: Path, four: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A benchmark of each kind; half of the samples are right, and a second run asks nothing."""
    code = "```python\nprint(2 * int(input()))\n```"
    right = {"0": "\\boxed{101}", "1": code, "2": "\\boxed{50}"}

    def scripted(body: dict[str, Any]) -> dict[str, Any]:
        asked = body["messages"][-1]["content"]
        kind = "1" if "### Question" in asked else "2" if "jars" in asked else "0"
        good = "A" if asked.startswith("Here are") else right[kind]
        return {"content": f"so\n</think>\n{good if body['seed'] % 2 else 'B'}"}

    script, run = Script(answer=scripted), tmp_path / "run"
    names = "aime24,aime25,gpqa_diamond,live_code_bench"
    words = ["--benchmarks", names, "--data", str(four)]
    words += ["--run.dir", str(run), "--samples", "4", "--profile", "reference", "--json"]
    with serving(script) as server:
        assert main(["eval", server.url, *words]) == 0
        scores = {each["name"]: each for each in json.loads(capsys.readouterr().out)}
        asked = len(script.requests)
        assert main(["eval", server.url, *words]) == 0
        assert len(script.requests) == asked == 4 * sum(e["num_questions"] for e in scores.values())
    result = json.loads((run / "result.json").read_text())
    for name, each in scores.items():
        recount = [s["score"] for q in result["questions"][name] for s in q["samples"]]
        assert each["mean"] == pytest.approx(sum(recount) / len(recount))
        assert each["evalscope_score"] == pytest.approx(each["mean"], abs=5e-5)
        assert 0 < each["mean"] < 1
        assert each["response_tokens_mean"] > 0
    by_role = [{m["role"]: m["content"] for m in r["messages"]} for r in script.requests]
    aime = next(each for each in by_role if each["user"].startswith("<|im_start|>user"))
    assert aime["system"].startswith("<|im_start|>system\nPlease reason")
    assert "\\boxed{{}}.<|im_end|>" in aime["system"]
    assert aime["user"].endswith("<|im_end|>\n<|im_start|>assistant\n<think>\n")
    assert any(each["user"].startswith("Here are some example questions") for each in by_role)
    limits = {r["messages"][0]["role"] + str(r.get("max_tokens")) for r in script.requests}
    assert limits == {"system31000", "user26000", "systemNone"}
    assert (result["settings"]["profile"], result["settings"]["evalscope"]) == (
        "reference",
        "0.17.1",
    )
    assert result["settings"]["live_code_bench.max_tokens"] is None
    assert result["settings"]["gpqa_diamond.prompts"] == {"few_shot_num": 5}


@pytest.mark.usefixtures("quick")
def test_the_reference_has_four_benchmarks(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--profile", "reference", "--benchmarks", "aime24,math_500"]
    with serving(Script()) as server:
        assert main(command(server.url, data, tmp_path / "run", *words)) == 2
    assert "the reference has no script for math_500" in capsys.readouterr().err
