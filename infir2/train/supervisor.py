"""What every run has, whatever it trains: a run directory with one owner, its record, its checkpoints, its orderly end."""

import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch

from infir2 import __version__
from infir2.checkpoint import Checkpoint, Store, open_checkpoint
from infir2.checkpoint.background import BackgroundSaver
from infir2.checkpoint.record import MetricsWriter
from infir2.checkpoint.store import CHECKPOINTS, published_steps
from infir2.config.load import Loaded
from infir2.config.resume import check_resume, dump
from infir2.config.schema import OptimizerSection, TrainRecipe
from infir2.data import Batch
from infir2.errors import (
    CheckFailedError,
    CheckpointError,
    ConfigError,
    Interrupted,
    NonFiniteError,
    Preempted,
    RankError,
    UserError,
)
from infir2.faults import fault
from infir2.files import disk_errors, write_atomically
from infir2.parallel.mesh import Layout, Sizes, check_model, plan_sizes
from infir2.parallel.ranks import init_ranks, shutdown_ranks
from infir2.parallel.watchdog import Watchdog
from infir2.processes import StopSignals
from infir2.terminal import StepProgress, log
from infir2.train.build import device_of, planned_config, resumed_model
from infir2.train.spikes import PATIENCE, SpikeMonitor
from infir2.train.trainer import StepResult, Trainer

Value = TypeVar("Value")
_PARENT_VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "CUDA_VISIBLE_DEVICES")


