"""The keys of `[rl]`. Imports no torch."""

import json
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from infir2.config.section import Section

AnswerFormat = Literal["boxed", "answer_line"]
ANSWER_FORMAT = (
    "boxed: the last \\boxed{} is the answer; answer_line: the last line 'Answer: ...' or "
    "the last box, whichever is later"
)


class RewardSection(Section):
    """One of the rewards whose weighted sum a response earns."""

    text_key: ClassVar[str] = "name"  # `reward = "math"` is the table {name = "math"}

    name: str = Field(
        description="math, answer, require_thinking, format, choice, code, reasoning_gym:NAME, "
        "package.module:function or a server's http://HOST:PORT/PATH (docs/rl.md)"
    )
    weight: float = Field(1.0, gt=0, description="factor of this reward in the sum")
    rows: tuple[str, ...] = Field(
        (), description="values of rl.reward_field whose rows it is for (empty: its own name)"
    )


def template_variables(options: Sequence[str]) -> dict[str, Any]:
    """The variables of `rl.template_options`; a value that is not JSON is text.

    Example: `["enable_thinking=false"]` gives `{"enable_thinking": False}`.
    """
    variables: dict[str, Any] = {}
    for option in options:
        name, _, text = option.partition("=")
        try:
            variables[name] = json.loads(text)
        except ValueError:
            variables[name] = text
    return variables


