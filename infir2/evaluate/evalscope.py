"""evalscope in an environment of its own: install it, find it, run it, read what it wrote."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infir2.errors import CheckFailedError, ConfigError, disk_reason
from infir2.files import read_json_lines, read_regular

DRIVER = Path(__file__).with_name("evalscope_driver.py")
MAX_REPORT_BYTES = 1 << 24
_LAST_CHARACTERS = 1500
_VERSION_OF = "import importlib.metadata as m; print(m.version('evalscope'))"
# evalscope needs none of ours, and a proxy would see requests to loopback.
_KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "XDG_CACHE_HOME", "SSL_CERT_FILE")


@dataclass(frozen=True)
class Release:
    """A release of evalscope, in an environment of its own.

    Attributes:
        variable: names the environment's directory.
        packages: beside evalscope, what it needs and does not name.
        setup: the command that installs it.
    """

    version: str
    variable: str
    packages: tuple[str, ...]
    setup: str


CURRENT = Release("1.14.1", "INFIR2_EVALSCOPE", (), "infir2 eval --setup")
REFERENCE = Release(
    "0.17.1",
    "INFIR2_EVALSCOPE_REFERENCE",
    ("torch>=2.11,<2.14", "oss2", "addict", "simplejson", "sortedcontainers", "einops"),
    "infir2 eval --setup --profile reference",
)


@dataclass(frozen=True)
class Sample:
    """One scored answer. `score` is 0 to 1; `answer` what was compared, `text` all of it.

    `question` is its number in evalscope's `subset`.
    """

    subset: str
    question: int
    score: float
    answer: str
    target: str
    prompt: str
    text: str
    tokens: int
    truncated: bool


def environment_directory(release: Release = CURRENT) -> Path:
    """Where evalscope is: what the release's variable says, or below the user's data directory."""
    data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share")
    return Path(os.environ.get(release.variable) or data / f"infir2/evalscope-{release.version}")


def set_up(directory: Path, release: Release = CURRENT) -> str:
    """Create the environment and install evalscope with pip; says what is there afterwards.

    Raises ConfigError if the directory is something else, CheckFailedError if pip fails.
    """
    if (directory / "bin/python").exists():
        require(directory, release)
        return f"evalscope {release.version} is in {directory}."
    if directory.exists() and any(directory.iterdir()):
        raise ConfigError(
            f"{directory} exists and is no environment; name another by {release.variable}."
        )
    packages = [f"evalscope=={release.version}", *release.packages]
    for command in (
        [sys.executable, "-m", "venv", str(directory)],
        [str(directory / "bin/python"), "-m", "pip", "install", "--quiet", *packages],
    ):
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            shutil.rmtree(directory, ignore_errors=True)
            lines = (result.stderr or result.stdout).strip().splitlines()
            raise CheckFailedError(
                f"evalscope {release.version} cannot be installed in {directory} "
                f"({lines[-1][:300] if lines else 'no message'}); is a package index reachable?"
            )
    require(directory, release)
    return f"evalscope {release.version} was installed in {directory}."


def require(directory: Path, release: Release = CURRENT) -> None:
    """Raise ConfigError unless the right evalscope is there."""
    python = directory / "bin/python"
    remedy = f"install it with {release.setup}, or name its environment by {release.variable}"
    if not python.exists():
        raise ConfigError(f"evalscope is not in {directory}: {remedy}.")
    result = subprocess.run([python, "-I", "-c", _VERSION_OF], capture_output=True, text=True)
    found = result.stdout.strip() or "none"
    if found != release.version:
        raise ConfigError(
            f"{directory} has evalscope {found}, and {release.version} is needed: {remedy}."
        )


class Processes:
    """evalscope's processes, one for each benchmark; the next one imports while one runs."""

    def __init__(self, directory: Path, log: Path, number: int) -> None:
        """`number` processes of the environment `directory` in all; their output goes to `log`."""
        self._directory, self._log, self._left = directory, log, number
        self._ready: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Processes":
        self._prepare()
        return self

    def __exit__(self, *_: object) -> None:
        while self._ready:
            _end(self._ready.pop())

    def run(self, tasks: Sequence[Mapping[str, Any]]) -> None:
        """Run evalscope's tasks (see evalscope_driver.py). Raises CheckFailedError if it fails."""
        process = self._ready.pop()
        try:
            self._prepare()
            process.communicate(json.dumps({"tasks": list(tasks)}).encode() + b"\n")
        finally:
            _end(process)
        if process.returncode:
            end = self._log.read_bytes()[-_LAST_CHARACTERS:].decode(errors="replace").strip()
            raise CheckFailedError(
                f"evalscope ended with code {process.returncode}; its output {self._log} ends "
                f"with:\n{end}"
            )

    def _prepare(self) -> None:
        if not self._left:
            return
        self._left -= 1
        environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "NO_PROXY": "*"}
        with self._log.open("ab") as output:
            process = subprocess.Popen(
                [str(self._directory / "bin/python"), "-I", str(DRIVER)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=environment | offline,
                start_new_session=True,
            )
        self._ready.append(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    if process.stdin is not None:
        with suppress(OSError):
            process.stdin.close()


def read_samples(work_dir: Path, samples: int) -> list[Sample]:
    """The scored answers of one benchmark: the last valid line of each index."""
    predictions = _by_index(work_dir / "predictions")
    reviews = _by_index(work_dir / "reviews")
    return [
        _sample(index, reviews[index], predictions.get(index, {}), samples)
        for index in sorted(reviews)
    ]


def reported_score(work_dir: Path) -> float | None:
    """The mean score of evalscope's own report; None if it wrote none."""
    for path in sorted((work_dir / "reports").rglob("*.json")):
        try:
            report = json.loads(read_regular(path, MAX_REPORT_BYTES))
        except OSError as error:
            raise CheckFailedError(f"{path} cannot be read ({disk_reason(error)}).") from error
        for metric in report["metrics"]:
            if metric["identity"]["aggregation"] == "mean":
                return float(metric["score"])
    return None


def _by_index(folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Rows by subset and index; questions of several subsets have the same indices."""
    return {
        (path.stem, row["index"]): row
        for path in sorted(folder.rglob("*.jsonl"))
        for row in read_json_lines(path)
        if isinstance(row.get("index"), int)
    }


def _sample(
    index: tuple[str, int], review: dict[str, Any], prediction: dict[str, Any], samples: int
) -> Sample:
    score = review["sample_score"]["score"]
    value = score["value"].get(score.get("main_score_name") or "", None)
    value = next(iter(score["value"].values())) if value is None else value
    choices = (prediction.get("model_output") or {}).get("choices") or [{}]
    usage = (prediction.get("model_output") or {}).get("usage") or {}
    messages = review["messages"]
    return Sample(
        subset=index[0],
        question=index[1] // samples,
        score=float(value),
        answer=str(score.get("extracted_prediction") or ""),
        target=_target(review.get("target")),
        prompt=_text(messages[-2]["content"]) if len(messages) > 1 else "",
        text=_text(messages[-1]["content"]),
        tokens=int(usage.get("output_tokens") or 0),
        truncated=choices[0].get("stop_reason") == "max_tokens",
    )


def _target(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value or "")


def _text(content: Any) -> str:
    """The text of a message, whose thought evalscope keeps as a part of its own."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "\n".join(
        f"<think>\n{part['reasoning']}\n</think>" if part.get("reasoning") else part.get("text", "")
        for part in parts
        if isinstance(part, dict)
    )
