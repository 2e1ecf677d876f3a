"""The command `infir2 serve`: what it refuses before it loads the model, how it starts and ends."""

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from own_server import KEY, write_model

from infir2.cli import main


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


def test_from_start_to_sigterm(model: Path, tmp_path: Path) -> None:
    """In a process: 503 until a token was generated, then ready; SIGTERM ends it in 5 seconds."""
    key = tmp_path / "key"
    key.write_text(KEY + "\n")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--port", str(port), "--api-key-file", str(key), "--served-name", "name"]
    process = subprocess.Popen(
        [sys.executable, "-m", "infir2", "serve", str(model), *options, "--cache-gib", "0.01"],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        url, statuses = f"http://127.0.0.1:{port}", set()
        while 200 not in statuses:
            assert process.poll() is None
            time.sleep(0.02)
            try:
                statuses.add(urllib.request.urlopen(f"{url}/health", timeout=60).status)
            except urllib.error.HTTPError as error:
                statuses.add(error.code)
            except OSError:
                continue
        assert statuses <= {200, 503}
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        body = json.dumps({"prompt": "Compute", "ignore_eos": True, "max_tokens": 400}).encode()
        request = urllib.request.Request(f"{url}/v1/models", headers=headers)
        answer = json.loads(urllib.request.urlopen(request, timeout=60).read())
        assert [each["id"] for each in answer["data"]] == ["name"]
        with socket.create_connection(("127.0.0.1", port)) as busy:
            head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{head}"
            busy.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            time.sleep(0.2)
            start = time.monotonic()
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 0
            assert time.monotonic() - start < 5
    finally:
        process.kill()
    assert process.stderr is not None
    lines = process.stderr.read()
    assert f"name at {url}/v1" in lines
    assert "Traceback" not in lines