class _Silent:
    """Stands for the writer and the progress bar on ranks that show nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **values: None


SILENT: Any = _Silent()


class Session:
    """The run directory while a command works in it, on one process or several.

    `with Session(loaded, "cpt") as session:` takes the directory's lock and finds the newest good checkpoint; `model` is then the
    section to build and to tokenise with; `finish_step` logs, saves when due, and raises at a stop signal. Of several processes,
    rank 0 alone locks, logs and decides; every one calls every method at the same point.
    Raises ConfigError before any process group starts when sizes in `[parallel]` cannot work or the run is a different one.
    """

    def __init__(self, loaded: Loaded, kind: str) -> None:
        recipe = loaded.recipe
        assert isinstance(recipe, TrainRecipe)
        if not recipe.run.dir:
            raise ConfigError(
                "run.dir is empty: name the directory for this run's checkpoints and metrics"
            )
        self.recipe, self.kind, self.dir = recipe, kind, Path(recipe.run.dir)
        self._loaded = loaded
        if recipe.run.threads:
            torch.set_num_threads(recipe.run.threads)
        self._changes = resume_changes(loaded)
        self._sizes = plan_sizes(recipe.parallel, int(os.environ.get("WORLD_SIZE", "1")))
        check_optimizer(recipe, self._sizes)
        if self._sizes.tp > 1:
            check_model(self._sizes, planned_config(recipe.model), recipe.fp8.enabled)
        self._agreed_signal: int | None = None
        self._failures_in_a_row = 0
        self.saved_step = 0  # of the newest checkpoint
        self._last: tuple[int, dict[str, Any]] = (0, {})  # the last step done, and its state
        self._saver: BackgroundSaver | None = None
        self._saving: tuple[int, float, Future[float]] | None = (
            None  # step, when it began, when it was published
        )

    def __enter__(self) -> "Session":
        self.signals = StopSignals().__enter__()
        device, timeout = device_of(self.recipe.run), self.recipe.parallel.timeout_seconds
        self.ranks = init_ranks(device, timeout)
        self.watch = Watchdog(self.ranks.rank, timeout) if self.ranks.size > 1 else None
        self.layout = Layout(self._sizes, self.ranks, device)
        own_channel = (
            self.ranks.with_new_group()
        )  # a save in the background talks while training does
        self.store = self.ranks.raise_together(
            lambda: Store(self.dir, self.recipe.checkpoint.keep, self._warn, own_channel)
        )
        try:
            self.checkpoint = self.ranks.broadcast_from_rank0(self._starting_point)
            self.model = resumed_model(self.recipe.model, self.checkpoint)
            self.saved_step = self.checkpoint.step if self.checkpoint else 0
            self._last = (self.saved_step, {})
            self.metrics: Any = SILENT
            self._validated, losses = self.ranks.broadcast_from_rank0(self._open_record)
        except BaseException:
            self.store.close()
            self.signals.__exit__()
            raise
        self._spikes = SpikeMonitor()
        for loss in losses:
            self._spikes.add(loss)
        return self

    def start(self, trainer: Trainer, total_steps: int) -> int:
        """Load the checkpoint, if there is one, into the trainer. Returns the last step done."""
        self.trainer = trainer
        torch.manual_seed(self.recipe.run.seed)
        done = 0
        if self.checkpoint:
            tensors = self.checkpoint.tensors()
            trainer.load_tensors(tensors)
            torch.set_rng_state(tensors["rng/torch"])
            done = self.checkpoint.step
        self.progress = (
            StepProgress(self.kind, total_steps, done) if self.ranks.is_rank0 else SILENT
        )
        self.store.shard_specs = trainer.shard_specs()
        trainer.pending_signal = lambda: self.signals.received
        self.beat("the first step")
        if self.checkpoint:
            self.progress.log(f"resumed from {self.checkpoint.path} (step {done})")
        if self.recipe.checkpoint.background:
            self._saver = BackgroundSaver(self.store.save)
            trainer.before_update = self._saver.await_copy
        self.ranks.broadcast_from_rank0(self._write_description)
        fault("train.start")
        self.stop_if_asked()
        return done

    def validate(self, step: int, last_step: int, batches: Sequence[Batch]) -> None:
        """Log the validation loss before the first step, every `train.validate_every` steps and at the end, unless it is there."""
        every = self.recipe.train.validate_every
        if (
            batches
            and every
            and (step % every == 0 or step == last_step)
            and step not in self._validated
        ):
            self.beat(f"the validation after step {step}")
            self.metrics.write(
                "validation", step, validation_loss=self.trainer.mean_loss(self._heard(batches))
            )

    def _heard(self, batches: Sequence[Batch]) -> Any:
        """Iterates over the batches; between them a stop signal to any rank ends all."""
        for batch in batches:
            fault("validate")
            self.beat()
            self._agreed_signal = next(
                filter(None, self.ranks.all_gather(self.signals.received)), None
            )
            self.stop_if_asked()
            yield batch

    def finish_step(
        self,
        step: int,
        last: bool,
        result: StepResult,
        line: dict[str, Any],
        state: dict[str, Any],
        batches: Sequence[Batch] = (),
    ) -> None:
        """Log the step, count skipped ones, save when due, stop when asked to. `batches`: to name rows that made a loss non-finite."""
        self._last = (step, state)
        self._agreed_signal = result.signal
        self.beat(f"the end of step {step}")
        if step % self.recipe.train.log_every == 0 or last or result.skipped:
            self.metrics.write("train", step, **line)
        rate = f"loss {line['loss']:.4f} {line['tokens_per_second']:,.0f} tokens/s"
        self.progress.update(step, rate)
        self._count_skipped(step, result, batches)
        self._watch(step, result)
        if self.ranks.size == 1:  # several ranks hear of a failed save together, at the next one
            self._settle(wait=False)
        if step % self.recipe.checkpoint.save_every == 0 or last:
            self.save(step, state)
        if last:
            self._settle()
            if self.saved_step != step:
                raise CheckpointError(
                    f"{self.dir}: its last step, {step}, could not be saved, and the newest checkpoint is step {self.saved_step}; "
                    "make room, then run the same command again"
                ).on_all_ranks()
        else:
            self.stop_if_asked()

    def stop_if_asked(self) -> None:
        """After SIGTERM or Ctrl-C: save the last step done and raise. Callable wherever no parameter has changed since then."""
        if (self.signals.received if self.ranks.size == 1 else self._agreed_signal) is None:
            return
        self.signals.received = self._agreed_signal or self.signals.received
        step, state = self._last
        self._settle()
        if step > self.saved_step:
            self.save(step, state)
            self._settle()
        begun = (
            self.checkpoint
        )  # that of another run, where this one branched and has saved nothing yet
        where = begun.path.parents[1] if begun and begun.step == self.saved_step else self.dir
        raise self.signals.error(
            f"step {self.saved_step} is saved in {where}"
            if self.saved_step
            else "there was nothing to save yet"
        )

    def divided(self, work: Callable[[Callable[[], None]], Value]) -> list[Value]:
        """`work(check)` of every rank, by rank, on every rank, however long each takes; no parameter changes in it.

        It calls `check()` often: a sign of life, and where a stop signal ends the work and then the run.
        """

        def check() -> None:
            self.beat()
            if self.signals.received is not None:
                raise self.signals.error("in the middle of a step")

        try:
            return self.ranks.all_gather(self.ranks.raise_together(lambda: work(check), self.beat))
        except (Preempted, Interrupted) as stop:
            self._agreed_signal = signal.SIGTERM if isinstance(stop, Preempted) else signal.SIGINT
            self.stop_if_asked()
            raise

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Begin a checkpoint, after the one before is there; without `checkpoint.background`, finish it too.

        So a kill loses the steps since the newest published checkpoint: one interval, and what was done while a save was in flight.
        """
        self._settle()
        began = time.monotonic()
        tensors = self.trainer.tensors() | {"rng/torch": torch.get_rng_state()}
        if self._saver:
            self._saving = (
                step,
                began,
                self._saver.start(step, tensors, state | {"kind": self.kind}),
            )
            return
        done: Future[float] = Future()
        self._saving = (step, began, done)
        try:
            self.store.save(step, tensors, state | {"kind": self.kind})
            done.set_result(time.monotonic())
        except CheckpointError as error:
            done.set_exception(error)
        self._settle()

    def _settle(self, wait: bool = True) -> None:
        """The end of the save in flight. With on_save_error = warn, a failed one is an event and training goes on."""
        if self._saving is None or not (wait or self._saving[-1].done()):
            return
        (step, began, future), self._saving = self._saving, None
        try:
            self.metrics.write("save", step, seconds=future.result() - began)
            self.saved_step = step
        except CheckpointError as error:
            if self.recipe.checkpoint.on_save_error == "stop":
                raise
            self.event(step, "save_failed", str(error))

    def event(self, step: int, name: str, detail: str) -> None:
        self.metrics.write("event", step, event=name, detail=detail)
        self.progress.log(f"step {step}: {name}: {detail}")

    def beat(self, phase: str = "") -> None:
        """A sign of life of this rank, and what begins."""
        if self.watch:
            self.watch.heartbeat(phase or self.watch.phase)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._close(error)
        finally:
            self.signals.__exit__()

    def _close(self, error: BaseException | None) -> None:
        if self._saver:
            self._saver.close()
        if self._saving and (
            failure := self._saving[-1].exception()
        ):  # another error ends the run: this one is only told
            log(str(failure), self.kind)
        if hasattr(self, "progress"):
            self.progress.close()
        self.metrics.close()
        self.store.close()
        if self.watch:
            self.watch.close()
            if error is not None and not isinstance(error, UserError | KeyboardInterrupt):
                traceback.print_exception(error)
                raise RankError(
                    f"rank {self.ranks.rank} failed in {self.watch.phase}: {type(error).__name__}, see above"
                ) from error
        if error is None:
            shutdown_ranks()

    def _warn(self, text: str) -> None:
        if self.ranks.is_rank0:
            log(text, self.kind)

    def _watch(self, step: int, result: StepResult) -> None:
        """Spikes of a loss that has a level; a policy loss swings around 0."""
        if self.kind == "rl" or not math.isfinite(result.loss):
            return
        in_a_row = self._spikes.add(result.loss)
        if in_a_row in (1, PATIENCE):
            self.event(
                step,
                "loss_spike",
                f"loss {result.loss:.4g}, mean before {self._spikes.mean:.4g}, {in_a_row} in a row",
            )
        if in_a_row >= PATIENCE and self.recipe.train.on_spike == "stop":
            raise CheckFailedError(
                f"stopped at step {step}: the loss was over twice its mean {in_a_row} steps in a row; "
                f"the newest checkpoint is step {self.saved_step}; go on from it or an older one with other data or a lower rate"
            )

    def _count_skipped(self, step: int, result: StepResult, batches: Sequence[Batch]) -> None:
        if not result.skipped:
            self._failures_in_a_row = 0
            return
        if result.trained_tokens == 0:
            self.event(
                step, "nothing_to_train", "the step had no trained token; no parameter changed"
            )
            return
        self._failures_in_a_row += 1
        mine = [
            origin for batch in batches for origin in batch.origins
        ]  # ranks do not know which of them had it
        rows = ", ".join(
            dict.fromkeys(origin for part in self.ranks.all_gather(mine) for origin in part)
        )
        self.event(
            step,
            "non_finite",
            f"loss {result.loss}, gradient norm {result.gradient_norm}; no parameter changed; rows {rows}",
        )
        if self._failures_in_a_row >= self.recipe.train.max_nonfinite_steps:
            raise NonFiniteError(
                f"stopped at step {step}: loss or gradient was not finite {self._failures_in_a_row} steps in a row; "
                f"{self.dir}/metrics.jsonl names them, the newest checkpoint is step {self.saved_step}"
            ).on_all_ranks()

    def _starting_point(self) -> Checkpoint | None:
        for line in self._changes:
            self._warn(line)
        source = self.recipe.checkpoint.branch_from
        return self.store.newest() or (open_checkpoint(source) if source else None)

    def _open_record(self) -> tuple[set[int], list[float]]:
        """Steps whose validation is recorded, and the losses so far."""
        self.metrics = MetricsWriter(self.dir, self.saved_step)
        validated = {step for step, _ in self.metrics.values("validation", "validation_loss")}
        return validated, [loss for _, loss in self.metrics.values("train", "loss")]

    def _write_description(self) -> None:
        """Once nothing can refuse this command any more: what is written here, the next one is compared with."""
        contents = {
            "recipe.toml": dump(self._loaded),
            "environment.json": json.dumps(describe_environment(), indent=1) + "\n",
        }
        for name, text in contents.items():
            with disk_errors(f"{self.dir / name}: cannot be written"):
                write_atomically(self.dir / name, text.encode())


