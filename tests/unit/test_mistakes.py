"""Twenty likely mistakes with each verb: one sentence with the file or key and what to do about it.

Each row is a command line, its exit code and a part of the sentence; a recipe is one of RECIPES, or
of them with one edit (EDITS). What has torn files, and what several verbs have in common, is in
test_cli_mistakes.py; the verbs before a run are in test_cli_verb_mistakes.py, plan in
test_planner.py.
"""

import json
import re
import shlex
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest
from mistakes import each, sentence_of
from stages import make_model, make_world, options, run

from infir2 import terminal
from infir2.cli import main
from infir2.config.paths import refuse_tildes

COMMON = """[run]
dir = "new"
threads = 1
[data]
tokenizer = "world/tokenizer"
sequence_tokens = 128
micro_batch_tokens = 256
"""
SHAPE = """[model.shape]
hidden_size = 40
num_layers = 2
num_heads = 4
num_kv_heads = 2
head_dim = 16
ffn_size = 136
"""
SCHEDULE = "[schedule]\nlearning_rate = 1e-3\ntotal_steps = 4\n"
CPT = f'{COMMON}batch_sequences = 2\n[[data.sources]]\npath = "world/cpt.jsonl"\n{SHAPE}{SCHEDULE}'
SFT = (
    f'{COMMON}batch_samples = 4\n[[data.sources]]\npath = "world/sft1.jsonl"\n'
    f'[model]\npath = "hf"\n{SCHEDULE}'
)
RL = f"""{COMMON}[[data.sources]]
path = "world/rl1.jsonl"
[model]
path = "hf"
{SCHEDULE}[rl]
prompts_per_step = 3
over_sample_prompts = 4
group_size = 4
max_response_tokens = 8
[rollout]
model = "fp8"
"""
EVAL = """[run]
dir = "new"
[model]
path = "hf"
[[evaluate.problems]]
path = "world/heldout.jsonl"
[evaluate]
samples = 2
max_response_tokens = 8
"""
FAR = "--rollout.engine=infir2 --rollout.urls='[\"http://10.0.0.7:8000\"]'"
RECIPES = {"cpt.toml": CPT, "sft.toml": SFT, "rl.toml": RL, "eval.toml": EVAL}
EDITS = {  # file: (recipe, what it has, what it should have had)
    "misspelt.toml": (CPT, "learning_rate", "learning_rte"),
    "text.toml": (CPT, "1e-3", '"1e-3"'),
    "unquoted.toml": (CPT, '"new"', "new"),
    "open.toml": (CPT, '"new"', '"new'),
    "unequal.toml": (CPT, "dir = ", "dir "),
    "comma.toml": (CPT, "1e-3", "0,001"),
    "upper.toml": (CPT, "threads = 1", "seed = True"),
    "null.toml": (CPT, "threads = 1", "threads = None"),
    "yaml.toml": (CPT, "[run]", "run:"),
    "twice.toml": (CPT, "[schedule]", "[run]\n[schedule]"),
    "windows.toml": (CPT, '"new"', r'"C:\Users\me"'),
    "escape.toml": (CPT, '"new"', r'"C:\new"'),
    "comment.toml": (CPT, "1e-3", "1e-3  // fast"),
    "typographic.toml": (CPT, '"new"', "“new”"),
    "float.toml": (CPT, "total_steps = 4", "total_steps = 1e3"),
    "nosection.toml": (CPT, "[run]\n", ""),
    "top.toml": (CPT, "[run]", "lr = 1e-4\n[run]"),
    "case.toml": (CPT, "[schedule]", "[Schedule]"),
    "single.toml": (CPT, "[[data.sources]]", "[data.sources]"),
    "tilde.toml": (SFT, '"hf"', '"~/hf"'),
    "variable.toml": (SFT, '"hf"', '"$MODELS/hf"'),
    "recipe.yaml": (CPT, "[run]", "run:"),
}
TOKENIZER = "--tokenizer world/tokenizer"
SOURCE = "--data.sources.0.path"
BENCH = "--benchmarks aime24 --data empty"
MISTAKES = [
    # cpt: the recipe's text
    ("cpt misspelt.toml", 2, "schedule.learning_rte is not a key; did you mean schedule.learning_"),
    ("cpt text.toml", 2, "text.toml: schedule.learning_rate must be a number, not '1e-3'."),
    ("cpt unquoted.toml", 2, 'line 2, column 7) in `dir = new`: text needs quotes: KEY = "VALUE".'),
    ("cpt open.toml", 2, 'in `dir = "new`: the closing quote is missing.'),
    ("cpt unequal.toml", 2, 'in `dir "new"`: write KEY = VALUE.'),
    ("cpt comma.toml", 2, "in `learning_rate = 0,001`: the decimal sign is a point."),
    ("cpt upper.toml", 2, "in `seed = True`: write true and false in lower case."),
    ("cpt null.toml", 2, "in `threads = None`: there is no empty value; remove the line."),
    ("cpt yaml.toml", 2, "in `run:`: write KEY = VALUE, not KEY: VALUE."),
    ("cpt recipe.yaml", 2, "a recipe is a .toml file, and infir2 init writes one."),
    ("cpt twice.toml", 2, "in `[run]`: this section is in the file already; put all its keys und"),
    ("cpt windows.toml", 2, "a backslash starts an escape; write / or put the text in single quo"),
    ("cpt escape.toml", 2, "escape.toml: run.dir = 'C:\\new' contains a control character: a back"),
    ("cpt comment.toml", 2, "// fast`: a comment begins with #."),
    ("cpt typographic.toml", 2, "quotes are \" or ', not the typographic ones."),
    ("cpt float.toml", 2, "total_steps must be an integer (1000, without point and exponent), not"),
    ("cpt nosection.toml", 2, "dir is not a section of this kind of recipe; dir is a key: write i"),
    ("cpt case.toml", 2, "Schedule is not a section of this kind of recipe; did you mean schedul"),
    ("cpt single.toml", 2, "data.sources is a list of tables, so write [[data.sources]] and keys"),
    ("cpt utf16.toml", 2, "save the file as UTF-8."),
    # cpt: the command line
    ("cpt", 2, "infir2 cpt needs a recipe, such as one in recipes/demo"),
    ("cpt cpt", 2, "cpt: there is no such recipe file; did you mean cpt.toml?"),
    ("cpt cpt.toml --schedule.total_steps = 4", 2, "write it as --schedule.total_steps=VALUE."),
    ("cpt cpt.toml --schedule.total_steps 4", 2, "write it as --schedule.total_steps=4."),
    ("cpt cpt.toml --sead=5", 2, "Did you mean --run.seed=5?"),
    ("cpt cpt.toml --gpus=8", 2, "infir2 launch torchrun --gpus-per-node M -- VERB ... runs on se"),
    ("cpt cpt.toml --accept-change", 2, "Did you mean --accept-changes?"),
    ("cpt cpt.toml --optimizer.lr=1e-3", 2, "lr is not a key; did you mean schedule.learning_rate"),
    ("cpt cpt.toml --run.device=cuda", 2, "run.device is cuda, but torch sees no GPU: set run.dev"),
    ("cpt cpt.toml --run.dir=hf", 2, "hf holds a model (config.json), and a run would write into"),
    (
        "cpt top.toml",
        2,
        "lr is not a section of this kind of recipe; did you mean the key schedule.",
    ),
    ("cpt cpt.toml --run.dir=~/o", 2, "--run.dir: ~/o: only a shell knows ~, at the start of a wo"),
    ("cpt cpt.toml --data.tokenizer=Qwen/Q", 2, "hf download Qwen/Q --include 'tokenizer*' --loca"),
    ("cpt cpt.toml --data.tokenizer=world/tokenizer/tokenizer.json", 2, "a file; name its direct"),
    (f"cpt cpt.toml {SOURCE}=HuggingFaceFW/fineweb", 4, "hf download --repo-type dataset HuggingF"),
    (f"cpt cpt.toml {SOURCE}=no/c.jsonl", 4, "no/c.jsonl does not exist: name a file or a direct"),
    (f"cpt cpt.toml {SOURCE}=alone.bin", 4, "alone.idx cannot be read (No such file or directory"),
    (f"cpt cpt.toml {SOURCE}=world/sft1.jsonl", 4, "these look like conversations, for infir2 sft"),
    (f"cpt cpt.toml {SOURCE}=x.csv", 4, "x.csv is a table, which is not read: write it as"),
    ("cpt rl.toml", 2, "rl is not a section of this kind of recipe; it is for infir2 rl."),
    ("cpt sft.toml", 2, "data.batch_samples is for SFT; set data.batch_sequences"),
    # sft
    ("sft tilde.toml", 2, "tilde.toml: model.path = '~/hf': only a shell knows ~"),
    ("sft variable.toml", 2, "model.path = '$MODELS/hf': a recipe knows no variables; write the"),
    ("sft sft.toml --model.path=adapter", 3, "adapter is a LoRA adapter, not a model; merge it in"),
    ("sft sft.toml --model.path=lfs", 3, "lfs/model.safetensors is a pointer of Git LFS, not the"),
    ("sft sft.toml --model.path=pickle", 3, "pickle has only pickled weights (.bin, .pt), which c"),
    ("sft sft.toml --model.path=gpt2", 3, "gpt2/config.json: model_type 'gpt2' is not supported"),
    ("sft sft.toml --model.path=nocfg", 3, "nocfg/config.json is missing; name a complete Hugging"),
    ("sft sft.toml --model.path=torn", 3, "torn/model.safetensors is not a complete safetensors f"),
    ("sft sft.toml --model.path=hf/config.json", 2, "is a file of a model; name its directory, hf"),
    ("sft sft.toml --model.path=fp8", 3, "train from BF16 weights: infir2 import fp8 fp8 --to NEW"),
    ("sft sft.toml --data.tokenizer=bigtok", 2, "set data.tokenizer to the model's own."),
    (
        "sft sft.toml --data.tokenizer=bigtok --model.path=bigtok",
        2,
        "tokens and the model 156 row",
    ),
    (
        "sft sft.toml --data.sequence_tokens=40000 --data.micro_batch_tokens=40000",
        2,
        "data.sequence_tokens = 40000 exceeds the model's 32768 positions (max_position",
    ),
    ("sft sft.toml --data.batch_sequences=4", 2, "and data.batch_samples are both set; keep one"),
    (f"sft sft.toml {SOURCE}=sharegpt.jsonl", 4, "has no field `messages` (it has conversations):"),
    (f"sft sft.toml {SOURCE}=world/cpt.jsonl", 4, "these look like documents, for infir2 cpt;"),
    (f"sft sft.toml {SOURCE}=empty.jsonl", 4, "empty.jsonl has no row: add rows, or remove it"),
    ("sft sft.toml --data.sources.2.path=x", 2, "is not an element of data.sources, which has 1"),
    ("sft sft.toml --run.wandb=true", 2, "run.wandb is not a key; did you mean train.tracker?"),
    ("sft sft.toml --train.gradient_checkpointing=true", 2, "did you mean model.recompute?"),
    ("sft sft.toml --run.dir=run", 2, "run/recipe.toml: this run was started with model.path = ''"),
    ("rl rl.toml --run.dir=run", 2, "run: this is a run of infir2 cpt or sft; name a new run.dir."),
    ("sft sft.toml --checkpoint.branch_from=nope", 3, "nope: is neither a checkpoint (step-N) nor"),
    ("sft world/sft1.jsonl", 2, "a recipe is a .toml file, and infir2 init writes one."),
    # rl
    ("rl sft.toml", 2, "data.batch_samples is not used by RL, whose batch is rl.prompts_per_step"),
    ("rl rl.toml --rl.groupsize=8", 2, "rl.groupsize is not a key; did you mean rl.group_size?"),
    ("rl rl.toml --rl.objective=ppo", 2, "rl.objective is not a key; did you mean rl.loss?"),
    ("rl rl.toml --rl.kl_coef=0.1", 2, "rl.kl_coef is not a key; did you mean rl.kl_coefficient?"),
    ("rl rl.toml --rl.top_p=0.9", 2, "so RL samples from all tokens; remove it (docs/rl.md)."),
    ("rl rl.toml --rl.group_size=1", 2, "rl.group_size must be greater than 1, not 1."),
    ("rl rl.toml --rl.temperature=0", 2, "rl.temperature must be greater than 0, not 0."),
    ("rl rl.toml --rl.over_sample_prompts=2", 2, "(2) must be at least rl.prompts_per_step (3)."),
    ("rl rl.toml --rl.mini_batches=5", 2, "rl.mini_batches (5) must not exceed rl.prompts_per_ste"),
    ("rl rl.toml --rl.reward=mathh", 2, "'mathh' is unknown; did you mean math?"),
    ("rl rl.toml --rollout.engine=tgi", 2, "must be 'native', 'infir2', 'sglang' or 'vllm'"),
    ("rl rl.toml --rollout.engine=vllm", 2, "rollout.python is missing; name the Python interpret"),
    ("rl rl.toml --rollout.url=http://x", 2, "is not a key; did you mean rollout.urls?"),
    ("rl rl.toml --rollout.model=nope", 2, "rollout.model: nope does not exist; run the stage tha"),
    ("rl rl.toml --rl.max_response_tokens=40000", 2, "exceeds the model's 32768 positions"),
    ("rl rl.toml --train.epochs=1", 2, "is not used by RL, whose length is schedule.total_steps"),
    ("rl rl.toml --rollout-onyl", 2, "Did you mean --rollout-only?"),
    ("rl rl.toml --train-only=nope", 2, "nope has no kept_rollouts: name the run.dir of a run wit"),
    ("rl rl.toml --rollout-only --train-only=run", 2, "exclude each other; remove one."),
    (f"rl rl.toml {SOURCE}=world/sft1.jsonl", 4, "these look like conversations, for infir2 sft;"),
    (f"rl rl.toml {SOURCE}=BytedTsinghua-SIA/DAPO-Math-17k", 4, "hf download --repo-type dataset"),
    ("rl rl.toml --evaluate.problems.0.path=nope.jsonl", 4, "nope.jsonl does not exist: name a fi"),
    # eval and its commands
    ("eval", 2, "infir2 eval needs a recipe"),
    ("eval cpt.toml", 2, "data is not a section of this kind of recipe; it is for infir2 cpt or s"),
    ("eval eval.toml --evaluate.sample=4", 2, "is not a key; did you mean evaluate.samples?"),
    (
        "eval eval.toml --evaluate.max_response_tokens=40000",
        2,
        "exceeds the model's 32768 positions",
    ),
    ("eval eval.toml --model.path=nocfg", 3, "nocfg/config.json is missing; name a complete"),
    ("eval eval.toml --run.dir=run", 2, "run exists and is not an evaluation's directory"),
    ("eval eval.toml --run.dir=x.csv", 2, "x.csv is not a directory that can be read"),
    ("eval eval.toml --evaluate.problems.0.path=world/cpt.jsonl", 4, "has no field `prompt` (it h"),
    ("eval compar a b", 2, "infir2 eval compar: did you mean infir2 eval compare?"),
    ("eval compare run", 2, "the following arguments are required: B"),
    ("eval compare run run", 4, "run has no answers of an evaluation: name the run.dir of"),
    ("eval contamination --train world/cpt.jsonl --data nope", 4, "name a file or directory of q"),
    ("eval contamination --train nope --data world/heldout.jsonl", 4, "nope does not exist: name"),
    ("eval contamination --train world/cpt.jsonl --data bad.jsonl", 4, "has no field `problem` (i"),
    ("eval contamination --training x --data y", 2, "did you mean --train?"),
    (f"eval {BENCH} --run.dir=e", 2, "infir2 eval --benchmarks needs a MODEL or URL; see `infir2"),
    (f"eval hf {BENCH}", 2, "infir2 eval --benchmarks needs --run.dir; see"),
    ("eval hf --benchmarks aime99 --data empty --run.dir=e", 2, "'aime99' is not a benchmark; di"),
    (f"eval hf {BENCH} --run.dir=e --temperature hot", 2, "invalid temperature value: 'hot'"),
    ("eval hf --run.dir=e", 2, "infir2 eval hf --benchmarks NAMES --data DIR runs benchmarks"),
    # check; a failed check is a line of its own, above
    ("check", 2, "infir2 check needs a recipe"),
    ("check nope.toml", 2, "nope.toml: there is no such recipe file"),
    ("check stf sft.toml", 2, "stf is not a verb of check; did you mean sft?"),
    ("check hf", 2, "hf: this is a directory; name a recipe, a .toml file"),
    ("check cpt sft.toml", 2, "data.batch_samples is for SFT"),
    ("check rl sft.toml", 2, "data.batch_samples is not used by RL"),
    ("check eval cpt.toml", 2, "data is not a section of this kind of recipe; it is for infir2 cp"),
    ("check sft.toml --model.pth=hf", 2, "model.pth is not a key; did you mean model.path?"),
    ("check sft.toml --jsno", 2, "Did you mean --json?"),
    ("check sft.toml --fix", 2, "--fix is not an option of infir2 check"),
    # export, import, verify-weights
    ("export", 2, "the following arguments are required: hf|fp8|megatron"),
    ("export hf run", 2, "are required: --to"),
    ("export hf run --too o", 2, "--too is not an option, did you mean --to?"),
    ("export gguf run --to o", 2, "invalid choice: 'gguf' (choose from 'hf', 'fp8', 'megatron')"),
    ("export hf run --to=~/o", 2, "--to: ~/o: only a shell knows ~"),
    ("export hf run --to x.csv/o", 3, "x.csv/o cannot be written: Not a directory"),
    ("export hf run --to world", 2, "world: exists already, and another command or another input"),
    ("export hf x.csv --to o", 3, "SRC: x.csv is a file; name a run or a model's directory."),
    ("export hf run/checkpoints/step-9 --to o", 3, "step-9 does not exist; run the stage that wri"),
    ("export hf hf --to o", 3, "hf: is a Hugging Face directory already; infir2 export hf reads a"),
    ("export fp8 fp8 --to o", 3, "is not quantized yet; name the other directory, or infir2 impor"),
    ("export fp8 nocfg --to o", 3, "nocfg is neither a run with a checkpoint (checkpoints/step-N)"),
    ("export fp8 empty --to o", 3, "empty is neither a run with a checkpoint (checkpoints/step-N)"),
    ("export fp8 gpt2 --to o", 3, "gpt2/config.json: model_type 'gpt2' is not supported"),
    ("export fp8 lfs --to o", 3, "is a pointer of Git LFS, not the weights; run git lfs pull"),
    ("export fp8 torn --to o", 3, "is not a complete safetensors file"),
    ("export fp8 pickle --to o", 3, "pickle has only pickled weights (.bin, .pt)"),
    ("export fp8 hf --to o --scale-format=ue8m0", 2, "(choose from 'pow2', 'fp32')"),
    ("export megatron nope --to o", 3, "SRC: nope does not exist; run the stage that writes it"),
    ("export megatron run --to o --tp 2", 2, "unrecognized arguments: --tp 2; see `infir2 export"),
    ("import", 2, "the following arguments are required: hf|fp8|megatron"),
    ("import hf", 2, "the following arguments are required: SRC, --to"),
    ("import hf x.csv --to o", 3, "SRC: x.csv is a file; name a model's directory or a .gguf file"),
    ("import hf file.gguf --to o", 3, "file.gguf: is not a GGUF file that can be read"),
    ("import gguf file.gguf --to o", 2, "invalid choice: 'gguf' (choose from 'fp8', 'hf', 'megatr"),
    ("import hf nope.gguf --to o", 3, "SRC: nope.gguf does not exist"),
    ("import hf nocfg --to o", 3, "nocfg/config.json is missing; name a complete Hugging Face"),
    ("import hf adapter --to o", 3, "adapter is a LoRA adapter, not a model; merge it into its"),
    ("import hf gpt2 --to o", 3, "gpt2/config.json: model_type 'gpt2' is not supported"),
    ("import hf torn --to o", 3, "is not a complete safetensors file"),
    ("import hf run --to o", 3, "run: is a run of infir2, which needs no import"),
    ("import fp8 hf --to o", 3, "it is not quantized, and infir2 export fp8 hf --to DIR does that"),
    ("import fp8 nope --to o", 3, "SRC: nope does not exist"),
    ("import fp8 fp8 --to hf", 2, "hf: exists already, and another command or another input made"),
    ("import fp8 fp8 --to", 2, "argument --to: expected one argument"),
    ("import megatron hf --to o", 3, "hf: is not a Megatron torch_dist checkpoint"),
    ("import megatron empty --to o", 3, "empty: is not a Megatron torch_dist checkpoint"),
    ("import megatron nope --to o", 3, "SRC: nope does not exist"),
    ("import megatron run --to o", 3, "run: is a run of infir2, which needs no import"),
    ("import megatron hf --lik hf2", 2, "the following arguments are required: --to"),
    ("verify-weights", 2, "the following arguments are required: RUN, HF_FP8_DIR"),
    ("verify-weights run", 2, "the following arguments are required: HF_FP8_DIR"),
    ("verify-weights fp8 run", 2, "the run comes first: infir2 verify-weights run fp8."),
    ("verify-weights run hf", 3, "it is not quantized, and infir2 export fp8 hf --to DIR does tha"),
    ("verify-weights run nope", 2, "HF_FP8_DIR: nope does not exist; run the stage that writes it"),
    ("verify-weights empty fp8", 3, "RUN: empty is no run directory; name the run, or its"),
    ("verify-weights run fp8 --engin", 2, "argument --engine: expected one argument"),
    ("verify-weights run fp8 --engne http://x", 2, "did you mean --engine?"),
    ("verify-weights run fp8 extra", 2, "unrecognized arguments: extra"),
    ("verify-weights hf fp8", 3, "RUN: hf is a Hugging Face model; name the run, or its"),
    ("verify-weights nope fp8", 3, "RUN: nope does not exist; name a run directory or its"),
    ("verify-weights cpt.toml fp8", 3, "RUN: cpt.toml is no run directory; name the run, or"),
    ("verify-weights run run", 2, "HF_FP8_DIR: run is a run directory; name what was exported f"),
    ("verify-weights run empty", 3, "empty/config.json is missing; name a complete Hugging Face"),
    ("verify-weights run fp8/config.json", 2, "config.json is a file of a model; name its direct"),
    ("verify-weights run Qwen/Q", 2, "Qwen/Q is not a local directory, and infir2 downloads noth"),
    ("verify-weights run/checkpoints/step-9 fp8", 3, "step-9 does not exist; name a run dir"),
    ("verify-weights run fp8 --to o", 2, "unrecognized arguments: --to o; see `infir2 verify-w"),
    ("verify-weights run ~/fp8", 2, "~/fp8: only a shell knows ~, at the start of a word; write"),
    ("verify-weights run fp8 --json", 2, "unrecognized arguments: --json; see `infir2 verify-w"),
    ("verify-weights run fp8 --engine sglang", 2, "'sglang' is not of the form http://HOST"),
    ("verify-weights run fp8 --engine http://10.0.0.7:8000", 2, "set INFIR2_ENGINE_KEY."),
    ("verify-weights run file.gguf", 2, "infir2 import hf file.gguf --to DIR."),
    ("verify-weights run/checkpoints fp8", 3, "RUN: run/checkpoints is no run directory"),
    ("verify-weights --run=run fp8", 2, "RUN is written without an option; see"),
    ("verify run fp8", 2, "verify is not a verb; did you mean verify-weights?"),
    # tokenize
    ("tokenize", 2, "the following arguments are required: SOURCE, --tokenizer, --out"),
    (f"tokenize world/cpt.jsonl {TOKENIZER}", 2, "the following arguments are required: --out"),
    (f"tokenize world/cpt.jsonl {TOKENIZER} --to o", 2, "--to is not an option, did you mean --ou"),
    ("tokenize x.txt --tokenizer nope --out o", 2, "--tokenizer: nope has no tokenizer.json: the"),
    ("tokenize x.txt --tokenizer empty --out o", 2, "--tokenizer: empty has no tokenizer.json; na"),
    ("tokenize x.txt --tokenizer Qwen/Q --out o", 2, "hf download Qwen/Q --include 'tokenizer*'"),
    (f"tokenize x.txt {TOKENIZER}/tokenizer.json --out o", 2, "name its directory, world/tokenize"),
    (f"tokenize nope.jsonl {TOKENIZER} --out o", 4, "nope.jsonl does not exist: name a file or a"),
    (f"tokenize allenai/c4 {TOKENIZER} --out o", 4, "hf download --repo-type dataset allenai/c4"),
    (f"tokenize empty.jsonl {TOKENIZER} --out o", 4, "empty.jsonl has no row: add rows, or remove"),
    (f"tokenize empty {TOKENIZER} --out o", 4, "directory empty has no .jsonl, .json, .parquet or"),
    (f"tokenize bad.jsonl {TOKENIZER} --out o", 4, "set text_field of the source (infir2 tokenize"),
    (f"tokenize world/sft1.jsonl {TOKENIZER} --out o", 4, "these look like conversations, for inf"),
    (f"tokenize x.csv {TOKENIZER} --out o", 4, "x.csv is a table, which is not read: wri"),
    (f"tokenize fake.parquet {TOKENIZER} --out o", 4, "fake.parquet cannot be read as Parquet"),
    (f"tokenize fake.jsonl.gz {TOKENIZER} --out o", 4, "is not a complete gzip file"),
    (f"tokenize world/cpt.jsonl {TOKENIZER} --out o.bin", 2, "name the prefix of the files, o."),
    (f"tokenize world/cpt.jsonl {TOKENIZER} --out x.csv/o", 4, "x.csv/o cannot be written (Not a"),
    (f"tokenize world/cpt.jsonl {TOKENIZER} --out o --workers -1", 2, "set the number of processe"),
    (f"tokenize world/cpt.jsonl {TOKENIZER} --out o --text_field x", 2, "did you mean --text-fiel"),
    (
        f"tokenize world/cpt.jsonl {TOKENIZER} --out o --max-quarantined-fraction 5",
        2,
        "--max-quarantined-fraction 5: name a fraction, 0 to 1.",
    ),
    # launch
    ("launch sft sft.toml", 2, "write infir2 launch torchrun -- sft sft.toml"),
    ("launch torchrun", 2, "infir2 launch needs a verb after --: one of cpt, sft, rl, eval"),
    ("launch torchrun -- sft", 2, "infir2 sft needs a recipe"),
    ("launch torchrun -- sft nope.toml", 2, "nope.toml: no such recipe; paths are relative to the"),
    ("launch torchrun -- check sft.toml", 2, "one of cpt, sft, rl, eval, not check"),
    ("launch torchrun --gpus 8 -- sft sft.toml", 2, "write --gpus-per-node M."),
    ("launch torchrun --gpus-per-node 0 -- sft sft.toml", 2, "0 is not a number of at least 1"),
    ("launch torchrun -- sft sft.toml --run.dvice=cpu", 2, "is not a key; did you mean run.device"),
    ("launch torchrun -- rl rl.toml --rollout-only --rl.groupsize=2", 2, "did you mean rl.group_s"),
    ("launch torchrun -- cpt unquoted.toml", 2, "in `dir = new`: text needs quotes"),
    ("launch slurm --gpus-per-node 8 -- cpt misspelt.toml", 2, "did you mean schedule.learning_ra"),
    ("launch slurm --gpus-per-node 8 -- cpt sft.toml", 2, "data.batch_samples is for SFT"),
    ("launch ray --gpus-per-node 8 -- cpt misspelt.toml", 2, "did you mean schedule.learning_ra"),
    (
        "launch ray --gpus-per-node 8 -- sft nope.toml",
        2,
        "nope.toml: no such recipe; paths are rel",
    ),
    (f"launch ray --gpus-per-node 8 -- rl rl.toml {FAR}", 2, "set INFIR2_ENGINE_KEY."),
    (f"launch torchrun -- rl rl.toml {FAR}", 2, "set INFIR2_ENGINE_KEY."),
    (f"rl rl.toml {FAR}", 2, "http://10.0.0.7:8000 is not on this machine and there is no key"),
    (
        "launch slurm --gpus-per-node 8 -- rl rl.toml --rl.reward=http://10.0.0.7/x",
        2,
        "set INFIR2_REWARD_KEY.",
    ),
    (
        "launch ray --gpus-per-node 2 -- rl rl.toml --rollout.engine=sglang "
        "--rollout.python=python --rollout.tensor_parallel=4",
        2,
        "rollout.tensor_parallel = 4 needs more GPUs than the 2 of a node",
    ),
    (
        "launch ray --gpus-per-node 2 --engines 3 -- rl rl.toml --rollout.engine=sglang "
        "--rollout.python=python --rollout.engines=2",
        2,
        "rollout.engines = 2, and infir2 launch ray has --engines 3; remove rollout.engines.",
    ),
    ("launch slurm --gpus-per-node 1 --in-job -- sft sft.toml", 2, "--in-job is for a command ins"),
    ("launch torch -- sft sft.toml", 2, "did you mean torchrun?"),
    # demo, data demo, serve, completion, verbs
    ("demo --jsn", 2, "did you mean --json?"),
    ("demo --seed 1.5", 2, "argument --seed: invalid int value: '1.5'"),
    ("demo --seed", 2, "argument --seed: expected one argument"),
    ("demo ~/x", 2, "~/x: only a shell knows ~, at the start of a word; write"),
    ("demo --sed 5", 2, "did you mean --seed?"),
    ("demo --seed five", 2, "argument --seed: invalid int value: 'five'"),
    ("demo hf", 2, "hf holds something else than a demo; name a new directory: infir2 demo DIR."),
    ("demo x.csv/y", 2, "x.csv/y/logs: cannot be created (Not a directory"),
    ("demo a b", 2, "unrecognized arguments: b; see `infir2 demo --help`."),
    ("demo --dir=~/x", 2, "only a shell knows ~"),
    ("data dmo --to o", 2, "did you mean demo?"),
    ("data demo", 2, "the following arguments are required: --to"),
    ("data demo --out o", 2, "--out is not an option, did you mean --to?"),
    ("data demo --to hf", 2, "hf: exists already, and another command or another input made it"),
    ("data demo --to o --seed a", 2, "argument --seed: invalid int value: 'a'"),
    ("serve", 2, "the following arguments are required: MODEL"),
    ("serve hf --port abc", 2, "argument --port: invalid port number value: 'abc'"),
    ("serve run", 2, "run is a run directory, and an engine loads an export: infir2 export fp8 ru"),
    ("serve adapter", 3, "adapter is a LoRA adapter, not a model; merge it"),
    ("serve hf --host 0.0.0.0", 2, "is not loopback: name a file with a key by --api-key-file"),
    ("serve nope", 2, "MODEL: nope does not exist; run the stage that writes it"),
    ("serve Qwen/Q", 2, "hf download Qwen/Q --local-dir models/Q; then name models/Q"),
    ("serve nocfg", 3, "nocfg/config.json is missing; name a complete Hugging Face"),
    ("serve pickle", 3, "pickle has only pickled weights (.bin, .pt)"),
    ("serve lfs", 3, "is a pointer of Git LFS, not the weights; run git lfs pull"),
    ("serve torn", 3, "is not a complete safetensors file"),
    ("serve gpt2", 3, "gpt2/config.json: model_type 'gpt2' is not supported"),
    ("serve file.gguf", 2, "convert the file first: infir2 import hf file.gguf --to DIR."),
    ("serve hf/config.json", 2, "hf/config.json is a file of a model; name its directory, hf."),
    ("serve hf --prot 8001", 2, "did you mean --port?"),
    ("serve hf --engine tgi", 2, "'tgi' (choose from 'native', 'sglang', 'vllm')"),
    ("serve hf --engine vllm", 2, "--engine vllm needs --python, the interpreter of an env"),
    ("serve hf --engine sglang --python nope", 2, "sglang-env/bin/python; nope does not exist."),
    ("serve hf --api-key-file nope", 2, "--api-key-file: nope: No such file or directory"),
    ("serve hf --cache-gib lots", 2, "argument --cache-gib: invalid gibibytes value: 'lots'"),
    ("serve hf --memory-fraction 90", 2, "invalid fraction below 1 value: '90'"),
    ("serve hf --tensor-parallel 2", 2, "are for --engine sglang or vllm; leave them out"),
    ("serve hf --allow-origin example.com", 2, "'example.com' is no origin: write SCHEME://HOST"),
    ("serve hf --allow-origin https://a.org/", 2, "'https://a.org/' is no origin"),
    ("serve hf --weight-updates", 2, "--weight-updates needs --api-key-file FILE: who may send"),
    ("chat nope", 2, "MODEL: nope does not exist; run the stage that writes it"),
    ("chat run", 2, "run is a run directory, and an engine loads an export: infir2 export fp8 run"),
    ("chat hf --beside nope", 2, "--beside: nope does not exist"),
    ("chat gpt2", 3, "gpt2/config.json: model_type 'gpt2' is not supported"),
    ("completion --bash", 2, "the following arguments are required: bash"),
    ("--hlep", 2, "--hlep is not a verb; did you mean --help?"),
    ("train cpt.toml", 2, "training is infir2 cpt, sft or rl, followed by a recipe."),
    ("pretrain cpt.toml", 2, "training is infir2 cpt, sft or rl, followed by a recipe."),
    ("convert hf", 2, "did you mean export?"),
]
FAILED_CHECKS = [
    ("sft.toml --model.path=nope", "model", "model.path: nope does not exist; run the stage that"),
    ("sft.toml --model.path=pickle", "model", "pickle has only pickled weights"),
    (
        "sft.toml --model.path=fp8",
        "model",
        "train from BF16 weights: infir2 import fp8",
    ),
    ("sft.toml --model.path=lfs", "model", "is a pointer of Git LFS, not the weights"),
    ("sft.toml --data.tokenizer=nope", "tokenizer", "nope has no tokenizer.json: there is no such"),
    ("sft.toml --data.tokenizer=bigtok", "model", "set data.tokenizer to the model's own."),
    (f"sft.toml {SOURCE}=world/cpt.jsonl", "data", "these look like documents, for infir2 cpt;"),
    (f"sft.toml {SOURCE}=empty.jsonl", "data", "empty.jsonl has no row"),
    ("sft.toml --run.dir=hf", "run dir", "hf holds a model (config.json)"),
    ("sft.toml --run.dir=x.csv/y", "run dir", "x.csv cannot be written to"),
    ("sft.toml --run.dir=run", "run dir", "this run was started with model.path = ''"),
    ("sft.toml --run.device=cuda", "parallel", "run.device is cuda, but torch sees no GPU"),
    ("sft.toml --data.micro_batch_tokens=99999999", "memory", "lower data.micro_batch_tokens"),
    ("sft.toml --checkpoint.keep=99999999", "disk", "free some space, or lower checkpoint.keep."),
    ("rl.toml --rollout.model=nope", "engine", "rollout.model: nope does not exist; export the s"),
    ("rl.toml --rl.reward=absent_module:f", "rewards", "No module named 'absent_module'"),
]
AS_JSON = [
    ("check nope.toml --json", 2, "nope.toml: there is no such recipe file"),
    ("data inspect nope --tokenizer world/tokenizer --json", 4, "nope does not exist"),
    ("doctor --json --x", 2, "unrecognized arguments: --x"),
    ("eval compare run run --json", 4, "run has no answers of an evaluation"),
    ("eval contamination --train x.csv --data world/heldout.jsonl --json", 4, "is a table"),
    ("eval nope.toml --json", 2, "nope.toml: there is no such recipe file"),
    ("plan nope.toml --gpu h100 --json", 2, "nope.toml: there is no such recipe file"),
    ("report nope --json", 4, "nope does not exist"),
    ("demo hf --json", 2, "hf holds something else than a demo"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world of data, a run, its exports, models with one defect each, and recipes."""
    directory = tmp_path_factory.mktemp("mistakes")
    world = make_world(directory / "world")
    run(options(world, directory / "run", "cpt", schedule__total_steps=4))
    make_model(world, directory / "hf")
    run(["export", "fp8", str(directory / "run"), "--to", str(directory / "fp8")])
    _write_models(directory)
    _write_files(directory)
    return directory


def _write_models(directory: Path) -> None:
    """Copies of the model, named for what is wrong with them."""
    for name in ("nocfg", "pickle", "gpt2", "torn", "lfs", "bigtok"):
        shutil.copytree(directory / "hf", directory / name)
    (directory / "nocfg/config.json").unlink()
    (directory / "pickle/model.safetensors").rename(directory / "pickle/pytorch_model.bin")
    config = json.loads((directory / "hf/config.json").read_text())
    changed = config | {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    (directory / "gpt2/config.json").write_text(json.dumps(changed))
    whole = (directory / "torn/model.safetensors").read_bytes()
    (directory / "torn/model.safetensors").write_bytes(whole[:-1000])
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (directory / "lfs/model.safetensors").write_text(pointer)
    tokenizer = json.loads((directory / "bigtok/tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab |= {f"more{i}": len(vocab) + i for i in range(656 - len(vocab))}
    (directory / "bigtok/tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "adapter").mkdir()
    (directory / "adapter/adapter_config.json").write_text("{}")


def _write_files(directory: Path) -> None:
    (directory / "empty").mkdir()
    turn = [{"from": "human", "value": "1+1"}, {"from": "gpt", "value": "2"}]
    files = RECIPES | {name: text.replace(*edit) for name, (text, *edit) in EDITS.items()}
    files |= {
        "empty.jsonl": "",
        "bad.jsonl": '{"a": 1}\n' * 5,
        "sharegpt.jsonl": json.dumps({"conversations": turn}) + "\n",
        "x.csv": "prompt,answer\n",
        "x.txt": "words\n",
        "alone.bin": "\0\1",
        "fake.parquet": "x",
        "fake.jsonl.gz": "x",
        "file.gguf": "x",
    }
    for name, text in files.items():
        (directory / name).write_text(text)
    (directory / "utf16.toml").write_bytes(CPT.encode("utf-16"))


@pytest.fixture(autouse=True)
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("MODELS", raising=False)


@each(MISTAKES)
def test_a_mistake_gets_one_sentence_at_once(
    place: Path, capsys: pytest.CaptureFixture[str], words: str, code: int, sentence: str
) -> None:
    start = time.process_time()
    assert sentence in sentence_of(capsys, place, shlex.split(words), code)
    assert time.process_time() - start < 10  # with the imports of the first one


def test_each_verb_has_its_mistakes() -> None:
    different = {(words.split(maxsplit=1)[0], words) for words, _, _ in MISTAKES}
    counts = Counter(verb for verb, _ in different)
    counts["check"] += len(FAILED_CHECKS)
    for verb in (
        *("cpt", "sft", "rl", "eval", "check", "export", "import", "tokenize"),
        *("verify-weights", "serve"),
    ):
        assert counts[verb] >= 20, verb


@pytest.mark.parametrize(
    ("words", "check", "sentence"), FAILED_CHECKS, ids=[row[0] for row in FAILED_CHECKS]
)
def test_check_says_what_would_fail(
    capsys: pytest.CaptureFixture[str], words: str, check: str, sentence: str
) -> None:
    assert main(["check", *shlex.split(words)]) == 1
    output = capsys.readouterr()
    lines = [line for line in output.out.splitlines() if line.startswith(f"FAIL  {check} ")]
    assert len(lines) == 1
    assert sentence in lines[0]
    assert check in output.err.splitlines()[-1]


@pytest.mark.parametrize(("words", "code", "sentence"), AS_JSON, ids=[row[0] for row in AS_JSON])
def test_an_error_is_json_too(
    capsys: pytest.CaptureFixture[str], words: str, code: int, sentence: str
) -> None:
    assert main(words.split()) == code
    output = capsys.readouterr()
    found = json.loads(output.out)
    assert found["exit_code"] == code
    assert sentence in found["error"]
    assert sentence in output.err


@pytest.mark.parametrize("verb", ["check sft.toml", "check sft.toml --model.path=nope"])
def test_findings_are_one_json_document(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    code = main([*verb.split(), "--json"])
    findings = json.loads(capsys.readouterr().out)
    assert code == int(any(each["status"] == "fail" for each in findings))
    assert {"recipe", "tokenizer", "data", "model"} <= {each["check"] for each in findings}


def test_a_tilde_that_is_no_path_is_text() -> None:
    refuse_tildes(["--system=~", "--rl.stop=~", "~5", "chat"])


@pytest.mark.parametrize("change", ["crlf", "bom"])
def test_a_recipe_from_windows_runs(place: Path, tmp_path: Path, change: str) -> None:
    text = CPT.replace("\n", "\r\n") if change == "crlf" else f"\ufeff{CPT}"
    (tmp_path / "windows.toml").write_bytes(text.encode())
    keys = [f"--run.dir={tmp_path / 'run'}", "--schedule.total_steps=1"]
    assert main(["cpt", str(tmp_path / "windows.toml"), *keys]) == 0
    assert (tmp_path / "run/checkpoints").is_dir()


def test_long_work_says_how_much_is_done(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "_PULSE_SECONDS", 0.05)
    with terminal.pulse("waiting"):
        with terminal.byte_progress("exporting m", 4_000_000_000) as advance:
            time.sleep(0.2)
            advance(1_000_000_000)
            time.sleep(0.3)
        time.sleep(0.2)
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "infir2: exporting m, 0 s so far"
    halfway = re.compile(r"infir2: exporting m: 25 % of 4\.0 GB, \d+ s left, \d+ s so far")
    assert any(halfway.fullmatch(line) for line in lines)
    assert re.fullmatch(r"infir2: exporting m, \d+ s so far", lines[-1])
    assert not any("\r" in line or "\033" in line for line in lines)


def test_a_config_without_quantization_may_say_so(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "hf", tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps(config | {"quantization_config": None}))
    keys = [f"--model.path={tmp_path / 'hf'}", f"--run.dir={tmp_path / 'run'}"]
    assert main(["sft", "sft.toml", *keys, "--schedule.total_steps=1"]) == 0
