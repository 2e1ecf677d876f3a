"""The list of checks, and the state that one check passes to the next.

Later checks run even if earlier ones failed, so that one command shows everything to fix. Each
check imports what it needs when it runs: importing this module loads no torch.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infir2.config import Loaded
from infir2.config.keys import flatten
from infir2.config.schema import TrainRecipe
from infir2.config.usual import unusual_values
from infir2.errors import UserError
from infir2.preflight.finding import Finding, SkippedError
from infir2.terminal import begin_phase

if TYPE_CHECKING:
    from infir2.config.schema import ModelSection
    from infir2.data import ChatTokenizer
    from infir2.parallel.mesh import Sizes
    from infir2.preflight.model import ModelFacts

MIN_OPEN_FILES = 4096


class Preflight:
    """The checks of one recipe for one verb (cpt, sft, rl, eval).

    `kept` checks and describes the rollouts of an earlier run that RL goes on from; with
    `train_only` it trains on these, and reads no prompts and loads no engine.
    """

    def __init__(
        self,
        loaded: Loaded[Any],
        verb: str,
        kept: "Callable[[ChatTokenizer], str] | None" = None,
        train_only: bool = False,
    ) -> None:
        self.loaded, self.verb, self._kept, self._train_only = loaded, verb, kept, train_only
        # An RlRecipe in the checks of rl, an EvalRecipe in those of eval.
        self.recipe = loaded.recipe
        self._tokenizer: ChatTokenizer | None = None
        self._sizes: Sizes | None = None
        self._model: ModelFacts | None = None
        self._longest_prompts: dict[str, int] = {}  # tokens, as `check_sources` returns them

    def findings(self) -> Iterator[Finding]:
        """Run each check that applies and yield its finding; a UserError is a failed check."""
        for name, check in self.checks().items():
            begin_phase(f"checking {name}")
            try:
                finding = check()
            except SkippedError as error:
                finding = Finding(name, "skipped", str(error))
            except UserError as error:
                finding = Finding(name, "fail", str(error))
            assert finding.check == name
            yield finding

    def checks(self) -> dict[str, Callable[[], Finding]]:
        """{name: function} of each check that applies, in the order to run them."""
        checks = {"recipe": self.resolved, "tokenizer": self.tokenizer}
        if self._kept:
            checks |= {"rollouts": self.rollouts}
        if not self._train_only:
            checks |= {"data": self.data}
        checks |= {"model": self.model}
        if self.verb in ("rl", "eval") and not self._train_only:
            checks |= {"verifier": self.verifier, "jail": self.jail}
        if self.verb == "rl":
            checks |= {"objective": self.objective}
        if self.verb == "rl" and not self._train_only:
            checks |= {"engine": self.engine, "rewards": self.rewards}
        if self.verb == "eval":
            checks |= {"memory": self.evaluation_memory}
        else:
            checks |= {
                "parallel": self.parallel,
                "memory": self.memory,
                "run dir": self.run_dir,
                "disk": self.disk,
            }
        return checks | {"machine": self.machine}

    def resolved(self) -> Finding:
        """The recipe is already parsed; equal digests mean that two recipes have equal values.

        A warning if a value is possible but hardly meant.
        """
        if isinstance(self.recipe, TrainRecipe):
            from infir2.train.trackers import check_tracker

            check_tracker(self.recipe.train.tracker)
        values = flatten(self.recipe)
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
        origins = self.loaded.provenance.values()
        num_files = len({origin for origin in origins if origin.startswith("file:")})
        questions = list(unusual_values(values))
        detail = (
            f"infir2 {self.verb}, {len(origins)} keys from {num_files} files, "
            f"sha256 of the values {digest}"
        )
        return Finding("recipe", "warn" if questions else "ok", "; ".join([detail, *questions]))

    def tokenizer(self) -> Finding:
        """Files, chat template, prompts as prefixes of conversations, a trained end token."""
        from infir2.preflight.data import check_tokenizer
        from infir2.train.build import open_tokenizer

        data = self.recipe.data if isinstance(self.recipe, TrainRecipe) else None
        options = self.recipe.rl.template_options if self.verb == "rl" else ()
        self._tokenizer = open_tokenizer(self._model_section(), data, template_options=options)
        detail = check_tokenizer(self._tokenizer, self.verb)
        return Finding("tokenizer", "ok", f"{self._tokenizer.directory}: {detail}")

    def rollouts(self) -> Finding:
        """The rollouts that RL goes on from are there, and those of this recipe."""
        if self._tokenizer is None or self._kept is None:
            raise SkippedError("needs the tokenizer")
        return Finding("rollouts", "ok", self._kept(self._tokenizer))

    def data(self) -> Finding:
        """Rows of each source, read by the functions that training uses."""
        from infir2.preflight.data import check_sources

        if self._tokenizer is None:
            raise SkippedError("needs the tokenizer")
        finding, self._longest_prompts = check_sources(self.recipe, self.verb, self._tokenizer)
        return finding

    def model(self) -> Finding:
        """Every weight exists with the right shape, and positions suffice. Reads only headers.

        The finding names the FP8 layers that inference servers refuse; a run can train them.
        """
        from infir2.preflight.model import check_lengths, model_facts, serving_note
        from infir2.train.plan import check_vocabulary, require_masters

        vocab_size = self._tokenizer.vocab_size if self._tokenizer else 1
        self._model = model_facts(self._model_section(), vocab_size)
        if self.verb != "eval":
            require_masters(self._model_section())
        check_vocabulary(self._model.config, vocab_size)
        check_lengths(self.recipe, self._model.config, self._longest_prompts)
        return Finding("model", "ok", f"{self._model}{serving_note(self.recipe, self._model)}")

    def verifier(self) -> Finding:
        """A right answer passes and a wrong one does not, through the worker processes."""
        from infir2.preflight.verifiers import check_verifier

        return check_verifier()

    def jail(self) -> Finding:
        """Programs run in the jail; only rewards for programs need it."""
        from infir2.preflight.verifiers import check_jail

        return check_jail()

    def objective(self) -> Finding:
        """A loss of one's own can be imported, and the reference has the policy's shape."""
        from infir2.preflight.objective import check_objective

        return check_objective(self.recipe.rl, self._require_model().config)

    def engine(self) -> Finding:
        """The engine's model exists, with the trainer's scale format and shapes."""
        from infir2.preflight.model import check_engine

        return check_engine(self.recipe, self._require_model())

    def rewards(self) -> Finding:
        """What `rl.reward` and `rl.environment` name is there."""
        from infir2.preflight.rewards import check_rewards

        return check_rewards(self.recipe.rl)

    def parallel(self) -> Finding:
        """The model and the steps can be split as `[parallel]` says."""
        from infir2.preflight.parallel import check_parallel, sizes_of

        finding = check_parallel(self.recipe, self._model)
        self._sizes = sizes_of(self.recipe)
        return finding

    def memory(self) -> Finding:
        """An estimate of the peak memory fits the device."""
        from infir2.preflight.memory import check_memory

        if self._sizes is None:
            raise SkippedError("needs sizes that work")
        return check_memory(self.recipe, self._require_model(), self._sizes)

    def evaluation_memory(self) -> Finding:
        """The engine's weights and a response fit the device."""
        from infir2.preflight.memory import check_evaluation_memory

        longest = self._longest_prompts.get("evaluate.max_response_tokens", 0)
        return check_evaluation_memory(self.recipe, self._require_model(), longest)

    def run_dir(self) -> Finding:
        """The run directory is writable and free; the finding names what a run resumes from."""
        from infir2.preflight.run_dir import check_run_dir

        return check_run_dir(self.loaded)

    def disk(self) -> Finding:
        """The disk has room for the checkpoints."""
        from infir2.preflight.run_dir import check_disk

        return check_disk(self.recipe, self._require_model())

    def machine(self) -> Finding:
        """Cores, open files, versions of the libraries that compute."""
        import resource
        from importlib.metadata import version

        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if 0 <= soft < MIN_OPEN_FILES:
            detail = f"only {soft} open files are allowed; run `ulimit -n {MIN_OPEN_FILES}`"
            return Finding("machine", "warn", f"{detail} before a large run.")
        versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
        detail = f"{os.cpu_count()} cores, {soft} open files, {versions}"
        return Finding("machine", "ok", detail)

    def _model_section(self) -> "ModelSection":
        """The model that the run loads: its own newest checkpoint, if there is one."""
        from infir2.preflight.run_dir import newest_in
        from infir2.train.plan import resumed_model

        section: ModelSection = self.recipe.model
        if self.verb == "eval":
            return section
        return resumed_model(section, newest_in(Path(self.recipe.run.dir), lambda _: None))

    def _require_model(self) -> "ModelFacts":
        if self._model is None:
            raise SkippedError("needs the model")
        return self._model
