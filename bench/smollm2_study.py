"""A real model through the recipe, in FP8 or BF16: CPT, two stages of SFT, RL, scores after each.

    python bench/smollm2_study.py --make-data SHARED --to data/smollm2
    python bench/smollm2_study.py --model DIR --to runs/smollm2 --format pow2 --seed 1 [OPTIONS]
    python bench/smollm2_study.py --to runs/smollm2 --summary

SHARED has corpus/, train/ and eval/ as bench/smollm2.py reads them. A stage that is finished is
left alone and one that was stopped continues, so the same command again goes on. Compare two runs
with `infir2 eval compare TO/pow2-1/eval-rl-sums TO/bf16-1/eval-rl-sums`. OPTIONS, such as
--train.stop_after_step=2, are added to every training, those of --evaluate to every evaluation;
--stages, --tasks, --max-problems and --samples shorten the study. The stage `start` scores the
model as it comes. --summary prints every score and the differences of the formats over seeds.
"""

import argparse
import gzip
import json
import random
import subprocess
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from smollm2_summary import summary

RECIPES = Path(__file__).parents[1] / "recipes" / "smollm2"
BOOKS = ("stacks_project", "openlogic", "hott_book", "openstax_ccby")
MATHEMATICS = ("algebra", "statistics", "mathematics", "Stacks", "OpenLogic", "HoTT")
STAGES = {"cpt": "cpt", "sft1": "sft", "sft2": "sft", "rl": "rl"}
START = "start"
STARTS = {"sft1": "cpt", "sft2": "sft1"}
PROBLEM = "--evaluate.problems.0"
TASKS = {"gsm8k": [f"{PROBLEM}.prompt_field=problem", f"{PROBLEM}.answer_field=answer"], "sums": []}
HELD_OUT, NUM_SUMS, NUM_TEST_SUMS = 50, 4000, 300


