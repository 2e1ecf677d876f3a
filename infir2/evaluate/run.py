"""`infir2 eval`: sample k responses to every held-out problem, check them, write the scores."""

from pathlib import Path

from infir2.config.load import Loaded
from infir2.config.schema import EvalRecipe
from infir2.engines.native import NativeEngine
from infir2.evaluate.output import check_output, claim_output, write_results
from infir2.evaluate.problems import answer_problems, load_problems, summarize
from infir2.terminal import log_text
from infir2.train.build import build_model, open_tokenizer


def run_evaluation(loaded: Loaded[EvalRecipe]) -> None:
    """Evaluate `model.path` (a run or a Hugging Face directory) and write the scores to `run.dir`.

    Everything that can refuse the command does so before the first response is sampled. Raises
    OutputExistsError and ConfigError as `check_output` and `claim_output`, and the errors of
    loading the model, the tokenizer and the problems.
    """
    recipe = loaded.recipe
    check_output(Path(recipe.run.dir))
    tokenizer, _ = open_tokenizer(recipe.model)
    problems = load_problems(recipe.evaluate)
    model = build_model(recipe.model, recipe.fp8, recipe.run, tokenizer.vocab_size)
    directory = claim_output(loaded)
    engine = NativeEngine(model, recipe.rollout.max_running_requests)
    rows = answer_problems(engine, tokenizer, problems, recipe.evaluate, recipe.run.seed)
    scores = summarize(problems, rows, recipe.evaluate.samples)
    log_text(scores.describe())
    write_results(directory, scores, rows)
