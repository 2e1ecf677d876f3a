"""The page of runs that still train, and the page that every run writes as it ends."""

import http.server
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, ClassVar

import pytest
from report_runs import describe, rl_rows, sample, train_rows, write
from stages import options, run

from infir2.checkpoint.lock import RunLock, is_running
from infir2.cli import main
from infir2.cli.report import own_page
from infir2.errors import CheckpointError, ConfigError, NonFiniteError, Preempted
from infir2.report import follow, read_runs, write_page

LIVE = "data-reload="


def warn(_: str) -> None:
    pass


@pytest.fixture
def training(tmp_path: Path) -> Path:
    write(describe(tmp_path / "run", "sft"), train_rows(20, 3.0, 1.0, 0))
    return tmp_path / "run"


def test_a_run_is_running_while_a_job_holds_its_lock(training: Path) -> None:
    assert not is_running(training)
    lock = RunLock.acquire(training, warn)
    assert is_running(training)
    lock.release()
    assert not is_running(training)
    other = '{"host": "%s", "pid": 999999, "started": "x", "process_start": 1}'
    (training / ".lock").write_text(other % "another-host")
    assert is_running(training), "a heartbeat of another host is new"
    import socket

    (training / ".lock").write_text(other % socket.gethostname())
    assert not is_running(training), "its job is dead"


def test_a_page_that_is_followed_reloads_itself_until_the_run_ends(
    training: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lock, pages, page = RunLock.acquire(training, warn), list[str](), training / "report.html"

    class Time:
        """Ten seconds pass at once; the run takes a step in the first, and ends in the 15th."""

        now = 0.0

        def monotonic(self) -> float:
            return self.now

        def sleep(self, seconds: float) -> None:
            self.now += seconds
            pages.append(page.read_text())
            if self.now == 1:
                with (training / "metrics.jsonl").open("a") as file:
                    file.write('{"kind": "train", "step": 21, "loss": 1.0, "seconds": 1.0}\n{"kin')
            if self.now == 15:
                lock.release()

    monkeypatch.setattr("infir2.report.live.time", Time())
    assert follow([training], page, "step", 10) == page
    assert len(pages) == 15, "a run that ends is not waited for"
    assert 'data-reload="10"' in pages[0]
    assert "21 steps" not in pages[9]
    assert "21 steps" in pages[10]
    assert LIVE not in page.read_text(), "the last page stays as it is"
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "is written every" in line]
    assert lines[-1] == "infir2: the runs have ended, and this was their last page"


OPEN = """<script>addEventListener("load", () => {
  for (const fold of document.querySelectorAll("details"))
    fold.open = /p2|b.recipe|1 event/.test(fold.querySelector("summary").textContent);
  document.querySelector(".filters select[name=verdict]").value = "wrong";
})</script></body>"""


class Pages(http.server.BaseHTTPRequestHandler):
    """The first page once, then the second; the first opens some folds."""

    pages: ClassVar[list[str]]

    def do_GET(self) -> None:
        body = ""
        if self.path == "/":
            body = self.pages.pop(0) if len(self.pages) > 1 else self.pages[0]
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_reload_keeps_what_the_reader_opened_although_the_page_changes(tmp_path: Path) -> None:
    """Folds and fields are found again by what they are, also behind new runs and samples."""
    root, event = tmp_path / "runs", {"kind": "event", "step": 1, "event": "x", "detail": "d"}
    samples = [sample(step, 0.0, verdict="wrong", prompt=f"p{step}") for step in (1, 2)]
    write(describe(root / "b", "rl"), [*rl_rows(20, 0.1, 0.5, 0), event])
    write(root / "b", samples, "samples.jsonl")
    first = write_page(read_runs([root]), tmp_path / "page.html", "step", 1).read_text()
    write(describe(root / "a", "sft"), [*train_rows(20, 3.0, 1.0, 1), event])
    write(root / "b", [*rl_rows(20, 0.1, 0.5, 0), event, event | {"step": 2}])
    rows = [sample(1, 0.0, verdict="wrong", prompt="p0"), *samples]
    write(root / "b", [*rows, sample(3, 1.0, verdict="ok", prompt="p3")], "samples.jsonl")
    second = write_page(read_runs([root]), tmp_path / "page.html", "step").read_text()
    first = re.sub("<meta http-equiv[^>]*>", "", first).replace("</body>", OPEN)
    Pages.pages = [first, second]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000"]
        flags += [f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom"]
        address = f"http://127.0.0.1:{server.server_port}/"
        command = ["chromium", *flags, address]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        server.shutdown()
    folds = re.findall("<details([^>]*)><summary>(.*?)</summary>", result.stdout)
    opened = [re.sub("<.*?>", " ", text).split()[-1] for flags, text in folds if "open=" in flags]
    assert opened == ["events", "p2", "b/recipe.toml"], folds
    (hidden,) = (text for flags, text in folds if "hidden=" in flags)
    assert "p3" in hidden, "the filter is still set"


def test_a_run_that_has_ended_is_written_once(
    training: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(training), "--follow"]) == 0
    assert LIVE not in (training / "report.html").read_text()
    assert "none of these runs is running: the page is written once" in capsys.readouterr().err


