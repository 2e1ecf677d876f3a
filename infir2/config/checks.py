"""What no single key's type can say: combinations of values that cannot work.

Each problem is the dotted key it is shown at and one sentence that says what to do.
"""

from collections.abc import Iterator

from pydantic import BaseModel

from infir2.config.schema import EvalRecipe, ModelSection, RlRecipe, ScheduleSection, TrainRecipe

Problem = tuple[str, str]


def problems(recipe: BaseModel, verb: str = "") -> Iterator[Problem]:
    """Problems of a recipe, the most basic first; `verb` is `cpt`, `sft`, `rl`, `eval` or empty (not known)."""
    if isinstance(recipe, TrainRecipe):
        yield from _training(recipe, verb)
    if isinstance(recipe, RlRecipe):
        yield from _rl(recipe)
    if isinstance(recipe, EvalRecipe):
        if not recipe.model.path:
            yield "model.path", "model.path is missing; name the Hugging Face or run directory to score."
        if recipe.model.shape is not None:
            yield (
                "model.shape.hidden_size",
                "[model.shape] makes a new model, and a new model has nothing to score; set model.path instead.",
            )
        if recipe.rollout.model:
            yield "rollout.model", "rollout.model is for RL; an evaluation scores model.path."
        if not recipe.evaluate.problems:
            yield "evaluate.problems", "evaluate.problems is empty; name at least one file of problems."


def _training(recipe: TrainRecipe, verb: str) -> Iterator[Problem]:
    if not recipe.run.dir:
        yield "run.dir", "run.dir is missing; name the directory for checkpoints, metrics and report, such as runs/cpt."
    yield from _model(recipe.model)
    if recipe.model.shape is not None and not recipe.data.tokenizer:
        yield "data.tokenizer", "data.tokenizer is missing; a model made from model.shape brings no tokenizer of its own."
    if not recipe.data.sources:
        yield "data.sources", "data.sources is empty; name at least one file of training data."
    yield from _schedule(recipe.schedule, recipe.train.epochs)
    if not isinstance(recipe, RlRecipe):
        yield from _batch(recipe, verb)


def _model(model: ModelSection) -> Iterator[Problem]:
    if not model.path and model.shape is None:
        yield "model.path", "model.path is missing; name a Hugging Face or run directory to start from, or make a model with [model.shape]."
    if model.path and model.shape is not None:
        yield "model.path", "model.path and model.shape are both set; keep the one that the model is to be made from."
    shape = model.shape
    if shape is None:
        return
    if shape.num_heads % shape.num_kv_heads:
        yield (
            "model.shape.num_kv_heads",
            (f"model.shape.num_kv_heads ({shape.num_kv_heads}) must divide model.shape.num_heads ({shape.num_heads})."),
        )
    if not shape.head_dim and shape.hidden_size % shape.num_heads:
        yield (
            "model.shape.num_heads",
            (
                f"model.shape.num_heads ({shape.num_heads}) must divide model.shape.hidden_size ({shape.hidden_size}), "
                "or set model.shape.head_dim."
            ),
        )
    head_dim = shape.head_dim or shape.hidden_size // shape.num_heads
    if head_dim % 2:
        yield (
            "model.shape.head_dim",
            f"rotary positions need an even head dimension, and it is {head_dim}; set model.shape.head_dim.",
        )


def _batch(recipe: TrainRecipe, verb: str) -> Iterator[Problem]:
    data = recipe.data
    if data.batch_sequences and data.batch_samples:
        yield "data.batch_samples", "data.batch_sequences and data.batch_samples are both set; keep one and set the other to 0."
    if not data.batch_sequences and not data.batch_samples:
        yield (
            "data.batch_sequences",
            "the batch has no size; set data.batch_sequences (windows) or data.batch_samples (SFT).",
        )
    if verb == "cpt" and data.batch_samples:
        yield "data.batch_samples", "data.batch_samples is for SFT; documents are packed into windows, so set data.batch_sequences."
    if data.micro_batch_tokens < data.sequence_tokens:
        yield (
            "data.micro_batch_tokens",
            (
                f"data.micro_batch_tokens ({data.micro_batch_tokens}) must be at least data.sequence_tokens ({data.sequence_tokens}): "
                "a sequence is not divided over passes."
            ),
        )


def _schedule(schedule: ScheduleSection, epochs: float) -> Iterator[Problem]:
    total = schedule.total_steps
    if not total and not epochs:
        yield "schedule.total_steps", "the run has no length; set schedule.total_steps or train.epochs."
    if schedule.warmup_steps and schedule.warmup_fraction:
        yield "schedule.warmup_fraction", "schedule.warmup_steps and schedule.warmup_fraction are both set; keep one."
    if schedule.final_learning_rate > schedule.learning_rate:
        yield (
            "schedule.final_learning_rate",
            (
                f"schedule.final_learning_rate ({schedule.final_learning_rate:g}) must not exceed "
                f"schedule.learning_rate ({schedule.learning_rate:g})."
            ),
        )
    if schedule.kind != "wsd" and (schedule.decay_steps or schedule.decay_from_step >= 0):
        yield "schedule.decay_steps", f'schedule.decay_steps and schedule.decay_from_step belong to kind = "wsd", not "{schedule.kind}".'
    if total and schedule.warmup_steps > total:
        yield "schedule.warmup_steps", f"schedule.warmup_steps ({schedule.warmup_steps}) must not exceed schedule.total_steps ({total})."
    elif total and schedule.decay_steps > total:
        yield "schedule.decay_steps", f"schedule.decay_steps ({schedule.decay_steps}) must not exceed schedule.total_steps ({total})."
    elif schedule.decay_from_step >= 0 and not schedule.decay_steps:
        yield "schedule.decay_from_step", "schedule.decay_from_step needs schedule.decay_steps, the length of the decay."
    elif total and schedule.decay_from_step + schedule.decay_steps > total:
        yield (
            "schedule.decay_from_step",
            (
                f"the decay would end at step {schedule.decay_from_step + schedule.decay_steps}, after schedule.total_steps ({total}); "
                "set total_steps to the end of the decay."
            ),
        )
    elif total and schedule.decay_from_step < 0 and schedule.warmup_steps + schedule.decay_steps > total:
        yield "schedule.decay_steps", f"warm-up and decay together must not exceed schedule.total_steps ({total}); shorten one of them."


def _rl(recipe: RlRecipe) -> Iterator[Problem]:
    rl = recipe.rl
    if rl.over_sample_prompts < rl.prompts_per_step:
        yield (
            "rl.over_sample_prompts",
            (f"rl.over_sample_prompts ({rl.over_sample_prompts}) must be at least rl.prompts_per_step ({rl.prompts_per_step})."),
        )
    if rl.mini_batches > rl.prompts_per_step:
        yield "rl.mini_batches", f"rl.mini_batches ({rl.mini_batches}) must not exceed rl.prompts_per_step ({rl.prompts_per_step})."
    if rl.overlong_buffer_tokens > rl.max_response_tokens:
        yield (
            "rl.overlong_buffer_tokens",
            (f"rl.overlong_buffer_tokens ({rl.overlong_buffer_tokens}) must not exceed rl.max_response_tokens ({rl.max_response_tokens})."),
        )
