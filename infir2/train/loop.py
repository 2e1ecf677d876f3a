"""`infir2 cpt` and `infir2 sft`: the loop around the trainer's step."""

import math
import time
from collections.abc import Sequence
from typing import Any

from infir2.config.load import Loaded
from infir2.config.schema import ScheduleSection, TrainRecipe
from infir2.data import Batch, Loader, TrainingKind, validation_batches
from infir2.data.streams import State
from infir2.errors import ConfigError
from infir2.parallel.parallel_model import ParallelModel
from infir2.train.build import build_model, open_tokenizer
from infir2.train.losses import next_token_loss
from infir2.train.schedules import learning_rate
from infir2.train.supervisor import Session
from infir2.train.trainer import StepResult, Trainer

DATA_KIND: dict[str, TrainingKind] = {"cpt": "documents", "sft": "messages"}


def run_training(loaded: Loaded, kind: str) -> None:
    """Train to the end of the schedule, from the newest checkpoint of `run.dir` if there is one."""
    with Session(loaded, kind) as session:
        recipe = session.recipe
        tokenizer, tokenizer_dir = open_tokenizer(session.model, recipe.data.tokenizer)
        place = (session.layout.data_rank, session.layout.sizes.num_data)
        quarantine = session.dir / "quarantine.jsonl" if session.ranks.is_rank0 else None
        loader = Loader(
            recipe.data, DATA_KIND[kind], tokenizer, recipe.run.seed, *place, quarantine=quarantine
        )
        validation = validation_batches(
            recipe.data, DATA_KIND[kind], tokenizer, recipe.train.validation_batches, *place
        )
        model = build_model(
            session.model,
            recipe.fp8,
            recipe.run,
            tokenizer.vocab_size,
            resumed=session.checkpoint is not None,
        )
        trainer = Trainer(
            model,
            recipe.optimizer,
            recipe.train.loss_chunk_tokens,
            ParallelModel(model, session.layout),
        )
        schedule = complete_schedule(recipe, loader.steps_per_epoch)
        last_step = min(schedule.total_steps, recipe.train.stop_after_step or schedule.total_steps)
        done = session.start(trainer, last_step)
        if session.checkpoint and session.checkpoint.state["kind"] == kind:
            go_on(loader, session.checkpoint.state["loader"], session, loaded.accept_changes)
        description = {
            "model_config": model.config.to_hf(),
            "tokenizer_dir": str(tokenizer_dir),
            "fp8": recipe.fp8.model_dump(),
        }
        if not done and loader.num_rows < recipe.data.batch_samples:
            what = f"{loader.num_rows} rows for data.batch_samples = {recipe.data.batch_samples}: a step takes rows more than once"
            session.event(0, "few_rows", what)
        session.validate(done, last_step, validation)
        for step in range(done + 1, last_step + 1):
            session.beat(f"step {step}")
            batches = loader.next_step()
            line, result = _one_step(trainer, batches, learning_rate(schedule, step))
            state = description | {
                "loader": loader.state_dict(),
                "tokenizer_fingerprint": tokenizer.fingerprint(),
            }
            session.finish_step(step, step == last_step, result, line, state, batches)
            session.validate(step, last_step, validation)
        if loader.quarantined:
            session.event(
                last_step,
                "quarantined_rows",
                f"{loader.quarantined}; {session.dir}/quarantine.jsonl names each",
            )


def go_on(loader: Loader, saved: State, session: Session, accept_changes: bool) -> None:
    """Put the loader where the checkpoint's was, or with `--accept-changes` and other data or another seed at its beginning."""
    here = loader.state_dict()
    if accept_changes and any(saved[name] != here[name] for name in ("kind", "seed", "rows")):
        session.event(
            session.saved_step,
            "data_from_its_start",
            "the data or its seed was changed with --accept-changes",
        )
    else:
        loader.load_state_dict(saved)


def complete_schedule(recipe: TrainRecipe, steps_per_epoch: int | None) -> ScheduleSection:
    """The schedule with total_steps filled in from train.epochs where the recipe leaves it open."""
    schedule = recipe.schedule
    if schedule.total_steps:
        return schedule
    if not recipe.train.epochs or steps_per_epoch is None:
        raise ConfigError("schedule.total_steps is 0: set it, or train.epochs with finite data")
    return schedule.model_copy(
        update={"total_steps": max(1, math.ceil(recipe.train.epochs * steps_per_epoch))}
    )


def _one_step(
    trainer: Trainer, batches: Sequence[Batch], rate: float
) -> tuple[dict[str, Any], StepResult]:
    start = time.monotonic()
    result = trainer.step(batches, next_token_loss, rate)
    seconds = time.monotonic() - start
    line = {
        "loss": result.loss,
        "learning_rate": rate,
        "gradient_norm": result.gradient_norm,
        "trained_tokens": result.trained_tokens,
        "tokens_per_second": result.tokens / seconds,
        "seconds": seconds,
        "skipped": result.skipped,
        "nonfinite_blocks": result.nonfinite_blocks,
    }
    return line, result