def test_ctrl_c_ends_following_with_one_line_and_a_last_page(training: Path) -> None:
    lock = RunLock.acquire(training, warn)
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from infir2.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "report", str(training), "--follow", "--every", "60"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "is written every 60 s" in line)
        assert "Ctrl-C stops" in line
        assert LIVE in (training / "report.html").read_text()
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read().splitlines()
    assert process.returncode == 130
    lock.release()
    said = [line for line in rest if " so far" not in line]
    assert len(said) == 1
    assert said[0].startswith("infir2: Stopped following; ")
    assert LIVE not in (training / "report.html").read_text()


@pytest.mark.parametrize(
    ("error", "has_begun", "is_written"),
    [
        (None, True, True),
        (None, False, True),
        (Preempted("stopped"), True, True),
        (NonFiniteError("nan"), True, True),
        (CheckpointError("disk full"), True, True),
        (Preempted("before the first step"), False, False),
        (ConfigError("of another run"), False, False),
        (RuntimeError("ours"), True, False),
    ],
    ids=repr,
)
def test_a_run_writes_its_page_however_it_ends(
    training: Path, error: Exception | None, has_begun: bool, is_written: bool
) -> None:
    def ends() -> None:
        with own_page(str(training)):
            if has_begun:
                with (training / "metrics.jsonl").open("a") as file:
                    file.write('{"kind": "train", "step": 21, "loss": 1.0}\n')
            if error:
                raise error

    if error:
        with pytest.raises(type(error)):
            ends()
    else:
        ends()
    assert (training / "report.html").exists() is is_written


def test_a_page_that_cannot_be_written_ends_no_run(
    training: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (training / "report.html").mkdir()
    with own_page(str(training)):
        pass
    assert "the run is not affected" in capsys.readouterr().err
    with own_page(str(training / "nothing")):
        pass
    assert not (training / "nothing").exists()


def test_a_page_that_fails_to_be_drawn_ends_no_run(
    training: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise ValueError("no such\ncolor")

    monkeypatch.setattr("infir2.report.write_report", fails)
    with own_page(str(training)):
        pass
    (line,) = (text for text in capsys.readouterr().err.splitlines() if "no such" in text)
    assert line.endswith("is not written (ValueError: no such); the run is not affected")


def test_only_rank_0_writes_it(training: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with own_page(str(training)):
        pass
    assert not (training / "report.html").exists()


def steps_of(page: Path) -> str:
    return re.findall(r'data-title="steps"><span>(\d+)', page.read_text())[0]


def test_a_real_run_has_its_page_at_its_end_and_after_sigterm(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(options(world, tmp_path / "run", "cpt", schedule__total_steps=4))
    assert steps_of(tmp_path / "run/report.html") == "4"
    from infir2.train.supervisor import Supervisor

    finish = Supervisor.finish_step

    def stopped_after_two(self: Supervisor, step: int, *rest: Any) -> None:
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
        finish(self, step, *rest)

    monkeypatch.setattr(Supervisor, "finish_step", stopped_after_two)
    assert threading.current_thread() is threading.main_thread()
    assert main(options(world, tmp_path / "b", "cpt", schedule__total_steps=9)) == 75
    assert steps_of(tmp_path / "b/report.html") == "2"
