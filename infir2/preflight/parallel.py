"""Checks of `[parallel]`: the sizes of the mesh, and ranks without work."""

import os

import torch

from infir2.config.schema import RlRecipe, TrainRecipe
from infir2.numerics.formats import GROUP
from infir2.parallel.mesh import Sizes, check_model
from infir2.preflight.finding import Finding, SkippedError
from infir2.preflight.model import ModelFacts
from infir2.train.plan import (
    GRAPHS_PAY_BELOW,
    check_graphs,
    check_observer,
    check_optimizer,
    device_of,
    needs_one_process,
)

FP8_PAYS_FROM = 0.8e9  # parameters, between measured sizes


def check_parallel(recipe: TrainRecipe, model: ModelFacts | None) -> Finding:
    """The model and the optimizer can be split as `[parallel]` says.

    Raises ConfigError, or SkippedError if the model is unknown and everything else is right.
    """
    section = recipe.parallel
    fixed = Sizes(section.dp_replicate, max(1, section.dp), section.cp, section.tp)
    check_optimizer(recipe, fixed)
    check_observer(recipe, fixed)
    check_graphs(recipe, fixed)
    if model is None:
        raise SkippedError("needs the model")
    check_model(fixed, model.config, recipe.fp8.enabled)
    if fixed.world > 1:
        number = f"a multiple of {fixed.world}" if section.dp == -1 else str(fixed.world)
        detail = f"for {number} processes"
    elif section.dp != -1 or needs_one_process(recipe.optimizer):
        detail = "for one process"
    else:
        detail = "for any number of processes"
    sizes = sizes_of(recipe)
    notes = [idle_ranks(recipe, sizes)]
    if device_of(recipe.run).type == "cuda":
        notes += speed_notes(recipe, model.config.num_parameters, sizes)
    said = [note for note in notes if note]
    return Finding("parallel", "warn" if said else "ok", "; ".join([detail, *said]))


def speed_notes(recipe: TrainRecipe, num_parameters: int, sizes: Sizes) -> list[str]:
    """What makes a small model's step faster on GPUs, as measured (docs/results/scale.md)."""
    notes = []
    if recipe.fp8.enabled and num_parameters < FP8_PAYS_FROM:
        notes.append(
            "FP8 makes no model of this size much faster: a step was measured at 0.40x of BF16's "
            "speed at 135M and 0.55x at 0.5B, with CUDA graphs 0.83x and 0.91x, and 1.2x at 1.5B"
        )
    is_off = recipe.train.cuda_graphs is False and not isinstance(recipe, RlRecipe)
    if is_off and sizes.num_shards * sizes.tp == 1 and num_parameters < GRAPHS_PAY_BELOW:
        notes.append(
            "train.cuda_graphs = true makes a step of a small model faster (FP8: 4.9 times at "
            "135M, 2 times at 0.5B)"
        )
    return notes


def sizes_of(recipe: TrainRecipe) -> Sizes:
    """The mesh sizes of the run.

    Where parallel.dp = -1 leaves the number of processes open, it is the launcher's WORLD_SIZE, or
    else the number of GPUs of this machine.
    """
    section = recipe.parallel
    if section.dp != -1:
        return Sizes(section.dp_replicate, section.dp, section.cp, section.tp)
    one_process = device_of(recipe.run).type != "cuda" or needs_one_process(recipe.optimizer)
    num_gpus = 1 if one_process else torch.cuda.device_count()
    world_size = int(os.environ.get("WORLD_SIZE", num_gpus))
    dp = max(1, world_size // (section.dp_replicate * section.cp * section.tp))
    return Sizes(section.dp_replicate, dp, section.cp, section.tp)


def idle_ranks(recipe: TrainRecipe, sizes: Sizes) -> str:
    """Why some ranks would train on padding only or on nothing; empty if all have work."""
    if isinstance(recipe, RlRecipe):
        sequences = recipe.rl.prompts_per_step * recipe.rl.group_size
    else:
        sequences = recipe.data.batch_samples
    sequences = sequences or recipe.data.batch_sequences
    tokens, padded = recipe.data.micro_batch_tokens, 2 * GROUP * sizes.cp
    if sizes.cp > 1 and padded > tokens:
        return (
            f"parallel.cp = {sizes.cp} pads micro-batches of {tokens} tokens to {padded}; "
            "raise data.micro_batch_tokens, or lower it."
        )
    if sizes.num_data > sequences:
        return (
            f"{sizes.num_data} ranks read data and a step has {sequences} sequences: "
            "the others train nothing; lower parallel.dp."
        )
    return ""