def resume_changes(loaded: Loaded) -> list[str]:
    """`check_resume` of a run directory that has checkpoints; of another nothing. Reads one small file."""
    run_dir = Path(loaded.recipe.run.dir)
    return (
        check_resume(loaded, run_dir / "recipe.toml")
        if published_steps(run_dir / CHECKPOINTS)
        else []
    )


def needs_one_process(section: OptimizerSection) -> bool:
    """8-bit moments, whose scales lie across shards, and BF16 gradients, which ranks sum in FP32."""
    return section.moment_dtype == "fp8" or section.grad_dtype == "bf16"


def check_optimizer(recipe: TrainRecipe, sizes: Sizes) -> None:
    """ConfigError for what several processes cannot do, before any of them starts."""
    if sizes.world > 1 and needs_one_process(recipe.optimizer):
        raise ConfigError(
            f'optimizer.moment_dtype = "fp8" and optimizer.grad_dtype = "bf16" need one process, not {sizes.world}; '
            'take optimizer.moment_dtype = "bf16" and optimizer.grad_dtype = "fp32", or optimizer.offload = true'
        )


def describe_environment() -> dict[str, Any]:
    """Software and machine of this process, for environment.json."""
    return {
        "infir2": __version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "command": sys.argv,
        "variables": {name: os.environ[name] for name in _PARENT_VARIABLES if name in os.environ},
    }


def _commit() -> str:
    """The checkout's commit; empty where there is no git or no checkout."""
    if shutil.which("git") is None:
        return ""
    here = Path(__file__).parent
    return subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=here
    ).stdout.strip()
