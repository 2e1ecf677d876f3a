"""`infir2 cpt` and `infir2 sft`: the loop around the trainer's step.

recipe -> Supervisor (run directory, newest checkpoint) -> tokenizer -> Loader (packed batches)
-> Decoder -> Trainer -> per step: batches -> Trainer.step -> Supervisor.finish_step
"""

import os
import time
from collections.abc import Sequence
from datetime import date
from typing import Any

from infir2.config.load import Loaded
from infir2.config.schema import RlRecipe
from infir2.data import Batch, ChatTokenizer, Loader, TrainingKind, validation_batches
from infir2.data.streams import State
from infir2.errors import CheckpointCorruptError
from infir2.model.block_graphs import graphs_are_tested_on
from infir2.parallel.parallel_model import ParallelModel
from infir2.terminal import begin_phase
from infir2.train.build import build_model, open_tokenizer
from infir2.train.losses import next_token_loss
from infir2.train.observer import observe
from infir2.train.plan import (
    check_branch,
    check_positions,
    complete_schedule,
    last_step_of,
    planned_config,
    require_masters,
    uses_graphs,
)
from infir2.train.schedules import learning_rate
from infir2.train.supervisor import Supervisor
from infir2.train.trainer import StepResult, Trainer

DATA_KIND: dict[str, TrainingKind] = {"cpt": "documents", "sft": "messages"}


def run_training(loaded: Loaded, kind: str) -> None:
    """Train to the end of the schedule, from the newest checkpoint of `run.dir` if there is one."""
    with Supervisor(loaded, kind) as supervisor:
        recipe = supervisor.recipe
        tokenizer = open_run_tokenizer(supervisor)
        model_config = planned_config(supervisor.model)
        check_positions(model_config, "data.sequence_tokens", recipe.data.sequence_tokens)
        rank, size = supervisor.layout.data_rank, supervisor.layout.sizes.num_data
        quarantine = supervisor.dir / "quarantine.jsonl" if supervisor.ranks.is_rank0 else None
        data = (recipe.data, DATA_KIND[kind], tokenizer)
        begin_phase("reading the data")
        loader = Loader(*data, recipe.run.seed, rank, size, quarantine=quarantine)
        validation = validation_batches(*data, recipe.train.validation_batches, rank, size)
        trainer = make_trainer(supervisor, tokenizer.vocab_size)
        schedule = complete_schedule(recipe, loader.steps_per_epoch)
        if supervisor.checkpoint and supervisor.is_branch:
            check_branch(schedule, supervisor.checkpoint.step)  # total_steps from epochs, too
        last_step = last_step_of(recipe, schedule)
        finished = supervisor.start(trainer, last_step)
        restore_loader(loader, supervisor, loaded.accept_changes)
        supervisor.begin_steps()
        description = describe_model(trainer, supervisor, tokenizer)
        supervisor.validate(finished, last_step, validation)
        for step in range(finished + 1, last_step + 1):
            supervisor.heartbeat(f"step {step}")
            batches = loader.next_step()
            _observe_if_due(step, trainer, batches, supervisor)
            metrics, result = _timed_step(trainer, batches, learning_rate(schedule, step))
            state = description | {"loader": loader.state_dict()}
            supervisor.finish_step(step, step == last_step, result, metrics, state, batches)
            supervisor.validate(step, last_step, validation)
        if loader.quarantined:
            detail = f"{loader.quarantined}; {supervisor.dir}/quarantine.jsonl names each"
            supervisor.log.event(last_step, "quarantined_rows", detail)


def make_trainer(supervisor: Supervisor, vocab_size: int) -> Trainer:
    """The recipe's model, sharded over the supervisor's ranks, and its optimizer."""
    recipe, resumed = supervisor.recipe, supervisor.checkpoint is not None
    require_masters(supervisor.model)
    model = build_model(supervisor.model, recipe.fp8, recipe.run, vocab_size, resumed)
    gathers = recipe.parallel
    parallel_model = ParallelModel(
        model, supervisor.layout, gathers.reshard_after_forward, gathers.blocks_per_gather
    )
    graphs = uses_graphs(recipe, supervisor.layout.sizes, model.config.num_parameters)
    if recipe.train.cuda_graphs == "auto":
        graphs = graphs and graphs_are_tested_on(supervisor.layout.device)
    graph_tokens = recipe.data.micro_batch_tokens if graphs else 0
    return Trainer(
        model, recipe.optimizer, recipe.train.loss_chunk_tokens, parallel_model, graph_tokens
    )


