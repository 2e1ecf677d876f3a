"""The verb launch: a training verb on many processes and nodes."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace

from infir2.cli.arguments import Parser
from infir2.cli.recipe import KINDS
from infir2.config.variables import variables_of
from infir2.errors import ConfigError, Interrupted, LaunchedError, Preempted
from infir2.launch import ray, slurm
from infir2.launch.torchrun import Layout, check_words, default_endpoint, default_ranks, run_torchrun, torchrun_command

_ABOUT = (
    "Starts a training verb on many processes and nodes, and ends with the worst rank's exit code. SIGTERM and Ctrl-C reach every "
    "rank: they save, and the same command goes on. Example: infir2 launch torchrun --gpus-per-node 8 -- sft RECIPE.toml"
)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 1")
    return int(text)


def _parser() -> Parser:
    parser = Parser(prog="infir2 launch", usage="infir2 launch torchrun|ray|slurm [options] -- VERB ARGS", description=_ABOUT)
    parser.add_argument("kind", choices=("torchrun", "ray", "slurm"), help="torchrun: this machine, or this node of many; ray; slurm")
    parser.add_argument("--nodes", type=_count, default=1, metavar="N", help="machines (default 1)")
    parser.add_argument("--gpus-per-node", type=_count, metavar="M", help="ranks on each node, one per GPU (default: the GPUs here, or 1)")
    parser.add_argument("--cpu", action="store_true", help="ray, slurm: ranks run on CPUs, so ask for no GPUs")
    parser.add_argument("--cpus-per-rank", type=float, default=1.0, metavar="C", help="ray, slurm: cores to ask for per rank (default 1)")
    apart = "ray, rl: N rollout engines apart from the ranks, a GPU each (default: one in each rank)"
    parser.add_argument("--engines", type=_count, default=0, metavar="N", help=apart)
    again = "restarts from the newest checkpoint after a death, and of each engine apart (default 3)"
    parser.add_argument("--max-restarts", type=int, default=3, metavar="R", help=again)
    meet = "torchrun on several nodes: where they meet (default $MASTER_ADDR:$MASTER_PORT)"
    parser.add_argument("--endpoint", default=default_endpoint(), metavar="HOST:PORT", help=meet)
    parser.add_argument("--run-id", default="infir2", help="torchrun on several nodes: one name for all nodes of a job (default infir2)")
    parser.add_argument("--local-address", default="", metavar="HOST", help="torchrun on several nodes: this node, if not its host name")
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="slurm: a further option, --sbatch=--partition=gpu")
    parser.add_argument("--no-wait", action="store_true", help="slurm: end when the job is queued")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and run nothing")
    return parser


def launch(arguments: Sequence[str]) -> None:
    """infir2 launch torchrun|ray|slurm [options] -- VERB ARGS"""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    words, verb = _parser().parse_args(arguments[:cut]), list(arguments[cut + 1 :])
    ranks = words.gpus_per_node or (1 if verb[:1] == ["eval"] else default_ranks())
    layout = Layout(
        nodes=words.nodes,
        ranks_per_node=ranks,
        cpu=words.cpu,
        cpus_per_rank=words.cpus_per_rank,
        engines=words.engines,
        max_restarts=words.max_restarts,
        endpoint=words.endpoint,
        run_id=words.run_id,
        local_address=words.local_address,
    )
    check_words(verb, layout)
    if layout.engines and (words.kind, verb[0]) != ("ray", "rl"):
        raise ConfigError("--engines is for infir2 launch ray ... -- rl: elsewhere every rank has the engine it needs.")
    code = {"torchrun": _torchrun, "ray": _ray, "slurm": _slurm}[words.kind](layout, verb, words)
    if code in (Preempted.exit_code, Interrupted.exit_code):
        raise (Preempted if code == Preempted.exit_code else Interrupted)("the ranks have saved; the same command goes on from there")
    if code:
        raise LaunchedError(code)


def _torchrun(layout: Layout, verb: list[str], words: argparse.Namespace) -> int:
    command = torchrun_command(layout, verb)
    return _print(shlex.join(command)) if words.dry_run else run_torchrun(layout, verb)


def _slurm(layout: Layout, verb: list[str], words: argparse.Namespace) -> int:
    script = slurm.batch_script(layout, verb, words.sbatch)
    return _print(script.rstrip()) if words.dry_run else slurm.submit(script, wait=not words.no_wait)


def _ray(layout: Layout, verb: list[str], words: argparse.Namespace) -> int:
    if words.dry_run:
        command = [sys.executable, *ray.node_command(replace(layout, endpoint="HOST:PORT", local_address="HOST"), verb)]
        groups = "; ".join(f"{len(bundles)} bundles of {bundles[0]}, {strategy}" for bundles, strategy in ray.placement(layout))
        return _print(f"# {groups}; in each of the first:\n{shlex.join(command)}")
    return ray.run_ray(layout, verb, list(variables_of(KINDS[verb[0]][0])))


def _print(text: str) -> int:
    print(text)
    return 0
