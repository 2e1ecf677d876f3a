"""What every training run has around its steps: processes, run directory, log, checkpoints, stop.

    with Supervisor(loaded, "cpt") as supervisor:     # locks run.dir, finds the newest checkpoint
        model = build_model(supervisor.model, ...)    # the recipe's model, or the checkpoint's
        first = supervisor.start(trainer, last_step)  # loads the checkpoint into the trainer
        supervisor.begin_steps()                      # describes the run in its directory
        for step in range(first + 1, last_step + 1):
            result = trainer.step(...)
            supervisor.finish_step(step, ...)         # logs, saves when due, stops on a signal

With several processes rank 0 alone locks, logs and decides; every rank calls every method at the
same point.
"""

import json
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch

from infir2.checkpoint import Checkpoint, Store, open_checkpoint
from infir2.checkpoint.environment import describe_environment
from infir2.config.keys import flatten
from infir2.config.load import Loaded
from infir2.config.resume import dump
from infir2.config.schema import ModelSection, TrainRecipe
from infir2.data import Batch
from infir2.errors import (
    CheckpointError,
    ConfigError,
    Interrupted,
    Preempted,
    RankError,
    UserError,
)
from infir2.faults import fault
from infir2.files import disk_errors, write_atomically
from infir2.parallel.mesh import Layout, Sizes, check_model, plan_sizes
from infir2.parallel.ranks import Ranks, init_ranks, shutdown_ranks
from infir2.parallel.watchdog import Watchdog
from infir2.processes import process_signals, stop_error
from infir2.terminal import begin_phase
from infir2.train.banner import start_banner
from infir2.train.fast_path import missing_libraries
from infir2.train.plan import (
    check_branch,
    check_graphs,
    check_observer,
    check_optimizer,
    device_of,
    planned_config,
    resume_changes,
    resumed_model,
    set_up_torch,
)
from infir2.train.run_log import RunLog, peak_memory_bytes
from infir2.train.saver import Saver
from infir2.train.stop import StopFlag
from infir2.train.trackers import make_tracker
from infir2.train.trainer import StepResult, Trainer
from infir2.train.watches import SkipWatch, SpikeWatch

Value = TypeVar("Value")
Check = Callable[[], None]