def make_data(shared: Path, target: Path) -> None:
    """Write the rows that the recipes read; refuses a directory that exists."""
    target.mkdir(parents=True)
    books = {"cpt": [], "cpt-validation": []}  # type: dict[str, list[dict[str, Any]]]
    for name in BOOKS:
        for row in _rows(shared / f"corpus/{name}.jsonl.gz"):
            if any(word.lower() in str(row["source"]).lower() for word in MATHEMATICS):
                held_out = zlib.crc32(row["text"].encode()) % HELD_OUT == 0
                books["cpt-validation" if held_out else "cpt"].append({"text": row["text"]})
    tables: dict[str, list[dict[str, Any]]] = {
        **books,
        "gsm8k-train": list(map(_boxed, _rows(shared / "train/gsm8k_train.jsonl.gz"))),
        "gsm8k-test": list(map(_boxed, _rows(shared / "eval/gsm8k_test.jsonl.gz"))),
        "long-cot": [
            row
            for row in _rows(shared / "train/longcot_limo291_r1distill32b.jsonl.gz")
            if row["correct"]
        ],
    }
    sums = make_sums(NUM_SUMS + NUM_TEST_SUMS)
    tables["sums-test"], tables["sums-train"] = sums[:NUM_TEST_SUMS], sums[NUM_TEST_SUMS:]
    for name, rows in tables.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (target / f"{name}.jsonl").write_text(text)
        print(f"{name}: {len(rows)} rows, {len(text):,} bytes")


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _boxed(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose solution ends as the answers that are scored do."""
    solution = f"{row['solution']}\nThe answer is \\boxed{{{row['answer']}}}."
    return {"problem": row["problem"], "answer": row["answer"], "solution": solution}


def make_sums(count: int) -> list[dict[str, Any]]:
    """Different problems of two or three numbers below 50, with answers from 0 on."""
    draw = random.Random(0)
    found: dict[str, str] = {}
    while len(found) < count:
        numbers = [draw.randint(1, 49) for _ in range(draw.choice((2, 2, 3)))]
        signs = [draw.choice("+-") for _ in numbers[1:]]
        value = numbers[0]
        text = str(value)
        for sign, number in zip(signs, numbers[1:], strict=True):
            value += number if sign == "+" else -number
            text += f" {sign} {number}"
        if value >= 0:
            found[f"What is {text}? Put the answer in \\boxed{{}}."] = str(value)
    return [{"prompt": prompt, "label": label} for prompt, label in found.items()]


def run_study(options: argparse.Namespace, extra: Sequence[str]) -> None:
    """Every stage and its evaluations; raises CalledProcessError with a stage's exit code."""
    root: Path = options.to / f"{options.format}-{options.seed}"
    form = ["--fp8.enabled=false"]
    if options.format != "bf16":
        form = [f"--fp8.scale_format={options.format}"]
    scored = [word for word in extra if word.startswith("--evaluate.")]
    trained = [word for word in extra if word not in scored]
    for stage in options.stages:
        if stage != START:
            _train(root, stage, options, [*form, *trained])
        for task in options.tasks:
            _evaluate(root, stage, task, options, [*form, *TASKS[task], *scored])


def _train(root: Path, stage: str, options: argparse.Namespace, extra: Sequence[str]) -> None:
    before = options.rl_from if stage == "rl" else STARTS.get(stage)
    start = root / before if before else options.model
    words = [f"--model.path={start}", f"--run.dir={root / stage}", f"--run.seed={options.seed}"]
    words.append(f"--run.device={options.device}")
    if stage == "rl":
        words.append(f"--rollout.model={_exported(start, options.format)}")
    _infir2(STAGES[stage], str(RECIPES / f"study-{stage}.toml"), *words, *extra)


def _exported(run: Path, form: str) -> Path:
    """The weights that the engine loads, exported once."""
    hf, fp8 = run.with_name(f"{run.name}-hf"), run.with_name(f"{run.name}-fp8")
    if not hf.exists():
        _infir2("export", "hf", str(run), "--to", str(hf))
    if form == "bf16":
        return hf
    if not fp8.exists():
        _infir2("export", "fp8", str(hf), "--to", str(fp8), f"--scale-format={form}")
    return fp8


def _evaluate(
    root: Path, stage: str, task: str, options: argparse.Namespace, words: Sequence[str]
) -> None:
    target = root / f"eval-{stage}-{task}"
    if (target / "result.json").exists() or (target / "metrics.jsonl").exists():
        return
    model = options.model if stage == START else root / stage
    own = [f"--model.path={model}", f"--run.dir={target}"]
    own += [f"{PROBLEM}.path=data/smollm2/{task}-test.jsonl"]
    own += [f"--evaluate.max_problems={options.max_problems}", f"--run.seed={options.seed}"]
    own += [f"--evaluate.samples={options.samples}", f"--run.device={options.device}"]
    _infir2("eval", str(RECIPES / "study-eval.toml"), *own, *words)


def _infir2(*words: str) -> None:
    print("infir2", *words, flush=True)
    subprocess.run([sys.executable, "-m", "infir2", *words], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--make-data", type=Path, help="SHARED: write the data to --to, and end")
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="Hugging Face directory of the model")
    parser.add_argument("--format", choices=("pow2", "fp32", "bf16"), default="pow2")
    parser.add_argument("--seed", type=int, default=1)
    stages = (START, *STAGES)
    parser.add_argument("--stages", nargs="+", choices=stages, default=list(stages))
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--summary", action="store_true", help="print the results in --to, and end")
    parser.add_argument("--max-problems", type=int, default=0, help="of each evaluation (0: all)")
    parser.add_argument("--samples", type=int, default=4, help="responses to each problem")
    parser.add_argument("--rl-from", choices=("sft1", "sft2"), default="sft2")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options, extra = parser.parse_known_args()
    if options.make_data is not None:
        make_data(options.make_data, options.to)
        return 0
    if options.summary:
        print("\n".join(summary(options.to, (START, *STAGES), list(TASKS))))
        return 0
    if options.model is None:
        parser.error("--model is missing: a Hugging Face directory")
    try:
        run_study(options, extra)
    except subprocess.CalledProcessError as error:
        return int(error.returncode)
    return 0


if __name__ == "__main__":
    sys.exit(main())
