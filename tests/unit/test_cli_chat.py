"""`infir2 chat`: piped input, a terminal with Ctrl-C, servers that refuse or do not start."""

import io
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from own_server import KEY, OwnServer, write_model
from safetensors.torch import load_file, save_file

from infir2.cli import main
from infir2.engines.http_client import KEY_VARIABLE
from infir2.engines.types import Completion


@pytest.fixture(scope="module")
def model(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its template opens a thought in each prompt."""
    path = write_model(tmp_path_factory.mktemp("models"), world / "tokenizer", fp8=False)
    config = path / "tokenizer_config.json"
    text = json.loads(config.read_text())
    opened = "<|im_start|>assistant\n<think>\n"
    text["chat_template"] = text["chat_template"].replace("<|im_start|>assistant\n", opened)
    config.write_text(json.dumps(text))
    return path


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[OwnServer]:
    with OwnServer(model).run() as server:
        yield server


@pytest.fixture
def url(server: OwnServer, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    return server.url


def talk(
    monkeypatch: pytest.MonkeyPatch, url: str, text: str, *options: str, code: int = 0
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert main(["chat", "--url", url, *options]) == code


def answer(server: OwnServer, messages: list[dict[str, str]], **options: Any) -> dict[str, str]:
    body = {"messages": messages, "temperature": 0.6, "top_p": 0.95, **options}
    message: dict[str, str] = server.call("/v1/chat/completions", body)[1]["choices"][0]["message"]
    return message


def test_piped_messages_are_one_conversation(
    server: OwnServer, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Thoughts go to stderr and answers to stdout; /reset begins anew."""
    options = {"seed": 4, "max_tokens": 20}
    messages = [{"role": "system", "content": "Compute"}, {"role": "user", "content": "2 + 3"}]
    first = answer(server, messages, **options)
    assert first["reasoning_content"]
    messages += [{"role": "assistant", "content": first["content"]}]
    second = answer(server, [*messages, {"role": "user", "content": "4 + 5"}], **options)
    text = "2 + 3\n\n4 + 5\n/reset\n2 + 3\n/quit\n7\n"
    talk(monkeypatch, url, text, "--system=Compute", "--seed=4", "--max-tokens=20")
    output = capsys.readouterr()
    assert output.out == "".join(each["content"] + "\n" for each in (first, second, first))
    shown = [line for line in output.err.splitlines() if not line.startswith("chat: ")]
    thoughts = [each["reasoning_content"] for each in (first, second, first)]
    assert [line for line in shown if line] == [
        line for thought in thoughts for line in thought.splitlines() if line
    ]


def test_a_refused_message_does_not_end_the_chat(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "Compute " * 600
    talk(monkeypatch, url, f"{long}\nCompute 2\n", "--seed=1", "--max-tokens=5")
    output = capsys.readouterr()
    assert "maximum context length" in output.err
    assert output.out.count("\n") == 1


def test_refusals(
    url: str, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat"]) == 2
    assert main(["chat", str(model), "--url", url]) == 2
    assert main(["chat", "--url", url, "--engine", "vllm"]) == 2
    talk(monkeypatch, "http://127.0.0.1:9/v1", "", code=2)
    talk(monkeypatch, "ftp://127.0.0.1", "", code=2)
    monkeypatch.setenv(KEY_VARIABLE, "wrong")
    talk(monkeypatch, url, "", code=2)
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 6
    assert KEY_VARIABLE in errors[-1]


def test_a_server_of_its_own(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "infir2", "chat"]
    shutil.copytree(model, tmp_path / "partial")
    tensors = load_file(model / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "partial/model.safetensors")
    arguments = ([str(model), "--max-tokens=6", "--seed=1"], [str(tmp_path / "partial")])
    processes = [
        subprocess.Popen(
            [*command, *each],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for each in arguments
    ]
    (output, errors), (_, refusal) = (each.communicate("Compute 2\n") for each in processes)
    assert processes[0].returncode == 0, errors
    assert output == "\n"  # the thought is not finished
    assert processes[1].returncode == 3
    assert "Traceback" not in refusal
    assert "the server did not start" in refusal


def test_ctrl_c_on_a_terminal(server: OwnServer, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first stops the response, and the server; the second ends the chat."""
    step = server.engine.step

    def slow_step() -> list[Completion]:
        time.sleep(0.1)  # or the response is over before the chat hears of Ctrl-C
        return step()

    monkeypatch.setattr(server.engine, "step", slow_step)
    command = [sys.executable, "-m", "infir2", "chat", "--url", url, "--seed=3"]
    pid, terminal = pty.fork()
    if not pid:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores it
        os.execv(sys.executable, command)
    shown = read_until(terminal, "> ")
    os.write(terminal, b"Compute 2 + 3\n")
    shown = read_until(terminal, "\x1b[2m")  # a dim thought
    while not server.engine.num_unfinished:
        time.sleep(0.001)
    os.write(terminal, b"\x03")
    shown = read_until(terminal, "> ")
    assert "stopped." in shown
    server.wait_until_idle(seconds=1)
    os.write(terminal, b"\x03")
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0


def read_until(terminal: int, text: str) -> str:
    shown = ""
    while text not in shown:
        part = os.read(terminal, 1024)
        assert part, shown
        shown += part.decode(errors="replace")
    return shown


@pytest.mark.costly
def test_two_models_answer_side_by_side(
    world: Path,
    server: OwnServer,
    url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The second model has a server of its own; every message goes to both."""
    fp8 = write_model(tmp_path, world / "tokenizer", fp8=True)
    options = ["--temperature=0", "--max-tokens=12", f"--beside={fp8}"]
    talk(monkeypatch, url, "2 + 3\n/reset\n4 + 5\n", *options)
    output = capsys.readouterr()
    names = [line for line in output.out.splitlines() if line.endswith(":")]
    assert len(names) == 4
    assert names[1] == f"{fp8.name} (FP8):"
    assert names[2:] == names[:2]
    assert output.err.count(" characters") == 2
    assert "a new conversation." in output.err
    talk(monkeypatch, url, "", f"--beside={tmp_path / 'nothing'}", code=2)