class Supervisor:
    """Runs a training from its newest checkpoint to its orderly end.

    Raises ConfigError in the constructor, before any process group exists, when the sizes in
    `[parallel]` cannot work or the run directory belongs to a different run.
    """

    # Known from the recipe.
    recipe: TrainRecipe
    kind: str  # "cpt", "sft" or "rl"
    dir: Path

    # Set on entering: the processes and the run directory.
    ranks: Ranks
    layout: Layout
    store: Store
    checkpoint: Checkpoint | None  # where the run resumes or branches
    model: ModelSection  # what to build: the recipe's model, or the checkpoint
    log: RunLog
    stop: StopFlag
    saver: Saver

    # Set by `start`.
    trainer: Trainer

    def __init__(self, loaded: Loaded, kind: str) -> None:
        recipe = loaded.recipe
        assert isinstance(recipe, TrainRecipe)
        if not recipe.run.dir:
            raise ConfigError(
                "run.dir is empty: name the directory for this run's checkpoints and metrics"
            )
        self.recipe, self.kind, self.dir = recipe, kind, Path(recipe.run.dir)
        self._loaded = loaded
        self._changes = resume_changes(loaded)
        self._sizes = _checked_sizes(recipe)
        self._last_step: tuple[int, dict[str, Any]] = (0, {})  # the last finished step, its state
        self._validated_steps: set[int] = set()
        self._watchdog: Watchdog | None = None
        self._spikes: SpikeWatch | None = None  # a policy loss swings around 0: none in RL
        self._exit = ExitStack()

    @property
    def saved_step(self) -> int:
        """Step of the newest checkpoint."""
        return self.saver.saved_step

    @property
    def is_branch(self) -> bool:
        """Whether the run starts from the checkpoint of another run (checkpoint.branch_from)."""
        start = self.checkpoint
        return start is not None and start.path.resolve().parent.parent != self.dir.resolve()

    def __enter__(self) -> "Supervisor":
        section = self.recipe
        set_up_torch(section.run)
        with ExitStack() as undo:
            signals = undo.enter_context(process_signals.run())
            device, timeout = device_of(section.run), section.parallel.timeout_seconds
            self.ranks = init_ranks(device, timeout)
            self.stop = StopFlag(signals, self.ranks)
            self.log = RunLog(self.kind, self.ranks.is_rank0)
            if self.ranks.size > 1:
                self._watchdog = Watchdog(self.ranks.rank, timeout)
            self.layout = Layout(self._sizes, self.ranks, device)
            # A background save exchanges messages while training does: a group of its own.
            save_ranks = self.ranks.with_new_group()
            self.store = self.ranks.raise_together(
                lambda: Store(self.dir, section.checkpoint.keep, self.log.warn, save_ranks)
            )
            try:
                losses = self._find_start()
            except BaseException:
                self.store.close()
                raise
            self._exit = undo.pop_all()
        self._skips = SkipWatch(section.train, self.ranks, self.log)
        if self.kind != "rl":
            self._spikes = SpikeWatch(section.train.on_spike, self.log, losses)
        return self

    def _find_start(self) -> list[float]:
        """Find the checkpoint to start from and open the log. Returns the losses logged so far."""
        self.checkpoint = self.ranks.broadcast_from_rank0(self._newest_checkpoint)
        self.model = resumed_model(self.recipe.model, self.checkpoint)
        saved_step = self.checkpoint.step if self.checkpoint else 0
        section = self.recipe.checkpoint
        self.saver = Saver(self.store, section, self.kind, self.log, saved_step)
        self._last_step = (saved_step, {})

        def open_log() -> tuple[set[int], list[float]]:
            view = make_tracker(self.recipe.train.tracker, self.dir, flatten(self.recipe))
            self.log.open_files(self.dir, saved_step, view)
            validated = {step for step, _ in self.log.values("validation", "validation_loss")}
            return validated, [loss for _, loss in self.log.values("train", "loss")]

        self._validated_steps, losses = self.ranks.broadcast_from_rank0(open_log)
        return losses

    def _newest_checkpoint(self) -> Checkpoint | None:
        for line in self._changes:
            self.log.warn(line)
        branch = self.recipe.checkpoint.branch_from
        newest = self.store.newest()
        if newest is not None or not branch:
            return newest
        checkpoint = open_checkpoint(branch)
        check_branch(self.recipe.schedule, checkpoint.step, self.recipe.train.stop_after_step)
        return checkpoint

    def start(self, trainer: Trainer, total_steps: int) -> int:
        """Load the checkpoint, if any, into the trainer. Returns the last finished step."""
        self.trainer = trainer
        fp8, device = self.recipe.fp8, self.layout.device
        self.log.warn(start_banner(trainer.model.config, fp8, device, self._sizes))
        if slower := missing_libraries(device, fp8.enabled):
            self.log.warn(slower)
        torch.manual_seed(self.recipe.run.seed)
        finished = 0
        if self.checkpoint:
            tensors = self.checkpoint.tensors()
            trainer.load_tensors(tensors)
            torch.set_rng_state(tensors["rng/torch"])
            finished = self.checkpoint.step
        self.log.start_progress(total_steps, finished)
        trainer.pending_signal = lambda: self.stop.received
        self.heartbeat("the first step")
        if self.checkpoint and not self.is_finished(total_steps):
            self.log.message(f"resumed from {self.checkpoint.path} (step {finished})")
        self.saver.attach(trainer)
        return finished

    def is_finished(self, total_steps: int) -> bool:
        """Whether the last step is saved already, which is then said."""
        finished = self.checkpoint.step if self.checkpoint else 0
        if self.checkpoint is None or finished < total_steps:
            return False
        self.log.message(
            f"{self.dir} is finished: step {finished} of {total_steps} is saved. To train "
            "again, name another run.dir."
        )
        return True

    def begin_steps(self) -> None:
        """Describe the run in its directory: nothing refuses the command anymore."""
        self.ranks.broadcast_from_rank0(self._write_description)
        fault("train.start")
        self.stop_if_requested()

    def validate(self, step: int, last_step: int, batches: Sequence[Batch]) -> None:
        """Log the validation loss at step 0, every `train.validate_every` steps and at the end.

        A step whose validation is logged already is skipped.
        """
        every = self.recipe.train.validate_every
        is_due = every and (step % every == 0 or step == last_step)
        if batches and is_due and step not in self._validated_steps:
            self.heartbeat(f"the validation after step {step}")
            loss = self.trainer.mean_loss(self._interruptible(batches))
            self.log.write("validation", step, validation_loss=loss)

    def _interruptible(self, batches: Sequence[Batch]) -> Iterator[Batch]:
        """The batches; a stop signal on any rank ends all of them between two batches."""
        for batch in batches:
            fault("validate")
            self.heartbeat()
            self.stop.agree()
            self.stop_if_requested()
            yield batch

    def finish_step(
        self,
        step: int,
        is_last: bool,
        result: StepResult,
        metrics: dict[str, Any],
        state: dict[str, Any],
        batches: Sequence[Batch] = (),
    ) -> None:
        """Log the step, count a skipped one, save when due, stop on a signal.

        `state` is what a resumed run needs beside the tensors. `batches` name the rows of a step
        whose loss was not finite.
        """
        self._last_step = (step, state)
        self.stop.set(result.signal)
        self.heartbeat(f"the end of step {step}")
        if step % self.recipe.train.log_every == 0 or is_last or result.skipped:
            memory = peak_memory_bytes(self.layout.device)
            self.log.write("train", step, **metrics, peak_memory_bytes=memory)
        speed = f"{metrics['tokens_per_second']:,.0f} tokens/s"
        reward = f"reward {metrics['reward']:.3f} " if "reward" in metrics else ""
        self.log.update(step, f"{reward}loss {metrics['loss']:.4f} {speed}")
        self._skips.check(step, result, batches, self.saved_step)
        if self._spikes:
            self._spikes.check(step, result.loss, self.saved_step)
        if self.ranks.size == 1:  # several ranks learn of a failed save together, at the next one
            self.store.check_in_place()
            self.saver.finish_pending_save(wait=False)
        if step % self.recipe.checkpoint.save_every == 0 or is_last:
            self.saver.save(step, state)
        if is_last:
            self._finish_last_save(step)
        else:
            self.stop_if_requested()

    def _finish_last_save(self, step: int) -> None:
        self.saver.finish_pending_save()
        if self.saved_step != step:
            raise CheckpointError(
                f"{self.dir}: its last step, {step}, could not be saved, and the newest checkpoint "
                f"is step {self.saved_step}; free space, then run the same command again"
            ).on_all_ranks()
        self.log.message(f"finished: step {step} is saved in {self.dir}")

    def stop_if_requested(self) -> None:
        """After SIGTERM or Ctrl-C, save the last finished step and raise Preempted or Interrupted.

        May be called wherever no parameter has changed since that step.
        """
        number = self.stop.requested
        if number is None:
            return
        step, state = self._last_step
        self.saver.finish_pending_save()
        if step > self.saved_step:
            self.saver.save(step, state)
            self.saver.finish_pending_save()
        raise stop_error(number, self._stop_message())

    def _stop_message(self) -> str:
        if not self.saved_step:
            return (
                "Stopped before the first checkpoint; nothing was saved. "
                "Run the same command to start again."
            )
        start = self.checkpoint  # of another run, if this one branched and has saved nothing yet
        is_start = start is not None and start.step == self.saved_step
        directory = start.path.parents[1] if start and is_start else self.dir
        return (
            f"Stopped; step {self.saved_step} is saved in {directory}. "
            "Run the same command to resume."
        )

    def all_gather_results(self, work: Callable[[Check], Value]) -> list[Value]:
        """Run `work(check)` on every rank, however long each takes; return all results, by rank.

        `work` changes no parameter and calls `check()` often: it sends a heartbeat and raises
        after a stop signal, which then ends the run on all ranks.
        """

        def check() -> None:
            self.heartbeat()
            if self.stop.received is not None:
                raise stop_error(self.stop.received, "stopped in the middle of a step")

        try:
            result = self.ranks.raise_together(lambda: work(check), self.heartbeat)
            return self.ranks.all_gather(result)
        except (Preempted, Interrupted) as error:
            self.stop.set(signal.SIGTERM if isinstance(error, Preempted) else signal.SIGINT)
            self.stop_if_requested()
            raise

    def heartbeat(self, phase: str = "") -> None:
        """Tell the watchdog that this rank makes progress, and which phase begins."""
        if phase:
            begin_phase(phase)
        if self._watchdog:
            self._watchdog.heartbeat(phase or self._watchdog.phase)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._exit:  # restores the signal handlers last
            self.saver.close()
            self.log.close()
            self.store.close()
            if self._watchdog:
                self._watchdog.close()
                self._report_rank_error(error, self._watchdog.phase)
            if error is None:
                shutdown_ranks()

    def _report_rank_error(self, error: BaseException | None, phase: str) -> None:
        if error is None or isinstance(error, UserError | KeyboardInterrupt):
            return
        traceback.print_exception(error)
        name = type(error).__name__
        raise RankError(f"rank {self.ranks.rank} failed in {phase}: {name}, see above") from error

    def _write_description(self) -> None:
        """Write recipe.toml, with which the next start is compared, and environment.json."""
        self.store.check_in_place()
        contents = {
            "recipe.toml": dump(self._loaded),
            "environment.json": json.dumps(describe_environment(), indent=1) + "\n",
        }
        for name, text in contents.items():
            with disk_errors(f"{self.dir / name}: cannot be written"):
                write_atomically(self.dir / name, text.encode())


def _checked_sizes(recipe: TrainRecipe) -> Sizes:
    sizes = plan_sizes(recipe.parallel, int(os.environ.get("WORLD_SIZE", "1")))
    check_optimizer(recipe, sizes)
    check_observer(recipe, sizes)
    check_graphs(recipe, sizes)
    if sizes.tp > 1:
        check_model(sizes, planned_config(recipe.model), recipe.fp8.enabled)
    return sizes
