"""What no single key's type can say: combinations of values that cannot work.

Each rule is whether it is broken, the dotted key it is shown at, and how the sentence about that key goes on.
"""

from collections.abc import Iterator

from pydantic import BaseModel

from infir2.config.schema import (
    DataSection,
    EvalRecipe,
    ModelSection,
    RlRecipe,
    ScheduleSection,
    TrainRecipe,
)

Problem = tuple[str, str]
Rule = tuple[bool, str, str]


def problems(recipe: BaseModel, verb: str = "") -> Iterator[Problem]:
    """(key, sentence) of what is wrong, the most basic first; `verb` is `cpt`, `sft`, `rl`, `eval` or empty (not known)."""
    rules: list[Rule] = []
    if isinstance(recipe, TrainRecipe):
        rules += _training(recipe)
    if isinstance(recipe, RlRecipe):
        rules += _rl(recipe)
    elif isinstance(recipe, TrainRecipe):
        rules += _batch(recipe.data, verb)
    if isinstance(recipe, EvalRecipe):
        rules += _evaluation(recipe)
    yield from ((key, f"{key} {goes_on}") for broken, key, goes_on in rules if broken)


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
            "is missing; a model made from model.shape brings none of its own.",
        ),
        (not data.sources, "data.sources", "is empty; name at least one file of training data."),
        (
            recipe.parallel.pp != 1,
            "parallel.pp",
            "must be 1: there is no pipeline parallelism; use parallel.tp and parallel.dp instead.",
        ),
        (
            recipe.parallel.dp == 0,
            "parallel.dp",
            "must be -1 (all ranks that are left) or at least 1.",
        ),
        *_schedule(recipe.schedule, recipe.train.epochs),
    ]


def _model(model: ModelSection) -> list[Rule]:
    shape, start = (
        model.shape,
        "name a Hugging Face or run directory to start from, or make a model with [model.shape].",
    )
    rules: list[Rule] = [
        (not model.path and shape is None, "model.path", f"is missing; {start}"),
        (
            bool(model.path) and shape is not None,
            "model.path",
            "and model.shape are both set; keep one of them.",
        ),
    ]
    if shape is None:
        return rules
    heads, width, head_dim = (
        shape.num_heads,
        shape.hidden_size,
        shape.head_dim or shape.hidden_size // shape.num_heads,
    )
    undivided = not shape.head_dim and width % heads > 0
    return [
        *rules,
        (
            heads % shape.num_kv_heads > 0,
            "model.shape.num_kv_heads",
            f"({shape.num_kv_heads}) must divide num_heads ({heads}).",
        ),
        (
            undivided,
            "model.shape.num_heads",
            f"({heads}) must divide hidden_size ({width}), or set model.shape.head_dim.",
        ),
        (
            head_dim % 2 > 0,
            "model.shape.head_dim",
            f"is {head_dim}, and rotary positions need an even one; set model.shape.head_dim.",
        ),
    ]


def _batch(data: DataSection, verb: str) -> list[Rule]:
    windows, samples, longest, pass_tokens = (
        data.batch_sequences,
        data.batch_samples,
        data.sequence_tokens,
        data.micro_batch_tokens,
    )
    split = f"({pass_tokens}) must be at least data.sequence_tokens ({longest}): a sequence is not divided over passes."
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
            "is for SFT; set data.batch_sequences, for documents are packed into windows.",
        ),
        (pass_tokens < longest, "data.micro_batch_tokens", split),
    ]


def _schedule(schedule: ScheduleSection, epochs: float) -> list[Rule]:
    total, warmup, decay, start = (
        schedule.total_steps,
        schedule.warmup_steps,
        schedule.decay_steps,
        schedule.decay_from_step,
    )
    peak, final = schedule.learning_rate, schedule.final_learning_rate
    end = f"+ schedule.decay_steps is {start + decay}, after schedule.total_steps ({total}); set total_steps to the end of the decay."
    rules: list[Rule] = [
        (
            not total and not epochs,
            "schedule.total_steps",
            "and train.epochs are both 0; set one of them, the length of the run.",
        ),
        (
            warmup > 0 and schedule.warmup_fraction > 0,
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
    ]
    if schedule.kind != "wsd":
        goes_on = f'and schedule.decay_from_step belong to kind = "wsd", not "{schedule.kind}".'
        rules.append((decay > 0 or start >= 0, "schedule.decay_steps", goes_on))
    if not total:  # it follows from the epochs
        return rules
    return [
        *rules,
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
        (start >= 0 and start + decay > total, "schedule.decay_from_step", end),
        (
            warmup + decay > total and start < 0,
            "schedule.decay_steps",
            f"and warm-up together must not exceed total_steps ({total}).",
        ),
    ]


def _rl(recipe: RlRecipe) -> list[Rule]:
    rl, data, groups = recipe.rl, recipe.data, recipe.rl.prompts_per_step
    drawn, buffer, longest = (
        rl.over_sample_prompts,
        rl.overlong_buffer_tokens,
        rl.max_response_tokens,
    )
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
            drawn < groups,
            "rl.over_sample_prompts",
            f"({drawn}) must be at least rl.prompts_per_step ({groups}).",
        ),
        (
            rl.mini_batches > groups,
            "rl.mini_batches",
            f"({rl.mini_batches}) must not exceed rl.prompts_per_step ({groups}).",
        ),
        (
            buffer > longest,
            "rl.overlong_buffer_tokens",
            f"({buffer}) must not exceed rl.max_response_tokens ({longest}).",
        ),
    ]


def _evaluation(recipe: EvalRecipe) -> list[Rule]:
    return [
        (
            not recipe.model.path,
            "model.path",
            "is missing; name the Hugging Face or run directory to score.",
        ),
        (
            recipe.model.shape is not None,
            "model.shape.hidden_size",
            "makes a new model, with nothing to score; set model.path instead.",
        ),
        (
            bool(recipe.rollout.model),
            "rollout.model",
            "is for RL; an evaluation scores model.path.",
        ),
        (
            not recipe.evaluate.problems,
            "evaluate.problems",
            "is empty; name at least one file of problems.",
        ),
        (
            not recipe.run.dir,
            "run.dir",
            "is missing; name the directory for the scores, such as runs/eval.",
        ),
    ]
