"""Twenty likely mistakes each with demo, launch and completion: one sentence, nothing written.

In {braces}: the recipes of the demo. What needs a model or a run is in test_mistakes.py.
"""

import shlex
from collections import Counter
from pathlib import Path

import pytest
from mistakes import each, sentence_of

from infir2.cli import main

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "demo"
SFT = "{demo}/sft1.toml"
SLURM, RAY = "launch slurm --gpus-per-node 1", "launch ray --gpus-per-node 1"
MISTAKES = [
    # demo
    ("demo --dir out", 2, "unrecognized arguments: --dir; DIR is written without an option; see"),
    ("demo --to out", 2, "--to is not an option of infir2 demo; write infir2 demo DIR."),
    ("demo --run.dir=out", 2, "--run.dir=out is not an option of infir2 demo; write infir2 demo D"),
    ("demo --gpu", 2, "the demo chooses its device and recipes itself"),
    ("demo --model hf", 2, "the demo chooses its device and recipes itself"),
    ("demo --resume", 2, "the same command, run again, resumes."),
    ("demo --force", 2, "--force is not an option of infir2 demo; name a new directory."),
    ("demo --steps 10", 2, "unrecognized arguments: --steps"),
    ("demo -s 4", 2, "unrecognized arguments: -s; see `infir2 demo --help`."),
    ("demo ''", 2, "argument DIR: the name is empty; name a directory, or leave it out"),
    ("demo help", 2, "help is a word of infir2; a directory of that name is ./help; see"),
    ("demo cpt", 2, "cpt is a word of infir2; a directory of that name is ./cpt; see"),
    ("demo https://host/x", 2, "https://host/x is an address; name a directory to write to"),
    ("demo notes.txt", 2, "notes.txt is a file; infir2 demo DIR names a directory to write to"),
    (f"demo {SFT}", 2, "names a directory to write to, and takes no recipe."),
    ("demo notes.txt/out", 2, "notes.txt/out/logs: cannot be created (Not a directory"),
    ("demo project", 2, "project holds something else than a demo; name a new directory"),
    ("demo one two", 2, "unrecognized arguments: two; see `infir2 demo --help`."),
    ("demo --seed -1", 2, "--seed -1: name a number from 0 to 2^63 - 1."),
    ("demo --seed 99999999999999999999", 2, "name a number from 0 to 2^63 - 1."),
    ("demo --seed=", 2, "argument --seed: invalid int value: ''"),
    ("demo --sede 5", 2, "did you mean --seed?"),
    # launch: the words around --
    (
        "launch torchrun x.toml",
        2,
        "-- VERB is missing before x.toml: write infir2 launch torchrun ",
    ),
    (
        "launch x.toml",
        2,
        "infir2 launch torchrun -- sft x.toml (VERB is one of cpt, sft, rl, eval)",
    ),
    ("launch torchrun evl x.toml", 2, "write infir2 launch torchrun -- eval x.toml (VERB is one"),
    (
        "launch torchrun \u2014 sft x.toml",
        2,
        "-- is missing before sft: write infir2 launch torchr",
    ),
    ("launch torchrun - sft x.toml", 2, "write infir2 launch torchrun -- sft x.toml"),
    ("launch torchrun -- x.toml", 2, "not x.toml, and its arguments. Such as -- sft x.toml"),
    ("launch torchrun -- infir2 rl x.toml", 2, "Such as -- rl x.toml"),
    ("launch torchrun -- python -m infir2 sft x.toml", 2, "Such as -- sft x.toml"),
    ("launch torchrun -- -- sft x.toml", 2, "not --, and its arguments. Such as -- sft x.toml"),
    ("launch torchrun -- stf x.toml", 2, "not stf, and its arguments. Did you mean sft?"),
    ("launch torchrun -- sft --help", 2, "--help needs no launch: write infir2 sft --help."),
    (f"launch -- sft {SFT}", 2, "the following arguments are required: torchrun|ray|slurm"),
    (f"launch '' -- sft {SFT}", 2, "invalid choice: '' (choose from 'torchrun', 'ray', 'slurm')"),
    (f"launch srun -- sft {SFT}", 2, "invalid choice: 'srun' (choose from 'torchrun', 'ray', "),
    # launch: options
    (f"launch torchrun --sbatch=--mem=1 -- sft {SFT}", 2, "--sbatch is for infir2 launch slurm; "),
    (f"launch torchrun --no-wait -- sft {SFT}", 2, "--no-wait is for infir2 launch slurm; with to"),
    (f"launch torchrun --in-job -- sft {SFT}", 2, "--in-job is for infir2 launch slurm; with torc"),
    (f"launch torchrun --cpus-per-rank 4 -- sft {SFT}", 2, "is for infir2 launch ray and slurm; w"),
    (f"launch torchrun --gpus-per-engine 2 -- rl {SFT}", 2, "is for infir2 launch ray; with torch"),
    (f"{RAY} --endpoint a:1 -- sft {SFT}", 2, "--endpoint is for infir2 launch torchrun; with ray"),
    (f"{SLURM} --run-id a -- sft {SFT}", 2, "--run-id is for infir2 launch torchrun; with slurm, "),
    (f"{RAY} --gpus-per-engine 2 -- rl {SFT}", 2, "is for the engines of --engines N: set that "),
    (f"{RAY} --address auto -- sft {SFT}", 2, "set RAY_ADDRESS to the cluster's."),
    (f"{SLURM} --sbatch=mem=1 -- sft {SFT}", 2, "write its dashes too, --sbatch=--mem=1; see"),
    (f"{SLURM} --sbatch=--nodes=4 -- sft {SFT}", 2, "set --nodes N and --gpus-per-node M instead"),
    (f"{SLURM} --qos=high -- sft {SFT}", 2, "write --sbatch=--qos=VALUE."),
    (f"launch slurm -N 2 -- sft {SFT}", 2, "-N is not an option of infir2 launch; write --nodes N"),
    (f"launch slurm --gres=gpu:8 -- sft {SFT}", 2, "write --gpus-per-node M."),
    (f"launch torchrun --standalone -- sft {SFT}", 2, "leave it out: one node is the default."),
    (f"launch torchrun --node_rank=0 -- sft {SFT}", 2, "the rendezvous numbers the nodes."),
    (
        f"launch torchrun --nodes 2 --endpoint http://10.0.0.1:29500 -- sft {SFT}",
        2,
        "--endpoint http://10.0.0.1:29500: write HOST:PORT, such as node1:29400",
    ),
    # completion
    ("completion", 2, "are required: bash; see `infir2 completion --help`."),
    ("completion zsh", 2, "argument bash: invalid choice: 'zsh' (choose from 'bash')"),
    ("completion Bash", 2, "did you mean bash?"),
    ("completion ''", 2, "invalid choice: '' (choose from 'bash')"),
    ("completion help", 2, "invalid choice: 'help' (choose from 'bash'); see `infir2 completion -"),
    (
        "completion rl",
        2,
        "invalid choice: 'rl' (choose from 'bash'); see `infir2 completion --help",
    ),
    ("completion --shell bash", 2, "--shell; bash is written without an option; see"),
    ("completion --shell=bash", 2, "are required: bash; bash is written without an option; see"),
    ("completion --install", 2, "are required: bash; see"),
    ("completion bash -o bash.sh", 2, "unrecognized arguments: -o bash.sh; see"),
    ("completion bash fish", 2, "unrecognized arguments: fish; see"),
    ("completion bash --json", 2, "unrecognized arguments: --json; see"),
    ("completion ~/.bashrc", 2, "~/.bashrc: only a shell knows ~"),
    ("completion words", 2, "invalid choice: 'words' (choose from 'bash')"),
    ("completions bash", 2, "completions is not a verb; did you mean completion?"),
    ("autocomplete bash", 2, "autocomplete is not a verb; did you mean completion?"),
    # of other verbs: a word that stands without an option, and an empty one
    ("serve --model hf", 2, "unrecognized arguments: --model; MODEL is written without an option"),
    ("init --dir x", 2, "--model, --task, --data; DIR is written without an option; see"),
    ("export '' run --to o", 2, "invalid choice: '' (choose from 'hf', 'fp8', 'megatron')"),
]


