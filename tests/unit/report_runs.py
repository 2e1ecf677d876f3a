"""Synthetic run directories that look like those of a real recipe, for the report's tests."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

RECIPE = """# Resolved recipe: every key with its value and where the value came from.

[run]
dir = "{dir}"  # file
seed = 1236  # default

[model]
path = "{base}"  # file

[fp8]
enabled = {fp8}  # file
scale_format = "pow2"  # default

[schedule]
kind = "wsd"  # file
learning_rate = {rate}  # file
"""
MODEL = {
    "model_type": "qwen2",
    "vocab_size": 512,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 384,
    "tie_word_embeddings": True,
}
QUESTION = (
    "Natalia sold clips to 48 friends in April, and then half as many in May. "
    "How many clips did she sell altogether?"
)
THOUGHT = (
    "<think>\nIn April 48. In May 48 / 2 = 24. Sum: 48 + 24 = 72.\n</think>\n"
    "The answer is \\boxed{72}."
)


def describe(
    run_dir: Path, kind: str, base: str = "", fp8: bool = True, rate: float = 1e-3
) -> Path:
    """Recipe, environment and the newest checkpoint's state."""
    state = run_dir / "checkpoints" / "step-100" / "state.json"
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps({"kind": kind, "model_config": MODEL}))
    (run_dir / "recipe.toml").write_text(
        RECIPE.format(dir=run_dir, base=base, fp8=str(fp8).lower(), rate=rate)
    )
    command = [
        "/venv/bin/infir2",
        kind,
        f"recipes/demo/{run_dir.name}.toml",
        f"--run.dir={run_dir}",
    ]
    environment = {
        "infir2": "0.1.0",
        "torch": "2.13.0+cpu",
        "python": "3.11.2",
        "device": "cpu",
        "threads": 2,
        "command": command,
    }
    (run_dir / "environment.json").write_text(
        json.dumps(environment | {"commit": "2d6288a", "variables": {"OMP_NUM_THREADS": "2"}})
    )
    return run_dir


def write(run_dir: Path, rows: list[dict[str, Any]], name: str = "metrics.jsonl") -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def train_rows(
    steps: int, start: float, end: float, seed: int, rate: float = 1e-3, offset: float = 0.0
) -> list[dict[str, Any]]:
    """A falling loss with warm-up and decay; step steps//3 is skipped, with a null loss."""
    noise, own = np.random.default_rng(seed), np.random.default_rng(seed + 100 + bool(offset))
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        done = step / steps
        loss = (
            end
            + (start - end) * math.exp(-6 * done)
            + 0.04 * noise.normal()
            + 0.004 * own.normal()
            + offset
        )
        skipped = step == steps // 3 and not offset
        seconds = 0.42 + 0.02 * own.random()
        row = {
            "kind": "train",
            "step": step,
            "loss": None if skipped else loss,
            "learning_rate": rate * min(1, done * 20, (1.02 - done) * 5),
        }
        row |= {
            "gradient_norm": None
            if skipped
            else 0.7 + 0.2 * own.random() + 8 * math.exp(-80 * done),
            "trained_tokens": 4096,
        }
        rows.append(
            row | {"tokens_per_second": 4096 / seconds, "seconds": seconds, "skipped": skipped}
        )
        if skipped:
            rows.append(
                {
                    "kind": "event",
                    "step": step,
                    "event": "non_finite",
                    "detail": "loss nan, gradient norm inf; no parameter changed",
                }
            )
        if step % 25 == 0 or step == steps:
            rows.append(
                {
                    "kind": "validation",
                    "step": step,
                    "validation_loss": end + (start - end) * math.exp(-6 * done) + offset + 0.02,
                }
            )
    return rows


