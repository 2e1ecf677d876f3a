"""Verb launch: a training verb on many processes and nodes."""

import argparse
import math
import os
import shlex
import threading
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from infir2.cli.arguments import (
    RECIPE_CLASSES,
    Parser,
    split_json,
    split_recipe_arguments,
    wants_help,
)
from infir2.cli.rl import split_modes
from infir2.config import load
from infir2.config.env_vars import variables_of
from infir2.config.reward_rules import is_server
from infir2.config.schema import RlRecipe, RolloutSection
from infir2.errors import ConfigError, Interrupted, LaunchedError, Preempted
from infir2.launch import ray, slurm
from infir2.launch.ranks import CODE_OF_SIGNAL
from infir2.launch.torchrun import (
    VERBS,
    Layout,
    check_command,
    check_machine,
    default_endpoint,
    default_ranks,
    run_torchrun,
    runs_benchmarks,
    torchrun_command,
)
from infir2.terminal import begin_phase, log, print_result, pulse

_START_SECONDS = 9.0  # torchrun imports torch; then the ranks begin
KINDS = ("torchrun", "ray", "slurm")
_DESCRIPTION = (
    "Starts a training verb on many processes and nodes, and exits with the worst rank's code. "
    "SIGTERM and Ctrl-C reach every rank: they save, and the same command resumes. "
    "Example: infir2 launch torchrun --gpus-per-node 8 -- sft RECIPE.toml"
)


_HABITS = {
    "--gpus": "write --gpus-per-node M",
    "--num-gpus": "write --gpus-per-node M",
    "--num-nodes": "write --nodes N",
    "--nproc-per-node": "write --gpus-per-node M",
    "--nnodes": "write --nodes N",
    "--rdzv-endpoint": "write --endpoint HOST:PORT",
    "--master-addr": "set MASTER_ADDR, or write --endpoint HOST:PORT",
    "--master-port": "set MASTER_PORT, or write --endpoint HOST:PORT",
    "--partition": "write --sbatch=--partition=NAME",
    "--time": "write --sbatch=--time=HH:MM:SS",
    "--account": "write --sbatch=--account=NAME",
}


def launch(arguments: Sequence[str]) -> None:
    """infir2 launch torchrun|ray|slurm [options] -- VERB ARGS

    Raises ConfigError, Preempted, Interrupted, or LaunchedError with the worst rank's code.
    """
    own_arguments, command = _split_command(arguments)
    for argument in own_arguments:
        if advice := _HABITS.get(argument.partition("=")[0].replace("_", "-")):
            raise ConfigError(f"{argument} is not an option of infir2 launch; {advice}.")
    options = _parser().parse_args(own_arguments)
    layout = _layout(options, command)
    description, start = _launcher(options, layout, command)
    if options.dry_run:
        print_result(description)
        _log_variables(command[0])
        return
    if options.kind == "torchrun":
        check_machine(layout)
    _check_keys(command, options.kind, layout)
    log(f"starting {command[0]} on {_size(options.kind, layout)}", "infir2 launch")
    code = _run_torchrun(start) if options.kind == "torchrun" else start()
    if code in CODE_OF_SIGNAL.values():
        text = "Stopped. Run the same command to resume."
        raise (Preempted if code == Preempted.exit_code else Interrupted)(text)
    if code:
        raise LaunchedError(code)


def _log_variables(verb: str) -> None:
    """Say which variables of this environment the verb would read."""
    names = [name for name in variables_of(RECIPE_CLASSES[verb]) if os.environ.get(name)]
    if names:
        values = ", ".join(f"{name}={os.environ[name]}" for name in names)
        log(f"{verb} reads from the environment: {values}", "infir2 launch")


def _run_torchrun(start: Callable[[], int]) -> int:
    """Start the ranks; say so until rank 0 speaks for itself."""
    with pulse("the ranks are starting"):
        timer = threading.Timer(_START_SECONDS, begin_phase, ("",))
        timer.daemon = True
        timer.start()
        try:
            return start()
        finally:
            timer.cancel()


def _split_command(arguments: Sequence[str]) -> tuple[Sequence[str], list[str]]:
    """(arguments of launch, the verb and its arguments). Raises ConfigError for a missing `--`."""
    if "--" in arguments:
        index = arguments.index("--")
        own, command = list(arguments[:index]), list(arguments[index + 1 :])
        _check_order(own, command)
        return own, command
    for index, argument in enumerate(arguments):
        if argument in VERBS:
            own = list(arguments[:index])
            kind = [] if any(each in own for each in KINDS) else ["torchrun"]
            fixed = shlex.join([*kind, *own, "--", *arguments[index:]])
            raise ConfigError(
                f"-- is missing before the verb {argument}: write infir2 launch {fixed}"
            )
    return arguments, []


