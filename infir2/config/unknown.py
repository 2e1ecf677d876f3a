"""What an unknown key or section was meant to be: misspelt, elsewhere, or another stack's."""

import difflib

from infir2.config.keys import Recipe, leaf_keys
from infir2.config.schema import EvalRecipe, RlRecipe, TrainRecipe
from infir2.config.toml import MAX_SHOWN

_TRUNCATIONS = ("rl.top_p", "rl.top_k", "rl.min_p")  # of the sampling, in other frameworks
_RECIPES: dict[str, Recipe] = {
    "cpt": TrainRecipe,
    "sft": TrainRecipe,
    "rl": RlRecipe,
    "eval": EvalRecipe,
}
# Names of transformers, TRL, slime, verl and Megatron, and the last part of our key.
_SYNONYMS = {
    "schedule.learning_rate": "lr max_lr base_lr",
    "schedule.final_learning_rate": "min_lr end_lr",
    "schedule.total_steps": "steps max_steps num_steps train_iters num_rollout",
    "schedule.kind": "lr_scheduler scheduler lr_scheduler_type lr_decay_style",
    "schedule.warmup_steps": "warmup lr_warmup_steps num_warmup_steps lr_warmup_iters",
    "schedule.warmup_fraction": "warmup_ratio lr_warmup_fraction",
    "train.epochs": "num_epochs num_train_epochs total_epochs",
    "train.tracker": "wandb use_wandb report_to logger tensorboard",
    "run.dir": "output output_dir save_dir save out",
    "run.device": "gpu cuda",
    "model.path": "model model_name model_name_or_path hf_checkpoint load",
    "model.recompute": "gradient_checkpointing activation_checkpointing recompute_granularity",
    "model.compute_dtype": "dtype torch_dtype bf16",
    "data.sources.0.path": "data dataset train_file train_files data_path prompt_data train_data",
    "data.sequence_tokens": "seq_len seq_length max_seq_len max_seq_length max_length",
    "data.batch_samples": "batch_size global_batch_size train_batch_size",
    "data.micro_batch_tokens": "max_tokens_per_gpu micro_batch_size",
    "optimizer.weight_decay": "wd",
    "checkpoint.save_every": "save_interval save_steps save_freq",
    "checkpoint.keep": "save_total_limit",
    "train.validate_every": "eval_steps eval_interval eval_every",
    "parallel.tp": "tp_size tensor_parallel tensor_parallel_size tensor_model_parallel_size",
    "parallel.cp": "cp_size context_parallel context_parallel_size",
    "rl.loss": "objective algorithm estimator advantage_estimator adv_estimator policy_loss",
    "rl.kl_coefficient": "kl_coef kl_loss_coef beta",
    "rl.entropy_coefficient": "entropy_coef entropy_coeff",
    "rl.group_size": "n num_generations n_samples_per_prompt n_samples rollout_n",
    "rl.prompts_per_step": "rollout_batch_size",
    "rl.clip_low": "eps_clip clip_ratio clip_ratio_low epsilon",
    "rl.clip_high": "eps_clip_high clip_ratio_high epsilon_high",
    "rl.max_response_tokens": "max_new_tokens max_tokens rollout_max_response_len",
    "evaluate.max_response_tokens": "max_new_tokens max_tokens",
    "rl.reward.0.name": "reward_fn reward_function rm_type reward_model",
    "rollout.engine": "backend rollout_backend inference_engine",
}


def unknown_key(recipe_class: Recipe, key: str) -> str:
    """Return the sentence about a key that does not exist, with the nearest key that does."""
    key = key if len(key) <= MAX_SHOWN else f"{key[:MAX_SHOWN]}…"
    if key in _TRUNCATIONS:
        return (
            f"{key} is not a key: neither engines nor the trainer compute log-probabilities of a "
            "truncated distribution, so RL samples from all tokens; remove it (docs/rl.md)."
        )
    if key.split(".")[0] not in recipe_class.model_fields:
        return _unknown_section(recipe_class, key.split(".")[0])
    known = [leaf.name for leaf in leaf_keys(recipe_class)]
    near = nearest_key(recipe_class, key) or next(
        iter(difflib.get_close_matches(key, known, 1, 0.6)), ""
    )
    return f"{key} is not a key" + (
        f"; did you mean {near}?" if near else "; `infir2 VERB --help` lists the keys."
    )


def nearest_key(recipe_class: Recipe, name: str) -> str:
    """The key that a name stands for, which may lack its section; "" if none resembles it.

    Example: nearest_key(TrainRecipe, "lr") -> "schedule.learning_rate"
    """
    known = [leaf.name for leaf in leaf_keys(recipe_class)]
    leaf_name = name.rpartition(".")[2]
    same = [key for key in known if leaf_name in (key, key.rpartition(".")[2])]
    meant = [key for key, words in _SYNONYMS.items() if leaf_name in words.split()]
    found = same or [key for key in meant if key in known]
    if not found:
        leaves = {key.rpartition(".")[2] for key in known}
        near = difflib.get_close_matches(leaf_name, leaves, 1, 0.75)
        found = [key for key in known if key.rpartition(".")[2] in near]
    in_section = [key for key in found if key.startswith(name.rpartition(".")[0] + ".")]
    return next(iter(in_section or found), "")


def _unknown_section(recipe_class: Recipe, section: str) -> str:
    known = list(recipe_class.model_fields)
    near = difflib.get_close_matches(section.lower(), known, 1, 0.6)
    others = [verb for verb, recipe in _RECIPES.items() if section in recipe.model_fields]
    key = nearest_key(recipe_class, section)
    if others:
        hint = f"it is for infir2 {' or '.join(others)}."
    elif near:
        hint = f"did you mean {near[0]}?"
    elif key.endswith(f".{section}"):
        hint = f"{section} is a key: write it under [{key.rpartition('.')[0]}]."
    elif key:
        hint = f"did you mean the key {key}?"
    else:
        hint = f"the sections are {', '.join(known)}."
    return f"{section} is not a section of this kind of recipe; {hint}"
