"""Write the first recipe for a model and data, with comments on what each value does.

Learning rates are the paper's at 7B (2e-5 for SFT, 1e-4 for CPT, 1e-6 for RL) and grow with the
root of a smaller size, which is a start and not measured.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infir2.config import load
from infir2.config.paths import check_model_directory
from infir2.config.schema import RlRecipe, SourceSection, TrainRecipe
from infir2.data import ChatTokenizer, load_tokenizer
from infir2.errors import ConfigError, DataError, OutputExistsError, disk_reason
from infir2.files import write_atomically
from infir2.model import ModelConfig
from infir2.model.safetensors_io import read_config
from infir2.starter.fields import KIND_OF_TASK, asks_for_answer_line, detect
from infir2.starter.inspection import Inspection, inspect_sources

_PEAK = {"cpt": 1e-4, "sft": 2e-5, "rl": 1e-6}  # of a model of 7.6e9 parameters
_EPOCHS = 3


@dataclass(frozen=True)
class _Start:
    """What a recipe is written from."""

    directory: Path
    model: Path
    task: str
    config: ModelConfig
    found: Inspection
    validation: SourceSection | None

    @property
    def learning_rate(self) -> float:
        scale = (7.6e9 / self.config.num_parameters) ** 0.5
        return float(f"{_PEAK[self.task] * min(50.0, scale):.1g}")

    @property
    def sequence_tokens(self) -> int:
        """The power of two that holds 99 % of the rows, within the model's positions."""
        longest = self.found.percentiles()["p99"]
        tokens: int = 1 << max(7, (longest - 1).bit_length())
        return min(tokens, self.config.max_positions)


def write_recipe(
    directory: Path, model: Path, task: str, data: Path, validation: Path | None
) -> str:
    """Write `directory`/recipe.toml and return what to do with it.

    Raises ConfigError, DataError, CheckpointError and OutputExistsError.
    """
    path = directory / "recipe.toml"
    if path.exists():
        raise OutputExistsError(f"{path} exists; name a new directory. Nothing was written.")
    check_model_directory("--model", str(model))
    if not (model / "config.json").is_file():
        raise ConfigError(
            f"--model {model} has no config.json; name a Hugging Face directory (of a run: "
            f"infir2 export hf {model} --to DIR)."
        )
    config = read_config(model)
    tokenizer = load_tokenizer(model)
    found = _inspect(data, task, tokenizer)
    held_out = detect(validation, KIND_OF_TASK[task])[1] if validation else None
    start = _Start(directory, model, task, config, found, held_out)
    text = _TEXTS[task](start)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())
    except OSError as error:
        reason = disk_reason(error)
        raise ConfigError(f"{path}: cannot be written ({reason}); name another DIR.") from None
    load(RlRecipe if task == "rl" else TrainRecipe, [path], verb=task)
    return _next_steps(start, path)


def _inspect(data: Path, task: str, tokenizer: ChatTokenizer) -> Inspection:
    found = inspect_sources([data], tokenizer, KIND_OF_TASK[task], 0)[0]
    if not found.lengths:
        raise DataError(
            f"--data {data}: no row can be used ({found.example}); "
            f"`infir2 data inspect {data} --tokenizer DIR` shows why."
        )
    return found


def _next_steps(start: _Start, path: Path) -> str:
    run, fp8 = start.directory / "run", start.directory / "fp8"
    lines = [f"{path}: {start.task} of {start.model} on {start.found.section.path}", "Next:"]
    lines += [f"  {_export(start)}"] if start.task == "rl" else []
    lines += [
        f"  infir2 check {start.task} {path}    everything that would fail later fails now",
        f"  infir2 {start.task} {path}    trains; the same command resumes",
        f"  infir2 export fp8 {run} --to {fp8}    for chat, serve, vLLM and SGLang",
        f"  infir2 chat {fp8}",
    ]
    return "\n".join(lines)


def _export(start: _Start) -> str:
    return f"infir2 export fp8 {start.model} --to {start.directory / 'start-fp8'}"


def _head(start: _Start, what: str) -> str:
    lengths = start.found.percentiles()
    return f"""\
# {what}
# Written by infir2 init from {start.found.num_rows:,} rows of {lengths["median"]:,} tokens \
(median; 99 % up to {lengths["p99"]:,}).
#   infir2 check {start.task} {start.directory / "recipe.toml"}
#   infir2 {start.task} {start.directory / "recipe.toml"}
# `infir2 {start.task} --help` lists every key; --section.key=value overrides one.

[run]
dir = {_text(start.directory / "run")}  # checkpoints, metrics, report
seed = 1236

[model]
path = {_text(start.model)}
recompute = "none"  # out of memory: "selective" (GPU) costs 3 %, "full" one more forward

[fp8]
enabled = true  # false trains the same model in BF16
"""


