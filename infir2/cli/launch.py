"""Verb launch: a training verb on many processes and nodes."""

import argparse
import difflib
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
    split_json,
    split_recipe_arguments,
    wants_help,
)
from infir2.cli.launch_options import KINDS, launch_parser, parse_options
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
    default_ranks,
    run_torchrun,
    runs_benchmarks,
    torchrun_command,
)
from infir2.terminal import begin_phase, log, print_result, pulse

_START_SECONDS = 9.0  # torchrun imports torch; then the ranks begin
_DASHES = "-\u2013\u2014"  # a text program turns -- into a long dash


def launch(arguments: Sequence[str]) -> None:
    """infir2 launch torchrun|ray|slurm [options] -- VERB ARGS

    Raises ConfigError, Preempted, Interrupted, or LaunchedError with the worst rank's code.
    """
    own_arguments, command = _split_command(arguments)
    options = parse_options(own_arguments)
    layout = _layout(options, command)
    if wants_help(command):
        raise ConfigError(f"--help needs no launch: write infir2 {command[0]} --help.")
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
        raise LaunchedError(code, _message_place(options.kind, command[0]))


def _message_place(kind: str, verb: str) -> str:
    if kind == "slurm":  # of a job that was refused, sbatch has said why
        return f"in infir2-{verb}-JOB.log, or above if sbatch has queued no job"
    return "above"


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
        if argument in VERBS or argument.endswith(".toml"):
            own = [word for word in arguments[:index] if word.strip(_DASHES)]
            raise ConfigError(_missing_dashes(own, list(arguments[index:])))
    return arguments, []


def _missing_dashes(own: list[str], command: list[str]) -> str:
    """What to write instead of `infir2 launch OWN COMMAND`, where the verb may lack too."""
    missing, note, first = "--", "", command[0]
    if first not in VERBS:
        near = difflib.get_close_matches(own[-1], VERBS, 1) if own else []
        command = [*(near or ["sft"]), *command]
        own = own[: len(own) - len(near)]  # the last one was the verb
        missing, note = "-- VERB", f" (VERB is one of {', '.join(VERBS)})"
    kind = [] if any(each in own for each in KINDS) else ["torchrun"]
    fixed = shlex.join([*kind, *own, "--", *command])
    return f"{missing} is missing before {first}: write infir2 launch {fixed}{note}"


def _check_order(own: list[str], command: list[str]) -> None:
    """Raise ConfigError if an option of launch stands after `--`, among those of the verb."""
    actions = {
        name: action for action in launch_parser()._actions for name in action.option_strings
    }
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
    _check_engines(options.kind, layout, command[0])
    return layout


def _check_engines(kind: str, layout: Layout, verb: str) -> None:
    if layout.gpus_per_engine > 1 and not layout.engines:
        raise ConfigError("--gpus-per-engine is for the engines of --engines N: set that too.")
    if layout.engines and (kind, verb) != ("ray", "rl"):
        raise ConfigError(
            "--engines is for infir2 launch ray ... -- rl: "
            "with other launchers and verbs every rank has the engine it needs."
        )


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
    if runs_benchmarks(command):
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
