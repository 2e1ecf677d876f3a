"""`infir2 check`: everything about a command that can be known to fail before it starts, in seconds, with nothing trained.

Each check is one line: ok, warn, FAIL, or skip for want of an earlier one. Later checks run even if earlier ones
failed, so that one call shows all there is to mend.
"""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infir2.cli.arguments import load_recipe, recipe_help, split_recipe_words, wants_help
from infir2.cli.train import KINDS
from infir2.config import Loaded, load
from infir2.config.keys import flatten
from infir2.config.load import sections_in
from infir2.config.schema import RlRecipe, TrainRecipe
from infir2.errors import CheckFailedError, ConfigError, UserError
from infir2.terminal import print_result

if TYPE_CHECKING:
    from infir2.checkpoint import Checkpoint
    from infir2.config.schema import ModelSection
    from infir2.data import ChatTokenizer
    from infir2.parallel.mesh import Sizes
    from infir2.preflight.model import ModelFacts

MIN_OPEN_FILES = 4096


def check(arguments: Sequence[str]) -> None:
    """infir2 check [cpt|sft|rl|eval] RECIPE.toml ...

    Raises:
        CheckFailedError: at least one check failed; the lines printed say which and what to do.
    """
    if wants_help(arguments):
        meaning = "Tries everything that the verb needs with this recipe, and trains nothing. The verb is guessed if left out."
        return print_result(
            recipe_help(RlRecipe, "check", meaning, words="check [cpt|sft|rl|eval]")
        )
    verb, words = _verb(arguments)
    preflight = Preflight(load_recipe(KINDS[verb][0], words, verb, command="check"), verb)
    failed = [name for name, function in preflight.checks() if not _report(name, function)]
    if failed:
        raise CheckFailedError(
            f"{len(failed)} of the checks failed ({', '.join(failed)}); the lines marked FAIL say what to do."
        )


