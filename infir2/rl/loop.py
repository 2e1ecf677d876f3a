"""`infir2 rl`: sample, reward, update the policy, publish the weights; one step after another.

How the data flows through a step:

    PromptStream: DrawnPrompt (prompt, token ids)                          prompts.py
    -> Engine: completions with rollout_logprobs, `group_size` per prompt  engines/
    -> rewards: Response (text, correct, reward); Group -> Journal         rewards.py, journal.py
    -> groups with right and wrong ones -> advantages -> packed Batch      groups.py
    -> trainer_logprobs, mismatch with the engine, importance -> Trainer.step     policy_update.py
    -> Supervisor.finish_step (log, checkpoint) -> publish to the engine   pipeline.py
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from infir2.checkpoint import Checkpoint
from infir2.config.load import Loaded
from infir2.config.schema import RlRecipe
from infir2.convert.serving import require_loadable, require_servable
from infir2.data import ChatTokenizer, load_prompts
from infir2.data.labels import labels_of
from infir2.engines.engine_weights import engine_fp8
from infir2.engines.http_client import require_urls
from infir2.engines.weight_sync import check_rollout_model, open_engine
from infir2.preflight.rewards import require_rewards
from infir2.rl.dynamic_sampling import GroupGenerator, Rollouts
from infir2.rl.evaluation import InLoopEvaluation
from infir2.rl.journal import Journal
from infir2.rl.kept_rollouts import (
    KeptRollouts,
    LastKept,
    last_kept,
    sampling_keys,
    sampling_origin,
    write_kept,
)
from infir2.rl.pipeline import RolloutPipeline
from infir2.rl.policy_loss import find_objective
from infir2.rl.policy_update import PolicyUpdate, open_policy_update
from infir2.rl.prompts import PromptStream
from infir2.rl.step_metrics import rollout_metrics
from infir2.terminal import begin_phase
from infir2.train.loop import describe_model, make_trainer, open_run_tokenizer
from infir2.train.plan import check_positions, last_step_of, planned_config
from infir2.train.schedules import learning_rate
from infir2.train.supervisor import Supervisor
from infir2.train.trainer import StepResult

SAMPLES_PER_STEP = 2  # responses written to samples.jsonl


def run_rl(loaded: Loaded[RlRecipe], rollout_only: bool = False) -> None:
    """Train to the last rollout step, from the newest checkpoint in `run.dir`.

    `rollout_only` samples all steps with the weights of the start, keeps them and trains nothing.
    """
    recipe = loaded.recipe
    rl, seed, last_step = recipe.rl, recipe.run.seed, last_step_of(recipe, recipe.schedule)
    evaluation = InLoopEvaluation(recipe)
    with Supervisor(loaded, "rl") as supervisor, ExitStack() as exit_stack:
        if not rollout_only and _has_nothing_left(supervisor, evaluation, last_step):
            return
        tokenizer = open_run_tokenizer(supervisor)
        _check_recipe(recipe)
        keys = sampling_keys(recipe, tokenizer.fingerprint())
        kept = None
        if rollout_only:
            kept = last_kept(supervisor.dir, keys, supervisor.ranks)
            kept.require(sampling_origin(recipe))
        prompts = _open_prompts(recipe, supervisor, tokenizer, kept)
        evaluation.check_positions(planned_config(supervisor.model), tokenizer)
        trainer = make_trainer(supervisor, tokenizer.vocab_size)
        update = open_policy_update(recipe, trainer)
        finished = supervisor.start(trainer, last_step)
        begin_phase("loading the engine")
        engine, digest = exit_stack.enter_context(
            open_engine(recipe, trainer.parallel_model, finished, tokenizer.decode)
        )
        supervisor.begin_steps()
        journal = Journal(supervisor.dir, supervisor.ranks, supervisor.store.check_in_place)
        generator = GroupGenerator(engine, tokenizer, rl, seed, journal, supervisor.ranks)
        _log_dropped(supervisor, prompts, finished)
        words = (recipe, prompts, generator, journal, engine, digest, supervisor)
        if kept is not None:
            with RolloutPipeline(*words, fixed_state=kept.state) as pipeline:
                origin = sampling_origin(recipe, digest)
                sample_steps(supervisor, tokenizer, pipeline, kept, origin)
            return

        def evaluate(step: int) -> None:
            pipeline.sync_weights(step)
            evaluation.run(engine, tokenizer, step, supervisor)

        with RolloutPipeline(*words) as pipeline:
            if evaluation.is_due(finished) and not _is_evaluated(supervisor, finished):
                evaluate(finished)
            for step in train_steps(supervisor, tokenizer, pipeline, update, finished):
                if evaluation.is_due(step):
                    evaluate(step)


def train_steps(
    supervisor: Supervisor,
    tokenizer: ChatTokenizer,
    pipeline: RolloutPipeline | KeptRollouts,
    update: PolicyUpdate,
    finished: int,
) -> Iterator[int]:
    """Train on the rollouts of the steps after `finished`; yields each step once it is finished."""
    recipe = update.recipe
    last_step = last_step_of(recipe, recipe.schedule)
    keys = sampling_keys(recipe, tokenizer.fingerprint())
    description = describe_model(update.trainer, supervisor, tokenizer)
    for step in range(finished + 1, last_step + 1):
        supervisor.heartbeat(f"step {step}")
        metrics, result, rollouts = _one_step(recipe, pipeline, update, step)
        supervisor.log.write_samples(_readable_samples(rollouts, step))
        if recipe.rl.keep_rollouts and supervisor.ranks.is_rank0:
            logprobs = update.kept_logprobs
            write_kept(supervisor.dir, step, rollouts, keys, logprobs, tokenizer.decode)
        state = description | pipeline.state
        supervisor.finish_step(step, step == last_step, result, metrics, state)
        yield step


def run_train_only(loaded: Loaded[RlRecipe], run_dir: str) -> None:
    """Train on the rollouts that the run in `run_dir` has kept, without an engine."""
    recipe = loaded.recipe
    last_step = last_step_of(recipe, recipe.schedule)
    with Supervisor(loaded, "rl") as supervisor:
        if supervisor.is_finished(last_step):
            return
        tokenizer = open_run_tokenizer(supervisor)
        find_objective(recipe.rl.loss)
        keys = sampling_keys(recipe, tokenizer.fingerprint())
        kept = KeptRollouts(run_dir, keys, supervisor.ranks)
        steps = supervisor.saved_step + 1, last_step
        supervisor.ranks.broadcast_from_rank0(lambda: kept.require(*steps))
        trainer = make_trainer(supervisor, tokenizer.vocab_size)
        update = open_policy_update(recipe, trainer)
        finished = supervisor.start(trainer, last_step)
        supervisor.begin_steps()
        deque(train_steps(supervisor, tokenizer, kept, update, finished), maxlen=0)


def sample_steps(
    supervisor: Supervisor,
    tokenizer: ChatTokenizer,
    pipeline: RolloutPipeline,
    kept: LastKept,
    origin: dict[str, Any],
) -> None:
    """Sample and keep the rollouts of the steps after those of `kept`.

    Raises ConfigError if those have another origin.
    """
    kept.require(origin)
    recipe = supervisor.recipe
    assert isinstance(recipe, RlRecipe)
    last_step = last_step_of(recipe, recipe.schedule)
    keys = sampling_keys(recipe, tokenizer.fingerprint())
    for step in range(kept.step + 1, last_step + 1):
        supervisor.heartbeat(f"step {step}")
        start = time.monotonic()
        rollouts = pipeline.next_rollouts(step)
        metrics = rollout_metrics(rollouts, step, time.monotonic() - start)
        if supervisor.ranks.is_rank0:
            write_kept(supervisor.dir, step, rollouts, keys, {}, tokenizer.decode, origin)
        words = f"reward {metrics['reward']:.3f}, {metrics['groups_sampled']} groups"
        supervisor.log.message(f"step {step}: {words} are kept")
    supervisor.log.message(f"the rollouts of {last_step} steps are in {supervisor.dir}")


def _check_recipe(recipe: RlRecipe) -> None:
    """Raises ConfigError unless there is the loss, and the engine can load `rollout.model`."""
    find_objective(recipe.rl.loss)
    require_rewards(recipe.rl)
    require_urls(recipe.rollout.urls)
    check_rollout_model(recipe.rollout.model)
    if recipe.rollout.engine in ("sglang", "vllm"):
        path, gpus = Path(recipe.rollout.model), recipe.rollout.tensor_parallel
        require_servable("rollout.model", path, engine_fp8(recipe))
        require_loadable("rollout.model", path, gpus)


def _open_prompts(
    recipe: RlRecipe, supervisor: Supervisor, tokenizer: ChatTokenizer, kept: LastKept | None
) -> PromptStream:
    """The prompts from where the run that is resumed had drawn them.

    Raises DataError, and ConfigError if they and their responses exceed the model's positions.
    """
    begin_phase("reading the prompts")
    quarantine = supervisor.dir / "quarantine.jsonl" if supervisor.ranks.is_rank0 else None
    data, rl = recipe.data, recipe.rl
    rows = load_prompts(data, quarantine, tokenizer, labels_of(rl)) if data.sources else []
    state = kept.state if kept else _saved_prompts(supervisor.checkpoint)
    weights = [source.weight for source in data.sources]
    prompts = PromptStream(rows, tokenizer, rl, recipe.run.seed, state, weights, data.system_prompt)
    limit = ("rl.max_response_tokens", rl.max_response_tokens)
    check_positions(planned_config(supervisor.model), *limit, prompts.longest_prompt_tokens)
    return prompts


def _log_dropped(supervisor: Supervisor, prompts: PromptStream, finished: int) -> None:
    dropped = {"too_long": prompts.num_too_long, "duplicates": prompts.num_duplicates}
    for reason, count in dropped.items():
        if count:
            supervisor.log.event(finished, f"prompts_{reason}", f"{count} prompts dropped")


def _saved_prompts(checkpoint: Checkpoint | None) -> dict[str, Any]:
    """Where the prompts begin; a branch from a run of another kind has drawn none."""
    saved = checkpoint.state if checkpoint is not None else {}
    kinds = {"cursor": int, "resting": dict, "levels": dict}
    return {
        name: checkpoint.value(name, kind)
        for name, kind in kinds.items()
        if checkpoint is not None and name in saved
    }


def _has_nothing_left(supervisor: Supervisor, evaluation: InLoopEvaluation, last_step: int) -> bool:
    """Whether the run is finished, which needs neither model nor engine."""
    step = supervisor.saved_step
    if step < last_step or (evaluation.is_due(step) and not _is_evaluated(supervisor, step)):
        return False
    return supervisor.is_finished(last_step)


def _is_evaluated(supervisor: Supervisor, step: int) -> bool:
    """Whether the log has the step's scores: not if the run was stopped while it evaluated."""
    scores = supervisor.ranks.broadcast_from_rank0(
        lambda: dict(supervisor.log.values("evaluation", "avg_at_k"))
    )
    return step in scores


