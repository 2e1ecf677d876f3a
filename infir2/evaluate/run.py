"""`infir2 eval`: sample k responses to every held-out problem, check them, write the scores."""

import json
from dataclasses import asdict
from pathlib import Path

from infir2.checkpoint.record import MetricsWriter
from infir2.config.load import Loaded
from infir2.config.resume import dump
from infir2.config.schema import EvalRecipe
from infir2.engines.native import NativeEngine
from infir2.evaluate.problems import answer_problems, load_problems, summarize
from infir2.files import write_atomically
from infir2.terminal import log_text
from infir2.train.build import build_model, open_tokenizer
from infir2.train.supervisor import describe_environment

SAMPLE_ROWS = 24  # responses written to samples.jsonl


def run_evaluation(loaded: Loaded[EvalRecipe]) -> None:
    """Evaluate `model.path` (a run, or a Hugging Face directory) and write the scores to `run.dir`."""
    recipe = loaded.recipe
    tokenizer, _ = open_tokenizer(recipe.model)
    problems = load_problems(recipe.evaluate)
    engine = NativeEngine(
        build_model(recipe.model, recipe.fp8, recipe.run, tokenizer.vocab_size),
        recipe.rollout.max_running_requests,
    )
    rows = answer_problems(engine, tokenizer, problems, recipe.evaluate, recipe.run.seed)
    scores = summarize(problems, rows, recipe.evaluate.samples)
    directory = Path(recipe.run.dir)
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / "recipe.toml", dump(loaded).encode())
    write_atomically(
        directory / "environment.json",
        json.dumps(describe_environment(), indent=1).encode() + b"\n",
    )
    metrics = MetricsWriter(directory, resumed_step=0)
    metrics.write("evaluation", 1, **asdict(scores))
    metrics.write_samples([{"step": 1} | row for row in rows[:SAMPLE_ROWS]])
    metrics.close()
    log_text(scores.describe())
