"""`infir2 rl`: rollouts, rewards, the policy update, new weights for the engine; one step after another."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from infir2.config.load import Loaded
from infir2.config.schema import RlRecipe
from infir2.data import Batch, load_prompts, pack_sequences
from infir2.engines.weight_sync import open_engine
from infir2.errors import CheckFailedError
from infir2.parallel.parallel_model import ParallelModel
from infir2.parallel.ranks import Ranks
from infir2.rl.dynamic_sampling import Collected, GroupSampler
from infir2.rl.evaluation import InLoopEvaluation
from infir2.rl.groups import Group, training_samples
from infir2.rl.journal import Journal
from infir2.rl.pipeline import Rollouts
from infir2.rl.policy_loss import PolicyLoss
from infir2.train.build import build_model, open_tokenizer
from infir2.train.schedules import learning_rate
from infir2.train.supervisor import Session
from infir2.train.trainer import StepResult, Trainer

SAMPLES_PER_STEP = 2  # responses written to samples.jsonl


def run_rl(loaded: Loaded[RlRecipe]) -> None:
    """Train to `schedule.total_steps` rollout steps, from the newest checkpoint in `run.dir`."""
    evaluation = InLoopEvaluation(loaded.recipe)
    with Session(loaded, "rl") as session:
        recipe = loaded.recipe
        tokenizer, tokenizer_dir = open_tokenizer(session.model, recipe.data.tokenizer)
        prompts = load_prompts(
            recipe.data,
            quarantine=session.dir / "quarantine.jsonl" if session.ranks.is_rank0 else None,
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
        done = session.start(trainer, recipe.schedule.total_steps)
        cursor = session.checkpoint.state["cursor"] if session.checkpoint else 0
        engine, weights = open_engine(recipe, trainer.parallel_model, policy_version=done)
        journal = Journal(session.dir, session.ranks)
        sampler = GroupSampler(prompts, tokenizer, recipe.rl, journal, session, cursor)
        if sampler.num_too_long:
            session.event(done, "prompts_too_long", f"{sampler.num_too_long} prompts dropped")
        description = {
            "model_config": model.config.to_hf(),
            "tokenizer_dir": str(tokenizer_dir),
            "fp8": recipe.fp8.model_dump(),
        }
        description["tokenizer_fingerprint"] = tokenizer.fingerprint()
        total = recipe.schedule.total_steps

        def evaluate_if_due(step: int) -> None:
            if evaluation.is_due(step):
                rollouts.update(step)
                evaluation.run(engine, tokenizer, step, session)

        with Rollouts(
            sampler, journal, engine, weights, trainer.parallel_model, session, total
        ) as rollouts:
            evaluated = session.ranks.broadcast_from_rank0(
                lambda: dict(session.metrics.values("evaluation", "avg_at_k"))
            )
            if done not in evaluated:  # the run was stopped in it
                evaluate_if_due(done)
            for step in range(done + 1, total + 1):
                session.beat(f"step {step}")
                line, result, collected = _one_step(recipe, trainer, rollouts, step)
                session.metrics.write_samples(_readable(collected, step))
                session.finish_step(step, step == total, result, line, description | rollouts.state)
                evaluate_if_due(step)


def _one_step(
    recipe: RlRecipe, trainer: Trainer, rollouts: Rollouts, step: int
) -> tuple[dict[str, Any], StepResult, Collected]:
    start = time.monotonic()
    collected = rollouts.take(step)
    generated = time.monotonic()
    results, mismatch = update_policy(
        recipe, trainer, collected.trained, learning_rate(recipe.schedule, step)
    )
    result = _combined(results)
    responses = [response for group in collected.groups for response in group.responses]
    num_tokens = sum(len(response.completion.token_ids) for response in responses)
    seconds = time.monotonic() - start
    line = {
        "loss": result.loss,
        "learning_rate": learning_rate(recipe.schedule, step),
        "gradient_norm": result.gradient_norm,
        "trained_tokens": result.trained_tokens,
        "tokens_per_second": num_tokens / seconds,
        "seconds": seconds,
        "rollout_seconds": generated - start,
        "skipped": result.skipped,
        "nonfinite_blocks": result.nonfinite_blocks,
        "reward": sum(response.reward for response in responses) / len(responses),
        "response_tokens": num_tokens / len(responses),
        "truncated_fraction": sum(response.completion.finish == "length" for response in responses)
        / len(responses),
        "groups_sampled": len(collected.groups),
        "groups_without_signal": sum(not group.has_signal for group in collected.groups),
        "policy_version": step,
        "staleness": step - 1 - min(response.completion.policy_version for response in responses),
    }
    return line | mismatch | result.metrics, result, collected


def update_policy(
    recipe: RlRecipe, trainer: Trainer, groups: Sequence[Group], rate: float
) -> tuple[list[StepResult], dict[str, float]]:
    """One optimizer step per mini-batch of groups; trainer_logprobs are those of the policy before the first."""
    rl, layout = recipe.rl, trainer.parallel_model.layout
    if not groups:
        return [], {}
    size = -(-len(groups) // rl.mini_batches)
    mini_batches = []
    for first in range(0, len(groups), size):
        samples = [
            sample
            for group in groups[first : first + size]
            for sample in training_samples(group, rl.normalize_by_std)
        ]
        packed = pack_sequences(
            samples, recipe.data.micro_batch_tokens, layout.data_rank, layout.sizes.num_data
        )
        mini_batches.append(
            [with_trainer_logprobs(trainer, batch, rl.temperature) for batch in packed]
        )
    mismatch = mismatch_metrics(
        [batch for batches in mini_batches for batch in batches], layout.ranks
    )
    if mismatch["mismatch_kl"] > rl.max_mismatch_kl:
        raise CheckFailedError(
            f"the rollout engine's log-probabilities are not the trainer's: KL {mismatch['mismatch_kl']:.4f} exceeds "
            f"rl.max_mismatch_kl = {rl.max_mismatch_kl}; check that both use the same weights, scale format and temperature"
            + ", or lower the learning rate: with rl.asynchronous the engine's weights are a version older"
            * rl.asynchronous
        )
    loss = PolicyLoss(rl.clip_low, rl.clip_high, rl.tis_cap)
    return [
        trainer.step(batches, loss, rate, temperature=rl.temperature) for batches in mini_batches
    ], mismatch


@torch.no_grad()
def with_trainer_logprobs(trainer: Trainer, batch: Batch, temperature: float) -> Batch:
    """The batch with the current policy's log-probability of every trained token."""
    shard_specs = torch.arange(
        len(batch.token_ids)
    )  # ranks that share the batch score some of it each
    scores = trainer.score(replace(batch, token_inputs={"place": shard_specs}), temperature)
    values = torch.zeros(len(shard_specs), device=scores.logprobs.device).index_copy_(
        0, scores.inputs["place"], scores.logprobs
    )
    return replace(
        batch,
        token_inputs=batch.token_inputs
        | {"trainer_logprobs": trainer.parallel_model.all_reduce_over_batch(values).cpu()},
    )


