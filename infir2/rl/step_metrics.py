"""What a step's rollouts say of the policy and of its reward, for metrics.jsonl.

reward, reward_raw, reward_NAME, accuracy: means over all responses whose reward worked, trained or
    not: of the reward, of it without the penalty for length, of its weighted parts, and of the
    first reward's verdicts.
reward_failures: responses whose reward failed.
response_tokens, response_tokens_p50, response_tokens_p95: mean and percentiles of their lengths.
truncated_fraction, no_answer_fraction: responses at the limit of their length; without an answer
    where the recipe looks for one.
verifier_timeout_fraction, verifier_error_fraction: responses that could not be judged, because it
    took too long, or for another reason: an error, too much memory, a reward that failed. An answer
    that math, code or a scorer cannot judge earns nothing; where the reward failed, the response
    is also in reward_failures.
groups_sampled, groups_without_signal, groups_all_right, groups_all_wrong: of those without signal
    every rated response is right, or every one is wrong.
groups_unfinished: groups that were not finished when enough had signal; they continue in the next
    step (rl.partial) or are dropped.
prompts_resting, level_NAME: prompts that rest after the step, and each task's level.
reward_source_N, response_tokens_source_N: means over the prompts of data.sources.N, if there are
    several.
staleness: versions between the weights that sampled the oldest token and the newest.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from infir2.rl.dynamic_sampling import Rollouts
from infir2.rl.groups import Group, Response
from infir2.verify.verdict import TIMEOUTS

JUDGED = ("ok", "wrong", "no_answer")


def rollout_metrics(rollouts: Rollouts, step: int, seconds: float) -> dict[str, float]:
    """The metrics at the top of this file; `seconds` is the duration of the whole step."""
    groups = rollouts.groups
    responses = [response for group in groups for response in group.responses]
    lengths = np.array([len(response.completion.token_ids) for response in responses])
    versions = [response.completion.oldest_version for response in responses]
    flat = [{r.correct for r in group.rated} for group in groups if not group.has_signal]
    return {
        "tokens_per_second": float(lengths.sum()) / seconds,
        **_reward_metrics(responses),
        **_prompt_metrics(rollouts.state),
        "response_tokens": float(lengths.mean()),
        "response_tokens_p50": float(np.percentile(lengths, 50)),
        "response_tokens_p95": float(np.percentile(lengths, 95)),
        "truncated_fraction": sum(r.is_truncated for r in responses) / len(responses),
        "no_answer_fraction": _share(responses, "no_answer"),
        "verifier_timeout_fraction": _share(responses, *TIMEOUTS),
        "verifier_error_fraction": 1 - _share(responses, *JUDGED, *TIMEOUTS),
        "groups_sampled": len(groups),
        "groups_without_signal": len(flat),
        "groups_all_right": flat.count({True}),
        "groups_all_wrong": flat.count({False}),
        "groups_unfinished": rollouts.num_unfinished,
        "staleness": step - 1 - min(versions),
        **_source_metrics(groups),
    }


def _prompt_metrics(state: dict[str, Any]) -> dict[str, float]:
    levels = {f"level_{name}": level for name, level in state.get("levels", {}).items()}
    return {"prompts_resting": sum(map(len, state.get("resting", {}).values()))} | levels


def _source_metrics(groups: Sequence[Group]) -> dict[str, float]:
    by_source: dict[str, list[Response]] = {}
    for group in groups:
        source = group.prompt.id.partition("/")[0]
        by_source.setdefault(source, []).extend(group.responses)
    if len(by_source) < 2:
        return {}
    metrics: dict[str, float] = {}
    for source, responses in sorted(by_source.items()):
        rewards = [response.reward for response in responses if response.is_rated]
        lengths = [len(response.completion.token_ids) for response in responses]
        metrics[f"reward_source_{source}"] = sum(rewards) / max(1, len(rewards))
        metrics[f"response_tokens_source_{source}"] = sum(lengths) / len(lengths)
    return metrics


def _reward_metrics(responses: Sequence[Response]) -> dict[str, float]:
    rated = [response for response in responses if response.is_rated]
    parts: dict[str, list[float]] = {}
    for response in rated:
        for name, value in response.parts.items():
            parts.setdefault(f"reward_{name}", []).append(value)
    count = max(1, len(rated))
    return {
        "reward": sum(response.reward for response in rated) / count,
        "reward_raw": sum(response.raw for response in rated) / count,
        "accuracy": sum(response.correct for response in rated) / count,
        **{name: sum(values) / len(values) for name, values in parts.items()},
        "reward_failures": len(responses) - len(rated),
    }


def _share(responses: Sequence[Response], *reasons: str) -> float:
    return sum(response.reason in reasons for response in responses) / len(responses)