def rl_rows(steps: int, low: float, high: float, seed: int) -> list[dict[str, Any]]:
    noise = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        done = 1 - math.exp(-3 * step / steps)
        reward = low + (high - low) * done + 0.05 * noise.normal()
        row = {
            "kind": "train",
            "step": step,
            "loss": 0.01 * noise.normal(),
            "learning_rate": 1e-5,
            "gradient_norm": 0.3 + 0.1 * noise.random(),
        }
        row |= {
            "trained_tokens": 9000,
            "tokens_per_second": 900 + 60 * noise.normal(),
            "seconds": 9.7,
            "skipped": False,
            "policy_version": step,
        }
        row |= {
            "reward": reward,
            "accuracy": min(1.0, max(0.0, reward)),
            "response_tokens": 60 + 45 * done + 4 * noise.normal(),
            "truncated_fraction": max(0.0, 0.12 - 0.1 * done),
            "no_answer_fraction": max(0.0, 0.15 - 0.1 * done),
            "verifier_timeout_fraction": 0.001,
            "verifier_error_fraction": 0.0,
        }
        row |= {
            "entropy": 0.9 - 0.5 * done + 0.02 * noise.normal(),
            "clip_fraction": 0.002 * noise.random(),
            "capped_fraction": 0.0004 * noise.random(),
        }
        row |= {
            "mismatch_kl": 10 ** (-5 + 0.2 * noise.normal()),
            "mismatch_mean": 10 ** (-2.6 + 0.1 * noise.normal()),
        }
        row |= {
            "mismatch_max": 10 ** (-0.5 + 0.2 * noise.normal()),
            "groups_sampled": 24 + int(noise.integers(9)),
            "groups_without_signal": int(8 + 10 * done),
            "groups_all_right": int(1 + 9 * done),
            "groups_all_wrong": int(7 - 6 * done),
        }
        rows.append(row)
        if step % 10 == 0:
            rows.append(evaluation(step, low + (high - low) * done, half=0.05, problems=64))
    return rows


def evaluation(
    step: int, accuracy: float, half: float = 0.03, problems: int = 200, k: int = 4
) -> dict[str, Any]:
    levels = {
        str(level): min(1.0, max(0.0, accuracy + 0.35 - 0.15 * level)) for level in range(1, 6)
    }
    row = {
        "kind": "evaluation",
        "step": step,
        "avg_at_k": accuracy,
        "low": max(0.0, accuracy - half),
        "high": min(1.0, accuracy + half),
        "k": k,
        "pass_at_k": min(1.0, accuracy + 0.15),
    }
    return row | {
        "num_problems": problems,
        "truncated_fraction": 0.2 * (1 - accuracy),
        "by_difficulty": levels,
    }


def sample(step: int, reward: float, **changes: Any) -> dict[str, Any]:
    row = {
        "step": step,
        "prompt": QUESTION,
        "response": THOUGHT,
        "answer": "72",
        "reward": reward,
        "truncated": False,
    }
    return row | changes


def demo_recipe(root: Path) -> Path:
    """root/{cpt,cpt-bf16,sft1,sft2,rl1,rl2} and evaluations, as `make demo` writes them."""
    stages = [("cpt", 300, 5.9, 1.9), ("sft1", 160, 1.4, 0.55), ("sft2", 200, 0.62, 0.31)]
    base = ""
    for index, (name, steps, start, end) in enumerate(stages):
        rate = 3e-3 / (index + 1)
        write(
            describe(root / name, "cpt" if name == "cpt" else "sft", base, rate=rate),
            train_rows(steps, start, end, index, rate),
        )
        base = str(root / name)
    write(
        describe(root / "cpt-bf16", "cpt", fp8=False, rate=3e-3),
        train_rows(300, 5.9, 1.9, 0, 3e-3, offset=-0.004),
    )
    for index, (name, low, high) in enumerate((("rl1", 0.42, 0.66), ("rl2", 0.64, 0.78))):
        run_dir = describe(root / name, "rl", base, rate=1e-5)
        write(run_dir, rl_rows(60, low, high, 10 + index))
        rows = [
            sample(step, float(row % 3 != 0), prompt=f"{QUESTION} ({row})", truncated=row == 4)
            for step in (1, 30, 60)
            for row in range(8)
        ]
        write(run_dir, rows, "samples.jsonl")
        base = str(run_dir)
    for name, accuracy in (
        ("cpt", 0.031),
        ("sft1", 0.29),
        ("sft2", 0.43),
        ("rl1", 0.655),
        ("rl2", 0.782),
    ):
        write(root / f"eval-{name}", [evaluation(0, accuracy)])
        (root / f"eval-{name}" / "recipe.toml").write_text(f'[model]\npath = "{root / name}"\n')
    return root