def _one_step(
    recipe: RlRecipe,
    pipeline: RolloutPipeline | KeptRollouts,
    update: PolicyUpdate,
    step: int,
) -> tuple[dict[str, Any], StepResult, Rollouts]:
    """Rollouts and policy update. Returns (line of metrics.jsonl, result, rollouts)."""
    start = time.monotonic()
    rollouts = pipeline.next_rollouts(step)
    rate = learning_rate(recipe.schedule, step)
    result, mismatch = update(rollouts.trained, rate)
    seconds = time.monotonic() - start
    metrics = {
        "loss": result.loss,
        "learning_rate": rate,
        "gradient_norm": result.gradient_norm,
        "trained_tokens": result.trained_tokens,
        **rollout_metrics(rollouts, step, seconds),
        "seconds": seconds,
        **pipeline.seconds,
        "skipped": result.skipped,
        "nonfinite_blocks": result.nonfinite_blocks,
        "policy_version": step,
    }
    return metrics | mismatch | result.metrics | pipeline.engine_metrics(), result, rollouts


def _readable_samples(rollouts: Rollouts, step: int) -> list[dict[str, Any]]:
    """The first response of some groups, for samples.jsonl."""
    return [
        {
            "step": step,
            "prompt": group.prompt.messages[-1]["content"],
            "response": response.text,
            "answer": group.prompt.answer,
            "verdict": response.reason,
            "reward": response.reward,
            "truncated": response.is_truncated,
        }
        for group in rollouts.groups[:SAMPLES_PER_STEP]
        for response in group.responses[:1]
    ]
