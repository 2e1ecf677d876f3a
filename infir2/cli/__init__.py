"""The `infir2` command: find the verb, run it, turn what happened into an exit code.

Exit codes: 0 done, 1 a check failed, 2 configuration or an output that exists, 3 checkpoint,
4 data, 17 non-finite training, 70 internal error, 71 a rank died, 75 preempted (saved), 130 Ctrl-C.
No verb's module, and no torch, is imported before the verb is known.
"""

import difflib
import importlib
import os
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

from infir2.errors import (
    ConfigError,
    Interrupted,
    Preempted,
    UserError,
    first_line,
    system_error,
)
from infir2.launch.ranks import code_for_torchrun
from infir2.processes import process_signals
from infir2.terminal import (
    begin_output,
    log,
    log_error,
    log_text,
    print_json_error,
    print_result,
    pulse,
)

INTERNAL_ERROR = 70
QUIET, JSON = "--quiet", "--json"
_REPORTING = ("check", "data", "demo", "doctor", "eval", "plan", "report")
_HELP = ("-h", "--help", "help")
RANK0_SECONDS = 20.0  # how long a failed rank waits for rank 0 to report the same error


class Verb(NamedTuple):
    """`function` of `infir2.cli.module` runs the verb; `summary` is its line in --help."""

    module: str
    function: str
    summary: str
    has_run: bool = False  # handles SIGTERM itself once its run has started