def mismatch_metrics(batches: Sequence[Batch], ranks: Ranks) -> dict[str, float]:
    """How far the trainer's log-probabilities are from the engine's, for the same tokens and weights, on all ranks' batches.

    mismatch_kl is the k3 estimate of KL(rollout || trainer), a mean over tokens; mean and max are of |difference|.
    """
    difference = torch.cat(
        [
            (b.token_inputs["trainer_logprobs"] - b.token_inputs["rollout_logprobs"])[b.loss_mask]
            for b in batches
        ]
    ).double()
    sums = (
        (difference.exp() - 1 - difference).sum().item(),
        difference.abs().sum().item(),
        len(difference),
    )
    kls, sizes, counts = zip(*ranks.all_gather(sums), strict=True)
    largest = max(ranks.all_gather(difference.abs().max().item() if len(difference) else 0.0))
    return {
        "mismatch_kl": sum(kls) / sum(counts),
        "mismatch_mean": sum(sizes) / sum(counts),
        "mismatch_max": largest,
    }


def _combined(results: Sequence[StepResult]) -> StepResult:
    """The mini-batches' results as one, weighted by tokens."""
    tokens = sum(result.trained_tokens for result in results)
    if not tokens:
        return StepResult(
            loss=float("nan"), gradient_norm=0.0, trained_tokens=0, tokens=0, skipped=True
        )

    def mean(values: list[float]) -> float:
        return sum(v * r.trained_tokens for v, r in zip(values, results, strict=True)) / tokens

    return StepResult(
        loss=mean([r.loss for r in results]),
        gradient_norm=mean([r.gradient_norm for r in results]),
        trained_tokens=tokens,
        tokens=sum(result.tokens for result in results),
        skipped=any(r.skipped for r in results),
        metrics={name: mean([r.metrics[name] for r in results]) for name in results[0].metrics},
        signal=next((r.signal for r in results if r.signal), None),
        nonfinite_blocks=sum(r.nonfinite_blocks for r in results),
    )


def _readable(collected: Collected, step: int) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "prompt": group.prompt.messages[-1]["content"],
            "response": response.text,
            "answer": group.prompt.answer,
            "reward": response.reward,
            "truncated": response.completion.finish == "length",
        }
        for group in collected.groups[:SAMPLES_PER_STEP]
        for response in group.responses[:1]
    ]
