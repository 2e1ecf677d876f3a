"""The options of verb launch, and what users of other launchers write instead."""

import argparse
import math
from collections.abc import Callable, Sequence

from infir2.cli.arguments import Parser
from infir2.errors import ConfigError
from infir2.launch.torchrun import default_endpoint

KINDS = ("torchrun", "ray", "slurm")
_DESCRIPTION = (
    "Starts a training verb on many processes and nodes, and exits with the worst rank's code. "
    "SIGTERM and Ctrl-C reach every rank: they save, and the same command resumes. "
    "Example: infir2 launch torchrun --gpus-per-node 8 -- sft RECIPE.toml"
)
_GPUS, _NODES = "write --gpus-per-node M", "write --nodes N"
_HABITS = {
    **dict.fromkeys(("--gpus", "--num-gpus", "--nproc-per-node", "--gres"), _GPUS),
    **dict.fromkeys(("--num-nodes", "--nnodes", "-N"), _NODES),
    "--ntasks-per-node": _GPUS,
    "--cpus-per-task": "write --cpus-per-rank C",
    "--rdzv-endpoint": "write --endpoint HOST:PORT",
    "--rdzv-id": "write --run-id NAME",
    "--master-addr": "set MASTER_ADDR, or write --endpoint HOST:PORT",
    "--master-port": "set MASTER_PORT, or write --endpoint HOST:PORT",
    "--node-rank": "leave it out: the rendezvous numbers the nodes",
    "--rdzv-backend": "leave it out: it is always c10d",
    "--standalone": "leave it out: one node is the default",
    "--address": "set RAY_ADDRESS to the cluster's",
    **dict.fromkeys(("--time", "-t"), "write --sbatch=--time=HH:MM:SS"),
    **dict.fromkeys(("--partition", "-p"), "write --sbatch=--partition=NAME"),
    **dict.fromkeys(("--account", "-A"), "write --sbatch=--account=NAME"),
    **{
        f"--{name}": f"write --sbatch=--{name}=VALUE"
        for name in ("qos", "mem", "constraint", "reservation", "nodelist", "exclude", "job-name")
    },
}
# Options that only some launchers have a use for.
_KINDS_OF = {
    **dict.fromkeys(("sbatch", "in_job", "no_wait"), ("slurm",)),
    **dict.fromkeys(("endpoint", "run_id", "local_address"), ("torchrun",)),
    "cpus_per_rank": ("ray", "slurm"),
    "gpus_per_engine": ("ray",),
}
_SIZES = ("--nodes", "-N", "--gpus-per-node", "--ntasks-per-node")


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """The options before `--`. Raises ConfigError for unknown ones and those of other launchers."""
    for argument in arguments:
        if advice := _HABITS.get(argument.partition("=")[0].replace("_", "-")):
            raise ConfigError(f"{argument} is not an option of infir2 launch; {advice}.")
    parser = launch_parser()
    options = parser.parse_args(arguments)
    for name, kinds in _KINDS_OF.items():
        if options.kind not in kinds and getattr(options, name) != parser.get_default(name):
            raise ConfigError(
                f"--{name.replace('_', '-')} is for infir2 launch {' and '.join(kinds)}; with "
                f"{options.kind}, leave it out."
            )
    return options


def launch_parser() -> Parser:
    parser = Parser(
        prog="infir2 launch",
        usage="infir2 launch torchrun|ray|slurm [options] -- VERB ARGS",
        description=_DESCRIPTION,
    )
    parser.add_argument(
        "kind",
        choices=KINDS,
        metavar="torchrun|ray|slurm",
        help="torchrun: this machine, or this node of several; ray; slurm",
    )
    _add_size_options(parser)
    _add_rendezvous_options(parser)
    parser.add_argument(
        "--sbatch",
        action="append",
        type=_sbatch_option,
        default=[],
        metavar="OPTION",
        help="slurm: a further option, --sbatch=--partition=gpu",
    )
    parser.add_argument(
        "--in-job", action="store_true", help="slurm: run in this job, on all its nodes"
    )
    parser.add_argument("--no-wait", action="store_true", help="slurm: exit once the job is queued")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and exit")
    return parser


def _add_size_options(parser: Parser) -> None:
    parser.add_argument(
        "--nodes", type=_at_least(int, 1), default=1, metavar="N", help="machines (default 1)"
    )
    parser.add_argument(
        "--gpus-per-node",
        type=_at_least(int, 1),
        dest="ranks_per_node",
        metavar="M",
        help="ranks on each node, one per GPU (torchrun: default this machine's GPUs, or 1)",
    )
    parser.add_argument(
        "--cpu", action="store_true", help="ranks run on CPUs; ray, slurm: request no GPUs"
    )
    parser.add_argument(
        "--cpus-per-rank",
        type=_at_least(float, 0.01),
        default=1.0,
        metavar="C",
        help="ray, slurm: cores to request per rank (default 1)",
    )
    parser.add_argument(
        "--engines",
        type=_at_least(int, 1),
        default=0,
        metavar="N",
        help="ray, rl: N rollout engines with GPUs of their own: native ones, or servers as "
        "rollout.engine says (default: one in each rank's process, or servers on its GPUs)",
    )
    parser.add_argument(
        "--gpus-per-engine",
        type=_at_least(int, 1),
        default=1,
        metavar="N",
        help="ray, rl: GPUs of each of --engines, the rollout.tensor_parallel of a server",
    )
    parser.add_argument(
        "--max-restarts",
        type=_at_least(int, 0),
        default=3,
        metavar="R",
        help="restarts from the newest checkpoint after a death, and of each engine (default 3)",
    )


def _add_rendezvous_options(parser: Parser) -> None:
    parser.add_argument(
        "--endpoint",
        default=default_endpoint(),
        metavar="HOST:PORT",
        help="torchrun on several nodes: the rendezvous (default $MASTER_ADDR:$MASTER_PORT)",
    )
    parser.add_argument(
        "--run-id",
        default="infir2",
        help="torchrun on several nodes: the same name on all nodes of a job (default infir2)",
    )
    parser.add_argument(
        "--local-address",
        default="",
        metavar="HOST",
        help="torchrun on several nodes: this node's address, if it is not its host name",
    )


def _at_least(convert: Callable[[str], float], minimum: float) -> Callable[[str], float]:
    def number(text: str) -> float:
        if not minimum <= (value := convert(text)) < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a number of at least {minimum}")
        return value

    return number


def _sbatch_option(text: str) -> str:
    if not text.startswith("-"):
        raise argparse.ArgumentTypeError(f"{text}: write its dashes too, --sbatch=--{text}")
    if text.partition("=")[0].partition(" ")[0] in _SIZES:
        raise argparse.ArgumentTypeError(f"{text}: set --nodes N and --gpus-per-node M instead")
    return text