VERBS = {
    "demo": Verb("demo", "demo", "the whole recipe on a tiny model, on a CPU, in minutes"),
    "init": Verb("data", "init", "write a recipe: init DIR --model DIR --task sft --data FILE"),
    "data": Verb(
        "data", "data", "look at data: data inspect SOURCE --tokenizer DIR; data demo --to DIR"
    ),
    "cpt": Verb("train", "cpt", "continual pre-training on documents", has_run=True),
    "sft": Verb("train", "sft", "supervised fine-tuning on conversations", has_run=True),
    "rl": Verb("rl", "rl", "reinforcement learning with verified rewards", has_run=True),
    "eval": Verb("eval", "evaluate", "score a model on problems with known answers", has_run=True),
    "launch": Verb(
        "launch",
        "launch",
        "cpt, sft, rl or eval on many processes and nodes: launch torchrun|ray|slurm -- VERB ...",
    ),
    "serve": Verb("serve", "serve", "serve a model by OpenAI's API: serve MODEL"),
    "chat": Verb("chat", "chat", "talk to a model: chat MODEL, or --url of a server"),
    "plan": Verb(
        "plan", "plan", "memory, time and layout of a run on GPUs: plan RECIPE.toml --gpu h100"
    ),
    "bench": Verb("plan", "bench", "measure this machine's GPU for plan: bench --to FILE.json"),
    "doctor": Verb("doctor", "doctor", "what this machine computes with, and what it lacks"),
    "check": Verb("preflight", "check", "check everything a recipe needs, and train nothing"),
    "export": Verb(
        "convert", "export", "write weights for other software: export hf|fp8|megatron SRC --to DIR"
    ),
    "import": Verb(
        "convert", "import_", "read weights of others: import hf|fp8|megatron SRC --to DIR"
    ),
    "verify-weights": Verb(
        "convert", "verify_weights", "prove that an FP8 export holds the trainer's bytes"
    ),
    "tokenize": Verb(
        "convert",
        "tokenize",
        "text to Megatron's .bin/.idx files: tokenize SOURCE... --tokenizer DIR --out PREFIX",
    ),
    "completion": Verb(
        "completion", "completion", "completion of verbs, options and keys: completion bash"
    ),
    "report": Verb("report", "report", "one HTML page about one or more runs"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after `infir2`; None for those of this process.

    Returns:
        The exit code. A user's error is one line on stderr, an internal error a traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    is_quiet, as_json = QUIET in options, JSON in options
    if is_quiet:
        arguments.remove(QUIET)
    begin_output(is_quiet, as_json and arguments[0] in _REPORTING)
    with process_signals.command(_early_stop_message(arguments[:1])), _pulse(arguments[:1]):
        return _run(arguments)


def _pulse(verb: list[str]) -> AbstractContextManager[None]:
    """Rank 0 says what it does whenever it has been silent; the demo's stages do so themselves."""
    if verb in ([], ["chat"], ["demo"], ["launch"]) or os.environ.get("RANK", "0") != "0":
        return nullcontext()
    return pulse(f"{verb[0]} is starting")


def _early_stop_message(verb: list[str]) -> str:
    """What is logged if SIGTERM arrives before the run has started; empty for verbs without a run.

    Python accepts signal handlers in the main thread only.
    """
    is_main_thread = threading.current_thread() is threading.main_thread()
    if not verb or verb[0] not in VERBS or not VERBS[verb[0]].has_run or not is_main_thread:
        return ""
    if verb == ["eval"]:
        return "Stopped; the responses so far are kept. Run the same command to resume."
    return "Stopped before the first step; nothing was saved. Run the same command to start again."


def _run(arguments: list[str]) -> int:
    try:
        _dispatch(arguments)
        sys.stdout.flush()
        return 0
    except UserError as error:
        return _report_error(error)
    except KeyboardInterrupt:
        is_early = not process_signals.keep_exit_code
        text = (is_early and _early_stop_message(arguments[:1])) or "Interrupted."
        log_text(f"infir2: {text}")
        return Interrupted.exit_code
    except BrokenPipeError:
        # The reader of the output has exited (`infir2 cpt --help | head`). Python flushes stdout
        # at exit and would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        process_signals.keep_exit_code = True
        if refusal := system_error(error):
            return _report_error(refusal)
        traceback.print_exc()
        command = " ".join(["infir2", *arguments])
        log(
            f"internal error in `{command}`; "
            "please report it with the lines above and the output of `infir2 --version`."
        )
        print_json_error(f"internal error: {first_line(error)}", INTERNAL_ERROR)
        return INTERNAL_ERROR


def _report_error(error: UserError) -> int:
    """Log the error, once if all ranks have the same, and return its exit code.

    Rank 0 reports such an error. Once its run has started nothing stops it from that. Before, it
    may still be importing, and torchrun kills the ranks of a node when the first of them fails: so
    a rank that fails early waits until SIGTERM says that rank 0 has exited, and reports the error
    itself if rank 0 does not.
    """
    run_has_started = process_signals.keep_exit_code
    process_signals.keep_exit_code = True
    rank0_reports = error.reported_by_rank0 and os.environ.get("RANK", "0") != "0"
    exit_kills_rank0 = (
        not run_has_started
        and os.environ.get("GROUP_RANK", "0") == "0"
        and code_for_torchrun(error.exit_code) != 0
    )
    if not rank0_reports or (
        exit_kills_rank0 and not process_signals.wait_for_termination(RANK0_SECONDS)
    ):
        if isinstance(error, Preempted | Interrupted):
            log_text(f"infir2: {error}")
        else:
            log_error(str(error))
        print_json_error(str(error), error.exit_code)
    return error.exit_code


def _dispatch(arguments: list[str]) -> None:
    if len(arguments) > 1 and arguments[0] in _HELP and arguments[1] not in _HELP:
        arguments = [arguments[1], "--help"]
    if not arguments or arguments[0] in _HELP:
        print_result(_usage())
        return
    if arguments[0] in ("-V", "-v", "--version", "version"):
        print_result(_versions())
        return
    name, *rest = arguments
    if name not in VERBS:
        raise ConfigError(f"{name} is not a verb; {_verb_advice(name, rest)}")
    verb = VERBS[name]
    getattr(importlib.import_module(f"infir2.cli.{verb.module}"), verb.function)(rest)


def _verb_advice(name: str, rest: list[str]) -> str:
    """What to type instead of `name`: words that users of other stacks try, then near spellings."""
    if name.endswith(".toml"):
        verb = next((word for word in rest if word in VERBS), "cpt")
        return f"the verb comes first: infir2 {verb} {name}"
    words = {"train": "train", "finetune": "sft", "evaluate": "eval", "convert": "export"}
    words |= {"inspect": "data inspect", "estimate": "plan", "benchmark": "bench"}
    words |= dict.fromkeys(("--hlep", "-help", "--usage", "?"), "--help")
    near = difflib.get_close_matches(name, [*VERBS, *words], 1)
    if near and words.get(near[0], near[0]) == "train":
        return "training is infir2 cpt, sft or rl, followed by a recipe."
    if near:
        return f"did you mean {words.get(near[0], near[0])}?"
    return "`infir2 --help` lists the verbs."


def _usage() -> str:
    verbs = "\n".join(f"  {name:15} {verb.summary}" for name, verb in VERBS.items())
    return (
        "usage: infir2 VERB ...\n\n"
        "InfiR2 trains reasoning language models in block-wise FP8.\n\n"
        f"{verbs}\n\n"
        "infir2 VERB --help describes a verb's arguments; "
        "infir2 --version prints the versions of the libraries.\n"
        "--quiet leaves results and errors only; --json prints the results of check, data inspect, "
        "demo, doctor, eval, plan and report as JSON."
    )


def _versions() -> str:
    from importlib.metadata import version
    from platform import platform, python_version

    libraries = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "transformers", "safetensors", "numpy")
    )
    return f"infir2 {version('infir2')}, Python {python_version()}, {libraries}, {platform()}"