def open_run_tokenizer(supervisor: Supervisor) -> ChatTokenizer:
    """The run's tokenizer, with the same date on every rank."""
    today = supervisor.ranks.broadcast_from_rank0(lambda: date.today().isoformat())
    recipe = supervisor.recipe
    options = recipe.rl.template_options if isinstance(recipe, RlRecipe) else ()
    return open_tokenizer(supervisor.model, recipe.data, today, options)


def describe_model(
    trainer: Trainer, supervisor: Supervisor, tokenizer: ChatTokenizer
) -> dict[str, Any]:
    """What a checkpoint's state says about its model, for export and for later stages."""
    return {
        "model_config": trainer.model.config.to_hf(),
        "tokenizer_dir": str(tokenizer.directory),
        "tokenizer_fingerprint": tokenizer.fingerprint(),
        "template_date": tokenizer.today,
        "working_dir": os.getcwd(),  # where a relative path of the tokenizer starts
        "fp8": supervisor.recipe.fp8.model_dump(),
    }


def restore_loader(loader: Loader, supervisor: Supervisor, accept_changes: bool) -> None:
    """Continue the data where the checkpoint of the same kind stopped.

    Other data or another seed starts from its beginning, which a run that branches may have and
    one that resumes needs --accept-changes for.
    """
    checkpoint = supervisor.checkpoint
    if checkpoint is None:
        _warn_about_few_rows(loader, supervisor)
    elif checkpoint.value("kind", str) == supervisor.kind:
        saved, current = checkpoint.value("loader", dict), loader.state_dict()
        is_whole = _form(saved) == _form(current)
        changed = any(saved.get(name) != current[name] for name in ("kind", "seed", "rows"))
        if (changed or not is_whole) and (accept_changes or supervisor.is_branch):
            detail = "the data or its seed is not that of the checkpoint"
            supervisor.log.event(supervisor.saved_step, "data_from_its_start", detail)
        elif not is_whole:
            raise CheckpointCorruptError(
                f"{checkpoint.path}: its state has no position in such data; go back to an older "
                "checkpoint, or start the data again with --accept-changes."
            )
        else:
            loader.load_state_dict(saved)


def _form(state: State) -> Any:
    """Names and types of a loader's state, except for the reasons of its unusable rows."""
    counts, place = state.get("quarantined"), state.get("place")
    if not isinstance(counts, dict) or not all(isinstance(each, dict) for each in counts.values()):
        return None
    if not isinstance(place, dict) or not all(type(x) is int and x >= 0 for x in place.values()):
        return None
    return sorted(place), {name: type(value) for name, value in state.items()}


def _warn_about_few_rows(loader: Loader, supervisor: Supervisor) -> None:
    batch_samples = supervisor.recipe.data.batch_samples
    if loader.num_rows < batch_samples:
        supervisor.log.event(
            0,
            "few_rows",
            f"{loader.num_rows} rows for data.batch_samples = {batch_samples}: "
            "a step uses rows more than once",
        )


def _observe_if_due(
    step: int, trainer: Trainer, batches: Sequence[Batch], supervisor: Supervisor
) -> None:
    recipe = supervisor.recipe
    if recipe.train.observe_every and step % recipe.train.observe_every == 0:
        options = (recipe.fp8.scale_format, recipe.train.loss_chunk_tokens)
        supervisor.log.write_operands(step, observe(trainer.model, batches, *options))


def _timed_step(
    trainer: Trainer, batches: Sequence[Batch], rate: float
) -> tuple[dict[str, Any], StepResult]:
    """One optimizer step and its line of metrics.jsonl."""
    start = time.monotonic()
    result = trainer.step(batches, next_token_loss, rate)
    seconds = time.monotonic() - start
    metrics = {
        "loss": result.loss,
        "learning_rate": rate,
        "gradient_norm": result.gradient_norm,
        "trained_tokens": result.trained_tokens,
        "tokens_per_second": result.tokens / seconds,
        "seconds": seconds,
        "skipped": result.skipped,
        "nonfinite_blocks": result.nonfinite_blocks,
    }
    return metrics, result