@each(MISTAKES)
def test_a_mistake_gets_one_sentence_and_leaves_nothing_behind(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: str,
    code: int,
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "notes.txt").write_text("words")
    (tmp_path / "project" / "logs").mkdir(parents=True)
    (tmp_path / "project" / "train.py").write_text("")
    arguments = shlex.split(words.replace("{demo}", str(RECIPES)))
    assert sentence in sentence_of(capsys, tmp_path, arguments, code)


def test_a_demo_that_was_killed_early_is_a_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    monkeypatch.setattr("infir2.demo.stages.run_demo", lambda *words: started.append(words[0]))
    (tmp_path / "logs").mkdir()
    assert main(["demo", str(tmp_path)]) == 0
    (tmp_path / ".world.tmp-host-0123456789ab").mkdir()
    assert main(["demo", str(tmp_path)]) == 0
    assert started == [tmp_path, tmp_path]


def test_each_verb_has_its_mistakes() -> None:
    counts = Counter(words.split(maxsplit=1)[0] for words in {words for words, _, _ in MISTAKES})
    assert min(counts["demo"], counts["launch"]) >= 20
    assert counts["completion"] >= 13  # one word that has one value: there are no twenty


@pytest.mark.parametrize(("kind", "place"), [("torchrun", "above"), ("slurm", "in infir2-sft-JOB")])
def test_a_failed_launch_says_where_the_message_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str, place: str
) -> None:
    """The output of a job of SLURM is in its log; sbatch itself says why it refused one."""
    monkeypatch.setattr("infir2.cli.launch.run_torchrun", lambda *_: 71)
    monkeypatch.setattr("infir2.launch.slurm.submit", lambda *_, **__: 71)
    recipe = str(RECIPES / "sft1.toml")
    assert main(["launch", kind, "--gpus-per-node", "1", "--", "sft", recipe]) == 71
    assert f"ended with code 71; its message is {place}" in capsys.readouterr().err
