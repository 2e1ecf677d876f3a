"""The `infir2` command: finds the verb, runs it, turns what happened into an exit code.

0 done, 1 a check did not hold, 2 configuration or an output that exists, 3 checkpoint, 4 data, 17 non-finite training,
70 internal error, 71 a rank died, 75 preempted (saved), 130 Ctrl-C. No verb's code, and no torch, is imported before the verb is known.
"""

import difflib
import importlib
import os
import sys
import threading
import traceback
from collections.abc import Sequence

from infir2.errors import ConfigError, Interrupted, Preempted, UserError
from infir2.launch.ranks import code_for_torchrun
from infir2.processes import CommandSignals
from infir2.terminal import log, log_error, print_result

# verb -> (module with the function, function, one line for --help)
VERBS = {
    "demo": ("demo", "demo", "the whole recipe on a tiny model, on a CPU, in minutes"),
    "data": ("demo", "data", "make the demo's data: infir2 data demo --to DIR"),
    "cpt": ("train", "cpt", "continual pre-training on documents"),
    "sft": ("train", "sft", "supervised fine-tuning on conversations"),
    "rl": ("train", "rl", "reinforcement learning with verified rewards"),
    "eval": ("train", "evaluate", "score a model on problems with known answers"),
    "launch": (
        "launch",
        "launch",
        "cpt, sft, rl or eval on many processes and nodes: launch torchrun|ray|slurm -- VERB ...",
    ),
    "check": ("preflight", "check", "try everything a recipe needs, and train nothing"),
    "export": (
        "convert",
        "export",
        "write what others load: export hf|fp8|megatron SRC --to DIR",
    ),
    "import": (
        "convert",
        "import_",
        "read foreign weights: import hf|fp8|megatron SRC --to DIR",
    ),
    "verify-weights": (
        "convert",
        "verify_weights",
        "prove that an FP8 export holds the trainer's bytes",
    ),
    "tokenize": (
        "convert",
        "tokenize",
        "text to Megatron's .bin/.idx files: tokenize SOURCE... --tokenizer DIR --out PREFIX",
    ),
    "report": ("convert", "report", "one HTML page about one or more runs"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the words after `infir2`; None takes those of this process.

    Returns:
        The exit code. An error of the user's is one line on stderr, an internal one a traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    with CommandSignals(_stopped_early(arguments[:1])) as signals:
        return _main(arguments, signals)


def _stopped_early(verb: list[str]) -> str:
    """What a command says that SIGTERM ends before its run has begun; empty where it ends like any other program."""
    if (
        not verb
        or VERBS.get(verb[0], ("",))[0] != "train"
        or threading.current_thread() is not threading.main_thread()
    ):
        return ""
    return (
        "stopped; an evaluation begins anew."
        if verb == ["eval"]
        else "stopped before the first step; there was nothing to save."
    )


def _main(arguments: list[str], signals: CommandSignals) -> int:
    try:
        _dispatch(arguments)
        sys.stdout.flush()
        return 0
    except UserError as error:
        return _tell(error, signals)
    except KeyboardInterrupt:
        return _say("interrupted.", Interrupted.exit_code)
    except BrokenPipeError:
        # The reader of our output went away (`infir2 cpt --help | head`): not an error of anybody's.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception:
        signals.has_own_end = True
        traceback.print_exc()
        command = " ".join(["infir2", *arguments])
        return _say(
            f"internal error in `{command}`; please report it with the lines above and the output of `infir2 --version`.",
            70,
        )


def _tell(error: UserError, signals: CommandSignals) -> int:
    """One sentence, by rank 0 where all ranks have the same: nothing keeps it from that once its run has begun, but before,
    it may still be importing, and the first rank to end makes torchrun end the others of its node."""
    ran, signals.has_own_end = signals.has_own_end, True
    told = error.reported_by_rank0 and os.environ.get("RANK", "0") != "0"
    ends_rank_0 = (
        not ran
        and os.environ.get("GROUP_RANK", "0") == "0"
        and code_for_torchrun(error.exit_code) != 0
    )
    if not told or (ends_rank_0 and not signals.wait(20.0)):
        (log if isinstance(error, Preempted | Interrupted) else log_error)(str(error))
    return error.exit_code


def _dispatch(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print_result(_usage())
        return
    if arguments[0] in ("-V", "--version"):
        print_result(_versions())
        return
    verb, *rest = arguments
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, 1)
        raise ConfigError(
            f"{verb} is not a verb; "
            + (f"did you mean {near[0]}?" if near else "`infir2 --help` lists the verbs.")
        )
    module, function, _ = VERBS[verb]
    getattr(importlib.import_module(f"infir2.cli.{module}"), function)(rest)


def _usage() -> str:
    verbs = "\n".join(f"  {verb:15} {line}" for verb, (_, _, line) in VERBS.items())
    return (
        "usage: infir2 VERB ...\n\nInfiR2 trains reasoning language models in block-wise FP8.\n\n"
        f"{verbs}\n\ninfir2 VERB --help says what a verb takes; infir2 --version names the versions of the libraries."
    )


def _versions() -> str:
    from importlib.metadata import version
    from platform import platform, python_version

    libraries = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "transformers", "safetensors", "numpy")
    )
    return f"infir2 {version('infir2')}, Python {python_version()}, {libraries}, {platform()}"


def _say(sentence: str, code: int) -> int:
    log(sentence)
    return code
