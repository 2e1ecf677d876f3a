"""The command `infir2 serve`: what it refuses before it loads the model, how it starts and ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from own_server import KEY, Serve, begin_serve, write_model
from stages import gone

from infir2.cli import main
from infir2.engines.process_guard import descendants


@pytest.fixture(scope="module")
def model(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models"), world / "tokenizer", fp8=False)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The sentence of a command that ends with code 2."""
    assert main(["serve", *arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    return line


def test_refusals(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, key = str(model), tmp_path / "key"
    assert "does not exist" in refused(capsys, str(tmp_path / "runs/none"))
    assert "hf download org/name" in refused(capsys, "org/name")
    for host in ("0.0.0.0", "::", "10.1.2.3", "example.org"):
        assert "--api-key-file" in refused(capsys, path, "--host", host)
    assert "--weight-updates needs" in refused(capsys, path, "--weight-updates")
    assert "No such file" in refused(capsys, path, "--api-key-file", str(key))
    for content in ("", "two words\n", "ключ", "a\nb", "x" * 5000):
        key.write_text(content)
        assert "--api-key-file" in refused(capsys, path, "--api-key-file", str(key))
    for options in (["--port", "99999"], ["--port", "x"], ["--cache-gib", "-1"]):
        assert options[0] in refused(capsys, path, *options)
    assert "--engine" in refused(capsys, path, "--engine", "other")
    assert "--max-running-requests" in refused(capsys, path, "--max-running-requests", "0")


def test_a_port_in_use(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = refused(capsys, str(model), "--port", port)
        assert f"--port {port}" in line
        assert "Address already in use" in line


def test_a_cache_without_room(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--cache-gib" in refused(capsys, str(model), "--port", "0", "--cache-gib", "1e-9")


def test_a_broken_model_has_its_own_code(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in model.iterdir():
        if file.name != "model.safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert main(["serve", str(tmp_path), "--port", "0"]) == 3
    assert "has neither model.safetensors" in capsys.readouterr().err


ROOT = Path(__file__).parents[2]


def interpreter(directory: Path) -> Path:
    """What SGLang's and vLLM's interpreter would be; it runs `token_apis.py`."""
    path, script = directory / "python", ROOT / "tests/token_apis.py"
    path.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} {script} "$@"\n')
    path.chmod(0o700)
    return path


def begin(model: Path, directory: Path, kind: str, *more: str) -> tuple[Serve, str]:
    """`begin_serve`; of another engine than ours the files are in "engine"."""
    if kind != "native":
        more += ("--engine", kind, "--python", str(interpreter(directory)))
        more += ("--engine-dir", str(directory / "engine"), "--server-option=--an-option")
    return begin_serve(model, directory, *more)


def engines(process: Serve) -> list[int]:
    """Its servers of SGLang or vLLM."""
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in descendants(process.pid)}
    return [pid for pid, words in commands.items() if b"token_apis.py" in words]


@pytest.mark.parametrize("kind", ["native", "sglang", "vllm"])
def test_from_start_to_sigterm(model: Path, tmp_path: Path, kind: str) -> None:
    """In a process: 503 until a token was generated, then ready; SIGTERM ends it in 5 seconds."""
    process, url = begin(model, tmp_path, kind, "--served-name", "name")
    try:
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        body = json.dumps({"prompt": "Compute", "ignore_eos": True, "max_tokens": 400}).encode()
        request = urllib.request.Request(f"{url}/v1/models", headers=headers)
        answer = json.loads(urllib.request.urlopen(request, timeout=60).read())
        assert [each["id"] for each in answer["data"]] == ["name"]
        started = descendants(process.pid)
        assert len(engines(process)) == (kind != "native")
        with socket.create_connection(("127.0.0.1", urlsplit(url).port or 0)) as busy:
            head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{head}"
            busy.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            time.sleep(0.2)
            start = time.monotonic()
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 0
            assert time.monotonic() - start < 5
        assert gone(started)
    finally:
        process.kill()
    assert process.stderr is not None
    lines = process.stderr.read()
    assert f"name at {url}/v1" in lines
    assert "Traceback" not in lines
    if kind != "native":
        recorded = json.loads((tmp_path / f"engine/{kind}.json").read_text())
        assert recorded["command"][-1] == "--an-option"
        assert "--an-option" in (tmp_path / f"engine/{kind}.log").read_text()


def test_the_end_of_the_engine_is_the_end_of_the_server(model: Path, tmp_path: Path) -> None:
    """Also while nobody asks for anything: /health must not say that all is well."""
    process, _ = begin(model, tmp_path, "sglang")
    os.kill(engines(process)[0], signal.SIGKILL)
    _, lines = process.communicate(timeout=60)
    assert process.returncode == 71
    assert "sglang ended (code 137); its log" in lines
    assert "--an-option" in lines, "the last lines of its log"
    assert "Traceback" not in lines


def test_an_engine_that_does_not_start(model: Path, tmp_path: Path) -> None:
    options = ["--engine", "vllm", "--python", str(interpreter(tmp_path)), "--port", "0"]
    command = [sys.executable, "-m", "infir2", "serve", str(model), *options]
    done = subprocess.run(
        [*command, "--server-option=--refuse"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "vllm ended while it started (code 1)" in done.stderr
    assert "the server refuses an option" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_an_engine_cannot_serve_is_refused_before_it_starts(
    model: Path, tmp_path: Path, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python, fp8 = str(interpreter(tmp_path)), str(write_model(tmp_path, world / "tokenizer"))
    path = str(model)
    for words, said in (
        ([path, "--python", python], "--engine sglang or vllm"),
        ([path, "--memory-fraction", "0.5"], "--engine sglang or vllm"),
        ([path, "--engine", "sglang"], "--engine sglang needs --python"),
        ([path, "--engine", "vllm", "--python", "none"], "none does not exist"),
        ([path, "--engine", "vllm", "--python", python, "--tensor-parallel", "2"], "more GPUs"),
        ([path, "--engine", "vllm", "--python", python, "--memory-fraction", "1"], "--memory-fra"),
        ([path, "--engine", "sglang", "--python", python, "--cache-gib", "1"], "--cache-gib"),
        ([fp8, "--engine", "sglang", "--python", python], "multiples of 128"),
        ([fp8, "--engine", "vllm", "--python", python], "does not compute on a CPU"),
    ):
        assert said in refused(capsys, *words)
    key = tmp_path / "key"
    key.write_text(KEY)
    updates = ["--weight-updates", "--api-key-file", str(key)]
    words = [path, "--engine", "sglang", "--python", python, *updates]
    assert "--weight-updates is for --engine native" in refused(capsys, *words)