def _verb(arguments: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The verb named first, or the one whose sections the recipe has; the remaining words."""
    if arguments and arguments[0] in KINDS:
        return arguments[0], arguments[1:]
    words = split_recipe_words(arguments, "check")
    sections = sections_in(words.paths)
    if "rl" in sections:
        return "rl", arguments
    if sections and "schedule" not in sections:
        return "eval", arguments
    recipe = load(TrainRecipe, words.paths, words.options, os.environ).recipe
    return "sft" if recipe.data.batch_samples or _first_row_is_conversation(
        recipe
    ) else "cpt", arguments


def _first_row_is_conversation(recipe: TrainRecipe) -> bool:
    from infir2.data.sources import RowError, Source

    section = recipe.data.sources[0]
    try:
        row = Source(section.path).read(0)
    except (UserError, RowError):
        return False  # the data check says what is wrong with it
    return bool(section.solution_field) or "messages" in row


def _report(name: str, function: Callable[[], str]) -> bool:
    try:
        rest = function()
        word = "warn" if rest.startswith("warn: ") else "ok"
    except _NotTriedError as error:
        word, rest = "skip", str(error)
    except UserError as error:
        word, rest = "FAIL", str(error)
    print_result(f"{word:5} {name:10} {rest.removeprefix('warn: ')}")
    return word != "FAIL"


class _NotTriedError(UserError):
    """A check whose input an earlier, failed check was to give."""


class Preflight:
    """The checks of one recipe. Each returns what it found (`warn: ...` for a doubt) or raises a UserError."""

    def __init__(self, loaded: Loaded[Any], verb: str) -> None:
        self.loaded, self.verb = loaded, verb
        self.recipe = (
            loaded.recipe
        )  # an RlRecipe in the checks of `rl`, an EvalRecipe in those of `eval`
        self._tokenizer: ChatTokenizer | None = None
        self._sizes: Sizes | None = None
        self._model: ModelFacts | None = None

    def checks(self) -> list[tuple[str, Callable[[], str]]]:
        """Name and function of each check that applies, in the order to run them."""
        checks = [
            ("recipe", self.resolved),
            ("tokenizer", self.tokenizer),
            ("data", self.data),
            ("model", self.model),
        ]
        if self.verb in ("rl", "eval"):
            checks += [("verifier", self.verifier), ("jail", self.jail)]
        if self.verb == "rl":
            checks += [("engine", self.engine)]
        if self.verb != "eval":
            checks += [
                ("parallel", self.parallel),
                ("memory", self.memory),
                ("run dir", self.run_dir),
                ("disk", self.disk),
            ]
        return [*checks, ("machine", self.machine)]

    def resolved(self) -> str:
        """Strict parsing is done by now; the digest tells whether two recipes resolve to the same values."""
        digest = hashlib.sha256(
            json.dumps(flatten(self.recipe), sort_keys=True).encode()
        ).hexdigest()
        files = {origin for origin in self.loaded.provenance.values() if origin.startswith("file:")}
        return f"infir2 {self.verb}, {len(self.loaded.provenance)} keys from {len(files)} files, sha256 of the values {digest[:12]}"

    def tokenizer(self) -> str:
        """Files, template, round trip; for conversations, that prompts are prefixes and the end token is trained."""
        from infir2.preflight.data import check_tokenizer
        from infir2.train.build import open_tokenizer

        configured = self.recipe.data.tokenizer if isinstance(self.recipe, TrainRecipe) else ""
        self._tokenizer, directory = open_tokenizer(self._model_section(), configured)
        return f"{directory}: {check_tokenizer(self._tokenizer, chat=self.verb != 'cpt')}"

    def data(self) -> str:
        """Rows of each source through the same functions as in training."""
        from infir2.preflight.data import check_sources

        if self._tokenizer is None:
            raise _NotTriedError("needs the tokenizer")
        return check_sources(self.recipe, self.verb, self._tokenizer)

    def model(self) -> str:
        """Every weight is there with the right shape; headers only, no weight is read."""
        from infir2.preflight.model import model_facts

        self._model = model_facts(
            self._model_section(), self._tokenizer.vocab_size if self._tokenizer else 1
        )
        if self._tokenizer and self._tokenizer.vocab_size > self._model.config.vocab_size:
            raise ConfigError(
                f"the tokenizer has {self._tokenizer.vocab_size} tokens and the model {self._model.config.vocab_size} rows; "
                "set data.tokenizer to the model's own."
            )
        return self._model.describe()

    def verifier(self) -> str:
        """A right answer passes and a wrong one does not, through the worker processes."""
        from infir2.verify import check_math

        start = time.perf_counter()
        right, wrong = (
            check_math(r"\boxed{\sqrt{8}}", r"2\sqrt{2}"),
            check_math(r"\boxed{\sqrt{8}}", r"3\sqrt{2}"),
        )
        if not right.correct or wrong.correct:
            raise ConfigError(
                f"the answer checker does not work here ({right.reason}, {wrong.reason}: {right.detail})."
            )
        return f"a right and a wrong answer are told apart ({time.perf_counter() - start:.1f} s with the start of a worker)"

    def jail(self) -> str:
        """In the jail an honest program passes, a cheat and an endless loop do not. Only rewards for programs need one."""
        from infir2.verify import JailError, Limits, run_code

        tests = [{"fn_name": "double", "args": [4], "expected": 8}]
        honest, cheat, loop = "return 2 * x", "import os; os._exit(0)", "while True: pass"
        start = time.perf_counter()
        try:
            found = [
                run_code(f"def double(x):\n    {body}", tests, Limits(seconds=1.0)).reason
                for body in (honest, cheat, loop)
            ]
        except JailError as error:
            return f"warn: {error}"
        if found[0] != "ok" or found[1] == "ok" or found[2] != "timeout":
            raise ConfigError(
                f"the jail does not work here: an honest program gave {found[0]}, a cheat {found[1]}, a loop {found[2]}."
            )
        return f"honest {found[0]}, cheat {found[1]}, endless loop {found[2]} ({time.perf_counter() - start:.1f} s)"

    def engine(self) -> str:
        """The engine's model is there, in the trainer's scale format and shape."""
        from infir2.preflight.model import check_engine

        return check_engine(self.recipe, self._known_model())

    def parallel(self) -> str:
        """Whether the model and the steps can be divided as `[parallel]` says."""
        from infir2.parallel.mesh import Sizes, check_model
        from infir2.preflight.model import idle_ranks, sizes_of
        from infir2.train.supervisor import check_optimizer, needs_one_process

        section = self.recipe.parallel
        fixed = Sizes(section.dp_replicate, max(1, section.dp), section.cp, section.tp)
        check_optimizer(self.recipe, fixed)
        check_model(fixed, self._known_model().config, self.recipe.fp8.enabled)
        self._sizes = sizes_of(self.recipe)
        number = f"a multiple of {fixed.world}" if section.dp == -1 else str(fixed.world)
        single_process = section.dp != -1 or needs_one_process(self.recipe.optimizer)
        text = (
            f"for {number} processes"
            if fixed.world > 1
            else "for one process"
            if single_process
            else "for any number of processes"
        )
        doubts = idle_ranks(self.recipe, self._sizes)
        return f"warn: {text}; {doubts}" if doubts else text

    def memory(self) -> str:
        """An estimate of the peak against what the device has."""
        from infir2.preflight.model import check_memory

        if self._sizes is None:
            raise _NotTriedError("needs sizes that work")
        return check_memory(self.recipe, self._known_model(), self._sizes)

    def run_dir(self) -> str:
        """Writable, renames work, no other job in it; what a resumed run would go on from."""
        from infir2.checkpoint.lock import RunLock
        from infir2.train.supervisor import resume_changes

        path = Path(self.recipe.run.dir)
        if not path.exists():
            return f"{path} is new, {_try_rename(_existing_parent(path))}"
        warnings: list[str] = []
        _try_rename(path)
        RunLock.acquire(path, warnings.append).release()
        newest = self._newest(warnings.append)
        warnings += resume_changes(self.loaded)
        found = (
            f"{path} resumes after step {newest.step}"
            if newest
            else f"{path} has no checkpoint yet"
        )
        return f"warn: {found}; {'; '.join(warnings)}" if warnings else found

    def disk(self) -> str:
        """Room for the kept checkpoints and the one being written."""
        from infir2.preflight.model import check_disk

        return check_disk(
            self.recipe, self._known_model(), _existing_parent(Path(self.recipe.run.dir))
        )

    def machine(self) -> str:
        """Cores, open files, versions of what computes."""
        import resource
        from importlib.metadata import version

        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if 0 <= soft < MIN_OPEN_FILES:
            return f"warn: only {soft} open files are allowed; run `ulimit -n {MIN_OPEN_FILES}` before a large run."
        versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
        return f"{os.cpu_count()} cores, {soft} open files, {versions}"

    def _newest(self, warn: Callable[[str], None]) -> "Checkpoint | None":
        """What the run directory would go on from; its tensors are not read."""
        from infir2.checkpoint.store import CHECKPOINTS, newest_checkpoint

        return newest_checkpoint(Path(self.recipe.run.dir) / CHECKPOINTS, warn, glance=True)

    def _model_section(self) -> "ModelSection":
        """What a run builds its model from: a checkpoint of its own, if there is one."""
        from infir2.train.build import resumed_model

        return (
            self.recipe.model
            if self.verb == "eval"
            else resumed_model(self.recipe.model, self._newest(lambda _: None))
        )

    def _known_model(self) -> "ModelFacts":
        if self._model is None:
            raise _NotTriedError("needs the model")
        return self._model


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())


def _try_rename(directory: Path) -> str:
    """Publishes a directory as checkpoints are published: written under another name, then renamed."""
    try:
        with tempfile.TemporaryDirectory(prefix=".infir2-check-", dir=directory) as place:
            Path(place, "new").mkdir()
            Path(place, "new", "file").write_text("x")
            Path(place, "new").rename(Path(place, "published"))
    except OSError as error:
        raise ConfigError(
            f"run.dir: {directory} cannot be written to ({error.strerror}); choose another run.dir."
        ) from None
    return f"{directory} can be written to"