def _text(value: object) -> str:
    """A TOML string."""
    return json.dumps(str(value), ensure_ascii=False)


def _source(name: str, section: SourceSection) -> str:
    values: dict[str, Any] = section.model_dump(exclude_defaults=True)
    return f"\n[[{name}]]\n" + "".join(f"{key} = {_text(each)}\n" for key, each in values.items())


def _sources(start: _Start) -> str:
    text = _source("data.sources", start.found.section)
    return text + (_source("data.validation_sources", start.validation) if start.validation else "")


def _tail(steps: int, validates: bool) -> str:
    every = max(1, min(1000, steps // 5))
    return f"""
[train]
validate_every = {every if validates else 0}  # steps between validation losses; 0: never

[checkpoint]
save_every = {every}  # steps
keep = 2
"""


def _cpt(start: _Start) -> str:
    tokens, rate = start.sequence_tokens, start.learning_rate
    batch = max(1, min(128, start.found.total_tokens // (tokens * 50)))
    steps = max(1, start.found.total_tokens // (tokens * batch))
    decay, warmup = max(1, steps // 5), min(max(0, steps // 20), 2000)
    return f"""\
{_head(start, "Continual pre-training on documents, packed into windows.")}
[data]
sequence_tokens = {tokens}  # length of a window; longer documents are split
batch_sequences = {batch}  # windows of an optimizer step
micro_batch_tokens = {max(tokens, 8192)}  # tokens of one forward pass on one device
{_sources(start)}
[schedule]
kind = "wsd"  # warm-up, stable, decay
learning_rate = {rate:g}
final_learning_rate = {rate / 10:g}
total_steps = {steps}  # about one pass over {start.found.total_tokens:,} tokens
warmup_steps = {warmup}
decay_steps = {decay}
{_tail(steps, start.validation is not None)}"""


def _sft(start: _Start) -> str:
    tokens, rate, rows = start.sequence_tokens, start.learning_rate, start.found.num_rows
    batch = max(1, min(64, rows // 20))
    return f"""\
{_head(start, "Supervised fine-tuning, with the loss on the assistant's turns only.")}
[data]
sequence_tokens = {tokens}  # longer conversations are dropped (data.on_too_long)
batch_samples = {batch}  # conversations of an optimizer step
micro_batch_tokens = {max(tokens, 8192)}  # tokens of one forward pass on one device
{_sources(start)}
[optimizer]
weight_decay = 0.0

[schedule]
kind = "cosine"
learning_rate = {rate:g}
final_learning_rate = {rate / 10:g}
warmup_fraction = 0.05
{_tail(_EPOCHS * rows // batch, start.validation is not None).rstrip()}

# The number of steps follows from the passes over the data.
""".replace("[train]\n", f"[train]\nepochs = {_EPOCHS}.0  # passes over the data\n")


def _rl(start: _Start) -> str:
    # Longer prompts are dropped: half of the positions are the response's.
    longest = 1 << max(7, (start.found.percentiles()["max"] - 1).bit_length())
    prompt = min(longest, start.config.max_positions // 2)
    response = min(8192, start.config.max_positions - prompt)
    groups = max(1, min(128, start.found.num_rows // 4))
    evaluate = ""
    if start.validation:
        evaluate = _source("evaluate.problems", start.validation)
        evaluate += f"\n[evaluate]\nsamples = 4\nmax_response_tokens = {response}\n"
    line = ""
    if asks_for_answer_line(start.found.section):
        line = 'answer_format = "answer_line"  # as the prompts ask; also finds \\boxed{}\n'
    return f"""\
{_head(start, "Reinforcement learning with verified answers (GRPO).")}
[data]
micro_batch_tokens = {max(prompt + response, 8192)}  # tokens of one forward pass on one device
{_source("data.sources", start.found.section)}
[optimizer]
beta2 = 0.98

[schedule]
kind = "constant"
learning_rate = {start.learning_rate:g}
total_steps = {max(1, start.found.num_rows // groups)}  # one pass over the prompts

[rl]
prompts_per_step = {groups}
group_size = 8  # responses to a prompt
over_sample_prompts = {2 * groups}  # at most, to find groups with right and wrong responses
max_prompt_tokens = {prompt}
max_response_tokens = {response}
evaluate_every = {20 if start.validation else 0}
{line}
[rollout]
# The FP8 weights with which the engine starts:
#   {_export(start)}
model = {_text(start.directory / "start-fp8")}

[checkpoint]
save_every = 20  # steps
keep = 2
{evaluate}"""


_TEXTS = {"cpt": _cpt, "sft": _sft, "rl": _rl}