def _check_order(own: list[str], command: list[str]) -> None:
    """Raise ConfigError if an option of launch stands after `--`, among those of the verb."""
    actions = {name: action for action in _parser()._actions for name in action.option_strings}
    if runs_benchmarks(command):
        del actions["--engines"]  # those of the evaluation
    for index, argument in enumerate(command):
        name, equals, _ = argument.partition("=")
        if name in actions and name not in ("-h", "--help"):
            end = index + (1 if equals or actions[name].nargs == 0 else 2)
            fixed = [*own, *command[index:end], "--", *command[:index], *command[end:]]
            raise ConfigError(
                f"{name} is an option of infir2 launch and stands before --: write infir2 launch "
                f"{shlex.join(fixed)}"
            )


def _size(kind: str, layout: Layout) -> str:
    nodes = f" on each of {layout.nodes} nodes" if layout.nodes > 1 else ""
    plural = "es" if layout.ranks_per_node > 1 else ""
    return f"{layout.ranks_per_node} process{plural}{nodes}, with {kind}"


def _layout(options: argparse.Namespace, command: list[str]) -> Layout:
    is_evaluation = command[:1] == ["eval"]
    if options.ranks_per_node is None:
        if options.kind != "torchrun" and not is_evaluation:
            raise ConfigError(
                f"infir2 launch {options.kind} cannot count the GPUs of other machines: "
                "set --gpus-per-node M."
            )
        options.ranks_per_node = 1 if is_evaluation else default_ranks()
    if options.in_job:
        options.nodes = slurm.nodes_of_job()
    values: dict[str, Any] = {
        field.name: getattr(options, field.name)
        for field in fields(Layout)
        if hasattr(options, field.name)
    }
    if runs_benchmarks(command):  # the engines of its one process use the GPUs
        values |= {"ranks_per_node": 1, "gpus_per_rank": options.ranks_per_node}
    layout = Layout(**values)
    check_command(command, layout)
    if layout.engines and (options.kind, command[0]) != ("ray", "rl"):
        raise ConfigError(
            "--engines is for infir2 launch ray ... -- rl: "
            "with other launchers and verbs every rank has the engine it needs."
        )
    return layout


def _launcher(
    options: argparse.Namespace, layout: Layout, command: list[str]
) -> tuple[str, Callable[[], int]]:
    """(the text of --dry-run, the function that runs the command and returns its exit code)."""
    if not runs_benchmarks(command):
        _check_recipes(command)
    if options.kind == "ray":
        variables = list(variables_of(RECIPE_CLASSES[command[0]]))
        run = partial(ray.run_ray, layout, command, variables)
        return ray.description(layout, command), run
    if options.kind == "slurm":
        script = slurm.batch_script(layout, command, options.sbatch).rstrip()
        if options.in_job:
            return script, partial(slurm.run_in_job, script)
        return script, partial(slurm.submit, script, wait=not options.no_wait)
    return shlex.join(torchrun_command(layout, command)), partial(run_torchrun, layout, command)


def _check_recipes(command: list[str]) -> None:
    for path in _recipe_arguments(command)[0]:
        if not Path(path).exists():
            raise ConfigError(
                f"{path}: no such recipe; paths are relative to the current directory."
            )


def _check_keys(command: list[str], kind: str, layout: Layout) -> None:
    """Raise ConfigError for what every rank would refuse, before any is started or queued."""
    if runs_benchmarks(command) or wants_help(command):
        return
    arguments = _recipe_arguments(command)
    recipe = load(RECIPE_CLASSES[command[0]], *arguments, os.environ, command[0]).recipe
    if isinstance(recipe, RlRecipe):
        _check_urls(recipe)
        if kind != "torchrun" and not layout.cpu and not recipe.rollout.urls:
            _check_gpus(recipe.rollout, kind, layout)


def _check_urls(recipe: RlRecipe) -> None:
    """Raise ConfigError for a server of RL whose address is none, or whose key is missing."""
    if not recipe.rollout.urls and not any(is_server(each.name) for each in recipe.rl.reward):
        return  # without torch, which takes seconds
    from infir2.engines.http_client import require_urls
    from infir2.preflight.rewards import require_reward_urls

    require_urls(recipe.rollout.urls)
    require_reward_urls(recipe.rl)


def _check_gpus(rollout: RolloutSection, kind: str, layout: Layout) -> None:
    """Raise ConfigError if the servers need other GPUs than those that are requested."""
    from infir2.engines.ray_servers import check_size
    from infir2.engines.server_room import require_room

    if layout.engines and rollout.engine != "native":
        words = layout.engines, layout.gpus_per_engine
        check_size(*words, rollout.engines, rollout.tensor_parallel)
    elif not layout.engines:
        nodes = layout.nodes if kind == "ray" else 1  # Ray spreads the servers over the nodes
        require_room(rollout, layout.ranks_per_node * layout.gpus_per_rank, nodes)


def _recipe_arguments(command: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(recipe paths, keys) of a verb's command line, without the verb's own options."""
    verb, arguments = command[0], split_json(command[1:])[1]
    if verb == "rl":
        arguments = split_modes(arguments)[0]
    return split_recipe_arguments(arguments, verb)


def _parser() -> Parser:
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