class RlSection(Section):
    prompts_per_step: int = Field(128, gt=0, description="groups trained on per rollout step")
    group_size: int = Field(16, gt=1, description="responses per prompt")
    over_sample_prompts: int = Field(
        384,
        gt=0,
        description="maximum prompts sampled per step to find groups with right and wrong "
        "responses",
    )
    mini_batches: int = Field(
        1, gt=0, description="optimizer updates per pass over the groups of a rollout step"
    )
    passes: int = Field(
        1, gt=0, description="passes over the groups of a rollout step, each with mini_batches"
    )
    loss: str = Field(
        "grpo",
        description="objective of a token: grpo (PPO's clip), gspo (the ratio of the whole "
        "response), cispo, or your own as package.module:function (docs/rl.md)",
    )
    loss_mean: Literal["token", "response", "constant"] = Field(
        "token",
        description="token: all tokens of an update weigh the same (DAPO); response: all "
        "responses (GRPO, GSPO); constant: a response's sum is divided by max_response_tokens "
        "(Dr. GRPO)",
    )
    clip_low: float = Field(
        0.2, gt=0, le=1, description="the probability ratio is clipped below 1 - clip_low"
    )
    clip_high: float = Field(
        0.28, gt=0, description="the probability ratio is clipped above 1 + clip_high"
    )
    clip_dual: float = Field(
        0.0,
        ge=0,
        description="bound of the ratio for negative advantages, such as 3 (dual clip); 0: none",
    )
    correction: Literal["none", "tis", "mis", "icepop"] = Field(
        "tis",
        description="weight of a token for the engine's other probabilities, trainer / rollout. "
        "tis: truncated at correction_cap; mis: 0 above it or below correction_floor; icepop: mis "
        "by token, with a floor; none: 1",
    )
    correction_level: Literal["token", "sequence", "geometric"] = Field(
        "token",
        description="that weight is the token's ratio, the product of the response's, or its "
        "geometric mean",
    )
    correction_cap: float = Field(2.0, gt=0, description="upper bound of that weight")
    correction_floor: float = Field(
        0.0, ge=0, description="lower bound of that weight, for mis and icepop"
    )
    kl_coefficient: float = Field(
        0.0, ge=0, description="weight of the KL to rl.reference in the loss"
    )
    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        "k3", description="estimator of that KL (joschu.net/blog/kl-approx.html)"
    )
    reference: str = Field(
        "",
        description="exported Hugging Face directory of the reference policy, for kl_coefficient",
    )
    entropy_coefficient: float = Field(
        0.0, ge=0, description="weight of the entropy bonus in the loss"
    )
    temperature: float = Field(
        1.0, gt=0, description="sampling temperature; the trainer's log-probabilities use it too"
    )
    stop: tuple[str, ...] = Field(
        (), description="texts that end a response, beside the chat template's end: ['</answer>']"
    )
    response_prefix: str = Field(
        "", description="text with which every response starts, such as '<think>\\n'; not trained"
    )
    template_options: tuple[str, ...] = Field(
        (), description="variables of the chat template, NAME=VALUE: ['enable_thinking=false']"
    )
    max_response_tokens: int = Field(
        8192, gt=0, description="maximum response length, tokens; longer responses are truncated"
    )
    max_prompt_tokens: int = Field(
        2048, gt=0, description="maximum prompt length, tokens; longer prompts are dropped"
    )
    mask_truncated: bool = Field(
        False, description="do not train on truncated responses; their rewards still count"
    )
    overlong_buffer_tokens: int = Field(
        0,
        ge=0,
        description="soft overlong penalty: it grows linearly over this many tokens before "
        "max_response_tokens (0: no penalty)",
    )
    overlong_penalty: float = Field(1.0, ge=0, description="maximum soft overlong penalty")
    normalize_by_std: bool = Field(
        True, description="divide advantages by the standard deviation of the group's rewards"
    )
    unbiased_std: bool = Field(
        False, description="that deviation divides by group_size - 1, as in slime and TRL"
    )
    max_mismatch_kl: float = Field(
        0.05, gt=0, description="stop when the mean KL between rollout and trainer exceeds this"
    )
    max_mismatch_prob_error: float = Field(
        1.5,
        gt=1,
        description="stop when the mean of exp(|log-probability difference|) between rollout and "
        "trainer exceeds this",
    )
    chunk_tokens: int = Field(
        0,
        ge=0,
        description="generate responses in chunks of this many tokens, so that sampling stops once "
        "enough groups have signal and waits for no longer response (0: whole responses)",
    )
    partial: bool = Field(
        False,
        description="continue the groups that are not finished then in the next step, with its "
        "weights, instead of dropping them",
    )
    max_off_policy_steps: int = Field(
        0,
        ge=0,
        description="how many policy versions older than the newest the weights may be that begin "
        "a response; 0: sample and train in turn; else sample while the trainer works, with new "
        "weights every so many steps",
    )
    keep_rollouts: bool = Field(
        False,
        description="keep every step's prompts, responses and rewards in run.dir/kept_rollouts, "
        "for the report and for --train-only (about 50 bytes a token)",
    )
    evaluate_every: int = Field(20, ge=0, description="steps between evaluations (0: never)")
    answer_format: AnswerFormat = Field("boxed", description=ANSWER_FORMAT)
    reward_field: str = Field(
        "", description="field of the rows that chooses among the rewards (empty: all of them)"
    )
    reward_seconds: float = Field(
        10.0,
        gt=0,
        description="time limit of a test of code, a function, a scorer or a server, seconds",
    )
    reward_failures: int = Field(
        16,
        ge=0,
        description="responses of a step whose reward may fail on a rank before the run stops",
    )
    environment: str = Field(
        "",
        description="answers the policy's turns: calculator, or your own class with reset and step "
        "as package.module:Class (empty: one turn)",
    )
    max_turns: int = Field(
        4, gt=1, description="turns of the policy in an episode, with rl.environment"
    )
    rest_epochs: int = Field(
        0, ge=0, description="epochs for which a prompt rests that all responses have got right"
    )
    gym_problems: int = Field(
        1000, gt=0, description="problems of a task of reasoning-gym in an epoch"
    )
    gym_raise_at: float = Field(
        0.9,
        gt=0,
        le=1,
        description="a task gets harder after a step with at least this mean score",
    )
    reward: tuple[RewardSection, ...] = Field(
        (RewardSection(name="math"),), description="the rewards; their weighted sum is trained"
    )
