"""Combinations of values that cannot work, which the type of a single key cannot express.

A rule is (whether the recipe violates it, the dotted key to name, the rest of the sentence that
starts with this key).
"""

import difflib
import re
from collections.abc import Iterator

from pydantic import BaseModel

from infir2.config.reward_rules import is_gym, reward_rules
from infir2.config.rollout_rules import Rule, rollout_rules
from infir2.config.schema import (
    DataSection,
    EvalRecipe,
    ModelSection,
    RlRecipe,
    RlSection,
    ScheduleSection,
    ShapeSection,
    TrainRecipe,
)

LOSSES = ("grpo", "gspo", "cispo")

Violation = tuple[str, str]


def violations(recipe: BaseModel, verb: str = "") -> Iterator[Violation]:
    """Yield (dotted key, sentence) of each violated rule, the most basic first.

    Args:
        verb: "cpt" or "sft" adds the rules that are specific to it; "" if the verb is not known.
    """
    rules: list[Rule] = []
    if isinstance(recipe, TrainRecipe):
        rules += _training(recipe)
    if isinstance(recipe, RlRecipe):
        rules += _rl(recipe)
    elif isinstance(recipe, TrainRecipe):
        rules += _batch(recipe.data, verb)
    if isinstance(recipe, EvalRecipe):
        rules += _evaluation(recipe)
    yield from ((key, f"{key} {rest}") for violated, key, rest in rules if violated)


def _training(recipe: TrainRecipe) -> list[Rule]:
    model, data = recipe.model, recipe.data
    return [
        (
            not recipe.run.dir,
            "run.dir",
            "is missing; name the directory for checkpoints, metrics and report, such as runs/cpt.",
        ),
        *_model(model),
        (
            bool(model.shape) and not data.tokenizer,
            "data.tokenizer",
            "is missing; a model initialized from model.shape has no tokenizer of its own.",
        ),
        (
            not data.sources and not _makes_prompts(recipe),
            "data.sources",
            "is empty; name at least one file of training data.",
        ),
        (
            recipe.parallel.dp == 0,
            "parallel.dp",
            "must be -1 (all remaining ranks) or at least 1.",
        ),
        *_schedule(recipe.schedule, recipe.train.epochs),
    ]


def _makes_prompts(recipe: TrainRecipe) -> bool:
    """Whether a reward makes the prompts that it rates."""
    return isinstance(recipe, RlRecipe) and any(is_gym(each.name) for each in recipe.rl.reward)


def _model(model: ModelSection) -> list[Rule]:
    rules: list[Rule] = [
        (
            not model.path and model.shape is None,
            "model.path",
            "is missing; name a Hugging Face or run directory to start from, or initialize a model "
            "with [model.shape].",
        ),
        (
            bool(model.path) and model.shape is not None,
            "model.path",
            "and model.shape are both set; keep one of them.",
        ),
    ]
    return rules if model.shape is None else rules + _shape(model.shape)


def _shape(shape: ShapeSection) -> list[Rule]:
    heads, hidden_size = shape.num_heads, shape.hidden_size
    head_dim = shape.head_dim or hidden_size // heads
    return [
        (
            heads % shape.num_kv_heads > 0,
            "model.shape.num_kv_heads",
            f"({shape.num_kv_heads}) must divide num_heads ({heads}).",
        ),
        (
            not shape.head_dim and hidden_size % heads > 0,
            "model.shape.num_heads",
            f"({heads}) must divide hidden_size ({hidden_size}), or set model.shape.head_dim.",
        ),
        (
            head_dim % 2 > 0,
            "model.shape.head_dim",
            f"is {head_dim}, but rotary embeddings require an even number; set it.",
        ),
    ]


def _batch(data: DataSection, verb: str) -> list[Rule]:
    windows, samples = data.batch_sequences, data.batch_samples
    return [
        (
            windows > 0 and samples > 0,
            "data.batch_sequences",
            "and data.batch_samples are both set; keep one and set the other to 0.",
        ),
        (
            not windows and not samples,
            "data.batch_sequences",
            "(windows) and data.batch_samples (SFT) are both 0; set one of them.",
        ),
        (
            verb == "cpt" and samples > 0,
            "data.batch_samples",
            "is for SFT; set data.batch_sequences, because CPT packs documents into windows.",
        ),
        (
            data.micro_batch_tokens < data.sequence_tokens,
            "data.micro_batch_tokens",
            f"({data.micro_batch_tokens}) must be at least data.sequence_tokens "
            f"({data.sequence_tokens}): a sequence is not split over forward passes.",
        ),
    ]


