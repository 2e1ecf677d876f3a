"""The verb launch: a training verb on many processes and nodes."""

import argparse
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path

from infir2.cli.arguments import RECIPE_CLASSES, Parser
from infir2.config.env_vars import variables_of
from infir2.errors import ConfigError, Interrupted, LaunchedError, Preempted
from infir2.launch import ray, slurm
from infir2.launch.ranks import STOPPED_BY
from infir2.launch.torchrun import (
    VERBS,
    Layout,
    check_words,
    default_endpoint,
    default_ranks,
    run_torchrun,
    torchrun_command,
)
from infir2.terminal import print_result

_ABOUT = (
    "Starts a training verb on many processes and nodes, and ends with the worst rank's exit code. SIGTERM and Ctrl-C reach every "
    "rank: they save, and the same command goes on. Example: infir2 launch torchrun --gpus-per-node 8 -- sft RECIPE.toml"
)


def _at_least(kind: Callable[[str], float], least: float) -> Callable[[str], float]:
    def number(text: str) -> float:
        if not least <= (value := kind(text)) < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a number of at least {least}")
        return value

    return number


def _parser() -> Parser:
    parser = Parser(
        prog="infir2 launch",
        usage="infir2 launch torchrun|ray|slurm [options] -- VERB ARGS",
        description=_ABOUT,
    )
    parser.add_argument(
        "kind",
        choices=("torchrun", "ray", "slurm"),
        help="torchrun: this machine, or this node of many; ray; slurm",
    )
    parser.add_argument(
        "--nodes", type=_at_least(int, 1), default=1, metavar="N", help="machines (default 1)"
    )
    each = "ranks on each node, one per GPU (torchrun: default the GPUs here, or 1)"
    parser.add_argument(
        "--gpus-per-node", type=_at_least(int, 1), dest="ranks_per_node", metavar="M", help=each
    )
    parser.add_argument(
        "--cpu", action="store_true", help="ray, slurm: ranks run on CPUs, so ask for no GPUs"
    )
    cores = "ray, slurm: cores to ask for per rank (default 1)"
    parser.add_argument(
        "--cpus-per-rank", type=_at_least(float, 0.01), default=1.0, metavar="C", help=cores
    )
    apart = (
        "ray, rl: N rollout engines apart from the ranks, a GPU each (default: one in each rank)"
    )
    parser.add_argument("--engines", type=_at_least(int, 1), default=0, metavar="N", help=apart)
    again = (
        "restarts from the newest checkpoint after a death, and of each engine apart (default 3)"
    )
    parser.add_argument(
        "--max-restarts", type=_at_least(int, 0), default=3, metavar="R", help=again
    )
    meet = "torchrun on several nodes: where they meet (default $MASTER_ADDR:$MASTER_PORT)"
    parser.add_argument("--endpoint", default=default_endpoint(), metavar="HOST:PORT", help=meet)
    parser.add_argument(
        "--run-id",
        default="infir2",
        help="torchrun on several nodes: one name for all nodes of a job (default infir2)",
    )
    parser.add_argument(
        "--local-address",
        default="",
        metavar="HOST",
        help="torchrun on several nodes: this node, if not its host name",
    )
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="slurm: a further option, --sbatch=--partition=gpu",
    )
    parser.add_argument("--no-wait", action="store_true", help="slurm: end when the job is queued")
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would run, and run nothing"
    )
    return parser


def launch(arguments: Sequence[str]) -> None:
    """infir2 launch torchrun|ray|slurm [options] -- VERB ARGS"""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    if cut == len(arguments) and (
        found := [i for i, word in enumerate(arguments) if word in VERBS]
    ):
        mended = shlex.join([*arguments[: found[0]], "--", *arguments[found[0] :]])
        raise ConfigError(
            f"-- is missing before the verb {arguments[found[0]]}: write infir2 launch {mended}"
        )
    words, verb = _parser().parse_args(arguments[:cut]), list(arguments[cut + 1 :])
    if words.ranks_per_node is None:
        if words.kind != "torchrun" and verb[:1] != ["eval"]:
            raise ConfigError(
                f"infir2 launch {words.kind} cannot count the GPUs of other machines: say --gpus-per-node M."
            )
        words.ranks_per_node = 1 if verb[:1] == ["eval"] else default_ranks()
    layout = Layout(**{field.name: getattr(words, field.name) for field in fields(Layout)})
    check_words(verb, layout)
    if layout.engines and (words.kind, verb[0]) != ("ray", "rl"):
        raise ConfigError(
            "--engines is for infir2 launch ray ... -- rl: elsewhere every rank has the engine it needs."
        )
    _launch(words, layout, verb)


def _launch(words: argparse.Namespace, layout: Layout, verb: list[str]) -> None:
    start: Callable[[], int]
    if words.kind == "ray":
        text, start = (
            ray.description(layout, verb),
            partial(ray.run_ray, layout, verb, list(variables_of(RECIPE_CLASSES[verb[0]]))),
        )
    else:
        for word in verb[1:]:
            if not word.startswith("-") and not Path(word).exists():
                raise ConfigError(
                    f"{word}: no such recipe here; paths are relative to the current directory."
                )
        if words.kind == "slurm":
            text = slurm.batch_script(layout, verb, words.sbatch).rstrip()
            start = partial(slurm.submit, text, wait=not words.no_wait)
        else:
            text, start = (
                shlex.join(torchrun_command(layout, verb)),
                partial(run_torchrun, layout, verb),
            )
    if words.dry_run:
        return print_result(text)
    code = start()
    if code in STOPPED_BY.values():
        again = (
            "starts the evaluation again"
            if verb[0] == "eval"
            else "resumes from the newest checkpoint"
        )
        raise (Preempted if code == Preempted.exit_code else Interrupted)(
            f"stopped; the same command {again}"
        )
    if code:
        raise LaunchedError(code)
