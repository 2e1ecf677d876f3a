"""The commands of the runs, as they can be copied: without the paths of the machine they ran on."""

import os
import re
import shlex
from collections.abc import Iterable, Sequence
from html import escape

from infir2.report.read import Run

# Recipes of the package and of a checkout of it; another recipes/ is the user's.
_DEMO = "/infir2/demo/recipes/"
_SHIPPED = re.compile(r"/recipes/(?=(?:parity|qwen2\.5-1\.5b|qwen2\.5-7b|real|smollm2)/[^/]+$)")
_ABSOLUTE = re.compile(r"""(?<![\w./~-])/(?!/)[^\s"'#,\]=:]+""")
_MIN_ROOT_PARTS = 2  # "/" and "/home" are not the directory of a project


class Paths:
    """Absolute paths made relative: to the deepest directory that has all of the runs' paths.

    Without such a directory the last two parts of a path remain. Recipes that come with infir2 are
    named as in its checkout. Example: "/home/me/work/runs/a" -> "runs/a".
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        words = [word for run in runs for word in _words(run)]
        found = {path for word in words for path in _ABSOLUTE.findall(word)}
        parents = [os.path.dirname(path) for path in found if not _shipped(path)]
        root = os.path.commonpath(parents) if parents else ""
        self._root = root if len(root.split("/")) > _MIN_ROOT_PARTS else ""

    def portable(self, text: str) -> str:
        """The text with every absolute path in it made relative."""
        return _ABSOLUTE.sub(lambda match: self._relative(match[0]), text)

    def _relative(self, path: str) -> str:
        if shipped := _shipped(path):
            return shipped
        if self._root and path.startswith(f"{self._root}/"):
            return path[len(self._root) + 1 :]
        return "/".join(path.strip("/").split("/")[-2:])


def _shipped(path: str) -> str:
    """The path in a checkout of a recipe that comes with infir2; "" for other files."""
    if _DEMO in path:
        return f"recipes/demo/{path.rpartition(_DEMO)[2]}"
    found = _SHIPPED.search(path)
    return path[found.start() + 1 :] if found else ""


def _words(run: Run) -> list[str]:
    """The arguments of the run's command, without the program."""
    command = run.environment.get("command")
    return [str(word) for word in command[1:]] if isinstance(command, list) else []


def _launched(run: Run) -> list[str]:
    """The launcher of a run of several processes."""
    size, local = (run.environment.get(name) for name in ("processes", "processes_per_node"))
    if not isinstance(size, int) or not isinstance(local, int) or size < 2 or local < 1:
        return []
    nodes = size // local
    several = ["--nodes", str(nodes), "--endpoint", "HOST:29400"] if nodes > 1 else []
    cpu = ["--cpu"] if run.environment.get("device") == "cpu" else []
    return ["launch", "torchrun", *several, "--gpus-per-node", str(local), *cpu, "--"]


def command_lines(runs: Sequence[Run], paths: Paths) -> list[str]:
    """One shell command for each run that recorded its own; equal ones once."""
    lines = (
        shlex.join(["infir2", *_launched(run), *map(paths.portable, words)])
        for run in runs
        if (words := _words(run))
    )
    return list(dict.fromkeys(lines))


def commands_html(runs: Sequence[Run], paths: Paths) -> str:
    """HTML: the command of each run, and where to find every value that it used."""
    lines = command_lines(runs, paths)
    if not lines:
        return ""
    note = (
        "In the order of the runs. Paths are relative: run the commands where the data and models "
        "are, or name yours. Each run directory's recipe.toml has every value that was used, and "
        f"runs again under a new run.dir.{_commits(runs)}"
    )
    text = "".join(f"<span>{escape(line)}\n</span>" for line in lines)
    return f'<div><pre class="command">{text}</pre></div><p class="note">{escape(note)}</p>'


def _commits(runs: Iterable[Run]) -> str:
    commits = {str(run.environment["commit"]) for run in runs if run.environment.get("commit")}
    return f" Commit: {', '.join(sorted(commits))}." if commits else ""