def _schedule(schedule: ScheduleSection, epochs: float) -> list[Rule]:
    decay, start = schedule.decay_steps, schedule.decay_from_step
    peak, final = schedule.learning_rate, schedule.final_learning_rate
    rules: list[Rule] = [
        (
            not schedule.total_steps and not epochs,
            "schedule.total_steps",
            "and train.epochs are both 0; set one of them, the length of the run.",
        ),
        (
            schedule.warmup_steps > 0 and schedule.warmup_fraction > 0,
            "schedule.warmup_fraction",
            "and schedule.warmup_steps are both set; keep one.",
        ),
        (
            final > peak,
            "schedule.final_learning_rate",
            f"({final:g}) must not exceed schedule.learning_rate ({peak:g}).",
        ),
        (
            start >= 0 and not decay,
            "schedule.decay_from_step",
            "needs schedule.decay_steps, the length of the decay.",
        ),
        (
            schedule.kind != "wsd" and (decay > 0 or start >= 0),
            "schedule.decay_steps",
            f'and schedule.decay_from_step require kind = "wsd", not "{schedule.kind}".',
        ),
    ]
    # total_steps = 0: the length follows from the epochs, and is checked once the rows are counted.
    return rules + phase_rules(schedule) if schedule.total_steps else rules


def phase_rules(schedule: ScheduleSection) -> list[Rule]:
    """Warm-up and decay must fit into total_steps, which is known here."""
    total, decay, start = schedule.total_steps, schedule.decay_steps, schedule.decay_from_step
    warmup = schedule.warmup_steps or round(schedule.warmup_fraction * total)
    return [
        (
            warmup > total,
            "schedule.warmup_steps",
            f"({warmup}) must not exceed schedule.total_steps ({total}).",
        ),
        (
            decay > total,
            "schedule.decay_steps",
            f"({decay}) must not exceed schedule.total_steps ({total}).",
        ),
        (
            start >= 0 and start + decay > total,
            "schedule.decay_from_step",
            f"+ schedule.decay_steps is {start + decay}, after schedule.total_steps ({total}); "
            "set total_steps to the end of the decay.",
        ),
        (
            warmup + decay > total and start < 0,
            "schedule.decay_steps",
            f"plus the warm-up must not exceed total_steps ({total}).",
        ),
        (
            0 <= start < warmup,
            "schedule.decay_from_step",
            f"({start}) is inside the warm-up, which ends at step {warmup}.",
        ),
    ]


def _rl(recipe: RlRecipe) -> list[Rule]:
    rl, data, groups = recipe.rl, recipe.data, recipe.rl.prompts_per_step
    unused = (
        "is not used by RL, whose batch is rl.prompts_per_step groups of rl.group_size; remove it."
    )
    return [
        (data.batch_sequences > 0, "data.batch_sequences", unused),
        (data.batch_samples > 0, "data.batch_samples", unused),
        (
            bool(data.validation_sources),
            "data.validation_sources",
            "is not used by RL; name held-out problems under evaluate.problems.",
        ),
        (
            recipe.train.epochs > 0,
            "train.epochs",
            "is not used by RL, whose length is schedule.total_steps; remove it.",
        ),
        (
            rl.over_sample_prompts < groups,
            "rl.over_sample_prompts",
            f"({rl.over_sample_prompts}) must be at least rl.prompts_per_step ({groups}).",
        ),
        (
            rl.mini_batches > groups,
            "rl.mini_batches",
            f"({rl.mini_batches}) must not exceed rl.prompts_per_step ({groups}).",
        ),
        (
            rl.overlong_buffer_tokens > rl.max_response_tokens,
            "rl.overlong_buffer_tokens",
            f"({rl.overlong_buffer_tokens}) must not exceed rl.max_response_tokens "
            f"({rl.max_response_tokens}).",
        ),
        *_sampling(recipe),
        (
            recipe.rollout.exact
            and recipe.rollout.precision
            not in ("trainer", "fp8" if recipe.fp8.enabled else "bf16"),
            "rollout.exact",
            f"and rollout.precision = {recipe.rollout.precision} exclude each other; remove one.",
        ),
        *_objective(recipe.rl),
        *reward_rules(recipe.rl),
        *rollout_rules(recipe.rollout),
    ]


def _sampling(recipe: RlRecipe) -> list[Rule]:
    rl = recipe.rl
    return [
        (
            recipe.rollout.exact and (rl.max_off_policy_steps > 0 or rl.partial),
            "rollout.exact",
            "compares with the weights that sampled, and rl.max_off_policy_steps and rl.partial "
            "train newer ones; remove one of them.",
        ),
        (
            recipe.rollout.sleep and rl.max_off_policy_steps > 0,
            "rollout.sleep",
            "frees the servers' memory while the trainer works, when rl.max_off_policy_steps "
            "samples; remove one of them.",
        ),
        (
            rl.chunk_tokens >= rl.max_response_tokens,
            "rl.chunk_tokens",
            f"({rl.chunk_tokens}) must be below rl.max_response_tokens ({rl.max_response_tokens}), "
            "or 0 for whole responses.",
        ),
        (
            rl.partial and not rl.chunk_tokens and not rl.environment,
            "rl.partial",
            "needs rl.chunk_tokens or rl.environment: whole responses leave nothing unfinished.",
        ),
        ("" in rl.stop, "rl.stop", "has an empty text, which would end every response; remove it."),
        (
            not all(re.fullmatch(r"[A-Za-z]\w*=.*", each, re.S) for each in rl.template_options),
            "rl.template_options",
            "are NAME=VALUE, such as enable_thinking=false.",
        ),
    ]


def _objective(rl: RlSection) -> list[Rule]:
    near = difflib.get_close_matches(rl.loss, LOSSES, 1) or LOSSES[:1]
    masks = rl.correction in ("mis", "icepop")
    return [
        (
            rl.loss not in LOSSES and not re.fullmatch(r"[\w.]+:\w+", rl.loss),
            "rl.loss",
            f"= {rl.loss!r} is unknown; did you mean {near[0]}? Or name package.module:function.",
        ),
        (
            0 < rl.clip_dual <= 1,
            "rl.clip_dual",
            f"({rl.clip_dual:g}) must be greater than 1, or 0 for none.",
        ),
        (
            rl.correction_floor > 0 and not masks,
            "rl.correction_floor",
            f"has no effect with rl.correction = {rl.correction}; choose mis or icepop.",
        ),
        (
            rl.correction_floor >= rl.correction_cap,
            "rl.correction_floor",
            f"({rl.correction_floor:g}) must be below rl.correction_cap ({rl.correction_cap:g}).",
        ),
        (
            rl.correction == "icepop"
            and not (rl.correction_floor > 0 and rl.correction_level == "token"),
            "rl.correction",
            "= icepop needs rl.correction_level = token and a rl.correction_floor, such as 0.5.",
        ),
        (
            rl.kl_coefficient > 0 and not rl.reference,
            "rl.reference",
            "is missing; name the exported directory that rl.kl_coefficient compares with.",
        ),
        (
            bool(rl.reference) and not rl.kl_coefficient,
            "rl.reference",
            "has no effect without rl.kl_coefficient; set it, or remove the reference.",
        ),
    ]


def _evaluation(recipe: EvalRecipe) -> list[Rule]:
    names = recipe.benchmarks.names
    engines = ("native", "sglang", "vllm") if names else ("native",)
    return [
        (
            not recipe.model.path,
            "model.path",
            "is missing; name the Hugging Face or run directory to evaluate.",
        ),
        (
            recipe.model.shape is not None,
            "model.shape.hidden_size",
            "initializes a new model, which has nothing to evaluate; set model.path instead.",
        ),
        (
            bool(recipe.rollout.model),
            "rollout.model",
            "is for RL; an evaluation scores model.path.",
        ),
        (
            recipe.rollout.engine not in engines or bool(recipe.rollout.urls),
            "rollout.engine",
            f"is for RL; this evaluation uses {' or '.join(engines)}.",
        ),
        (
            not recipe.evaluate.problems and not names,
            "evaluate.problems",
            "is empty; name at least one file of problems.",
        ),
        (
            bool(recipe.evaluate.problems and names),
            "evaluate.problems",
            "and benchmarks.names are two evaluations; the data of benchmarks is benchmarks.data.",
        ),
        (
            bool(names) != bool(recipe.benchmarks.data),
            "benchmarks.data",
            "and benchmarks.names belong together; set both.",
        ),
        (
            not recipe.run.dir,
            "run.dir",
            "is missing; name the directory for the scores, such as runs/eval.",
        ),
    ]
