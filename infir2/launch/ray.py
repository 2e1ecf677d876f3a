"""`infir2 launch ray`: one torchrun per node of a running Ray cluster, restarted after a death.

Ray places the nodes, streams their logs and notices dead machines. A node is an actor that holds
one bundle of a placement group (its GPUs and CPUs); in it torchrun starts the ranks. When a rank, a
torchrun or a node dies, all are stopped and started again from the newest checkpoint, at most
`max_restarts` times.
"""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import FrameType
from typing import Any

from infir2.errors import ConfigError, RankError
from infir2.launch.ranks import (
    CODE_OF_SIGNAL,
    DIED,
    RESTARTABLE,
    die_with_parent,
    handle_stop_signals,
    worst_code,
)
from infir2.launch.torchrun import Layout
from infir2.terminal import log

START_TIMEOUT_SECONDS = 60.0  # resources that the cluster never had will not appear
RECOVERY_TIMEOUT_SECONDS = 1800.0  # after a death: a machine has to boot, or another to join
PEER_SECONDS = 60.0  # after a node failed: time for the others to notice and to report
POLL_SECONDS = 0.5
# ID:N, the placement group of the engines and how often Ray may restart each of them.
ENGINES_VARIABLE = "INFIR2_RAY_ENGINES"
# ID:GPUS;GPUS, the placement group of several nodes and the GPUs of each of its bundles ("0,1").
NODES_VARIABLE = "INFIR2_RAY_NODES"
# Environment variables that every node receives, beside those of the recipe.
_FORWARDED_PREFIXES = ("INFIR2_", "OMP_", "MKL_", "NCCL_", "TORCH_", "HF_")


class Node:
    """Actor: the ranks of one node."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def address(self) -> tuple[str, int]:
        """This node's IP address, and a free port."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def gpus(self) -> str:
        """The GPUs of the bundle, as CUDA_VISIBLE_DEVICES."""
        return os.environ.get("CUDA_VISIBLE_DEVICES", "")

    def start(self, command: Sequence[str], variables: Mapping[str, str], directory: str) -> None:
        """Start torchrun; Ray forwards its output to the driver, as it does this actor's."""
        self._process = subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | dict(variables),
            cwd=directory if os.path.isdir(directory) else None,
            preexec_fn=die_with_parent,
        )

    def poll(self) -> int | None:
        """torchrun's exit code; None while it runs."""
        assert self._process is not None
        return self._process.poll()

    def stop(self, number: int) -> None:
        """Forward a signal."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)


def node_command(layout: Layout, command: Sequence[str]) -> list[str]:
    """What each node runs, without the interpreter. The driver counts restarts, not torchrun."""
    rendezvous: list[str] = []
    if layout.nodes > 1:
        rendezvous = [
            *("--endpoint", layout.endpoint),
            *("--run-id", layout.run_id),
            *("--local-address", layout.local_address),
        ]
    return [
        *("-m", "infir2", "launch", "torchrun"),
        *("--nodes", str(layout.nodes)),
        *("--gpus-per-node", str(layout.ranks_per_node)),
        *("--max-restarts", "0"),
        *(["--cpu"] if layout.cpu else []),
        *rendezvous,
        "--",
        *command,
    ]


def placement(layout: Layout) -> list[tuple[list[dict[str, float]], str]]:
    """(bundles, strategy) of each placement group.

    The first group has one bundle for each node, on a machine of its own; the second, if there are
    engines, one for each engine.
    """

    def bundle(num_processes: int) -> dict[str, float]:
        cpus = {"CPU": layout.cpus_per_rank * num_processes}
        return cpus if layout.cpu else cpus | {"GPU": float(layout.gpus_per_rank * num_processes)}

    strategy = "STRICT_SPREAD" if layout.nodes > 1 else "STRICT_PACK"
    groups = [([bundle(layout.ranks_per_node)] * layout.nodes, strategy)]
    if layout.engines:
        groups.append(([bundle(layout.gpus_per_engine)] * layout.engines, "PACK"))
    return groups


def description(layout: Layout, command: Sequence[str]) -> str:
    """The text of --dry-run: the placement groups, and the command of a node."""
    layout = replace(layout, endpoint="HOST:PORT", local_address="HOST")
    groups = "; ".join(
        f"{len(bundles)} bundles of {bundles[0]}, {strategy}"
        for bundles, strategy in placement(layout)
    )
    node = shlex.join([sys.executable, *node_command(layout, command)])
    return f"# {groups}; in each of the first:\n{node}"


def connect(address: str) -> None:
    """`ray.init` that keeps the SIGTERM handler. Call it in the main thread.

    `ray.init` installs a handler that exits at once. SIGTERM is blocked until ours is installed
    again. Raises ConnectionError if there is no cluster.
    """
    import ray

    handler = signal.getsignal(signal.SIGTERM)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        ray.init(address=address, log_to_driver=True)
    finally:
        signal.signal(signal.SIGTERM, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def start_actors(group: Any, actor_class: type, *arguments: Any, **options: Any) -> list[Any]:
    """One actor in each bundle of a placement group, with all resources of the bundle.

    `arguments` are the constructor's, `options` Ray's.
    """
    return [
        start_actor(
            group,
            index,
            actor_class,
            *arguments,
            **{"num_cpus": bundle["CPU"], "num_gpus": bundle.get("GPU", 0)} | options,
        )
        for index, bundle in enumerate(group.bundle_specs)
    ]


def start_actor(group: Any, index: int, actor_class: type, *arguments: Any, **options: Any) -> Any:
    """One actor in a bundle of a placement group; arguments as `start_actors`."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    strategy = PlacementGroupSchedulingStrategy(group, index)
    return (
        ray.remote(actor_class).options(scheduling_strategy=strategy, **options).remote(*arguments)
    )


def placement_group_of(group_id: str) -> Any:
    """The placement group with this id, in hexadecimal digits."""
    import ray
    from ray.util.placement_group import PlacementGroup

    return PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group_id)))


def run_ray(layout: Layout, command: Sequence[str], variables: Sequence[str]) -> int:
    """Run `infir2 COMMAND` on a Ray cluster and return the worst rank's exit code.

    Args:
        layout: the processes.
        command: the verb and its arguments.
        variables: names of the environment variables that the verb reads.

    Raises:
        ConfigError: Ray is not installed, RAY_ADDRESS (or this machine) has no cluster, or the
            cluster lacks the resources.
        RankError: the resources of a dead node did not come back.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError("Ray is not installed: pip install 'infir2[ray]'.") from error
    driver = _Driver(layout, command, variables)
    with handle_stop_signals(driver.stop):
        try:
            connect(os.environ.get("RAY_ADDRESS", "auto"))
        except ConnectionError as error:
            raise ConfigError(
                "no Ray cluster runs on this machine: "
                "start one with `ray start --head`, or set RAY_ADDRESS."
            ) from error
        try:
            return driver.run()
        finally:
            ray.shutdown()


class _Stopped(Exception):
    """SIGTERM or SIGINT arrived before all nodes had started."""


class _Driver:
    """Starts the nodes, waits for them, and restarts them."""

    def __init__(self, layout: Layout, command: Sequence[str], variables: Sequence[str]) -> None:
        self._layout, self._command = layout, command
        self._variables = {
            name: value
            for name, value in os.environ.items()
            if name in variables or name.startswith(_FORWARDED_PREFIXES)
        }
        self._nodes: list[Any] = []
        self._stop_signal = 0  # the newest; 0 for none
        self._unsent_signals: list[int] = []  # signals that the nodes have not received

    def run(self) -> int:
        """Run the attempts and return the exit code of the last one."""
        from ray.util.placement_group import placement_group, remove_placement_group

        groups = [
            placement_group(bundles, strategy=strategy)
            for bundles, strategy in placement(self._layout)
        ]
        if self._layout.engines:
            engines = f"{groups[1].id.hex()}:{self._layout.max_restarts}"
            self._variables |= {ENGINES_VARIABLE: engines}
        try:
            code = self._run_attempts(groups)
        except _Stopped:
            code = -self._stop_signal
        finally:
            for group in groups:
                remove_placement_group(group)
        # A node without a signal handler yet is killed by the signal itself.
        is_killed = self._stop_signal and code == -self._stop_signal
        return CODE_OF_SIGNAL[self._stop_signal] if is_killed else code

    def stop(self, number: int, _frame: FrameType | None) -> None:
        """Signal handler: the nodes receive the signal once they have started."""
        self._stop_signal = number
        self._unsent_signals.append(number)

    def _run_attempts(self, groups: Sequence[Any]) -> int:
        code = DIED
        for attempt in range(self._layout.max_restarts + 1):
            code = self._run_attempt(groups, attempt)
            if self._stop_signal or code not in RESTARTABLE:
                break
            left = self._layout.max_restarts - attempt
            text = f"a worker died; {left} restarts left, from the newest checkpoint"
            log(text, "infir2 launch")
        return code

    def _run_attempt(self, groups: Sequence[Any], attempt: int) -> int:
        import ray

        deadline = time.monotonic() + RECOVERY_TIMEOUT_SECONDS
        while True:
            started = False
            try:
                self._await_resources(groups, attempt)
                self._start(groups[0], attempt)
                started = True
                return self._wait()
            except ray.exceptions.RayActorError:
                # Ray learns of a dead machine with a delay and may place a node on it: try again,
                # without counting this as a restart.
                if started or not attempt or time.monotonic() > deadline:
                    return DIED
            finally:
                for node in self._nodes:
                    ray.kill(node)  # the kernel kills the processes that the actor started
            time.sleep(POLL_SECONDS)

    def _await_resources(self, groups: Sequence[Any], attempt: int) -> None:
        """Wait until each placement group is placed. Raises ConfigError, RankError, _Stopped."""
        import ray

        seconds = RECOVERY_TIMEOUT_SECONDS if attempt else START_TIMEOUT_SECONDS
        for group, (bundles, _) in zip(groups, placement(self._layout), strict=True):
            wanted = f"room for {len(bundles)} bundles of {bundles[0]}"
            if attempt and not group.wait(1):
                log(f"waits up to {seconds / 60:.0f} minutes for {wanted}", "infir2 launch")
            if self._wait_for(partial(group.wait, 1), seconds):
                continue
            total = ray.cluster_resources()
            missing = (
                f"{wanted} after {seconds:.0f} s "
                f"(its total is CPU {total.get('CPU', 0):g}, GPU {total.get('GPU', 0):g})"
            )
            if attempt:
                raise RankError(
                    f"the Ray cluster again has no {missing}: "
                    "start the dead node and run the same command to resume."
                )
            raise ConfigError(f"the Ray cluster has no {missing}: ask for less, or end other jobs.")

    def _wait_for(self, is_ready: Callable[[], bool], seconds: float) -> bool:
        """Whether `is_ready`, which blocks for a moment, was true in time. Raises _Stopped."""
        deadline = time.monotonic() + seconds
        while not self._stop_signal and not (ready := is_ready()) and time.monotonic() < deadline:
            pass
        if self._stop_signal:
            raise _Stopped
        return ready

    def _start(self, group: Any, attempt: int) -> None:
        """Start every node's torchrun.

        If the machine of a bundle has died unnoticed, Ray first places the bundle again.
        """
        import ray

        self._nodes = start_actors(group, Node)
        addresses = self._get([node.address.remote() for node in self._nodes])
        host, port = addresses[0]
        layout = replace(
            self._layout, endpoint=f"{host}:{port}", run_id=f"infir2-{os.getpid()}-{attempt}"
        )
        variables = self._variables | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        if layout.nodes > 1:
            gpus = self._get([node.gpus.remote() for node in self._nodes])
            variables[NODES_VARIABLE] = f"{group.id.hex()}:{';'.join(gpus)}"
        starts = []
        for node, (address, _) in zip(self._nodes, addresses, strict=True):
            command = node_command(replace(layout, local_address=address), self._command)
            starts.append(node.start.remote(command, variables, os.getcwd()))
        self._get(starts)

    def _get(self, references: list[Any]) -> list[Any]:
        """`ray.get` that can be interrupted. Raises _Stopped, RankError, RayActorError."""
        import ray

        def is_ready() -> bool:
            count = len(references)
            return not ray.wait(references, num_returns=count, timeout=POLL_SECONDS)[1]

        if not self._wait_for(is_ready, RECOVERY_TIMEOUT_SECONDS):
            raise RankError(
                "a node of the Ray cluster did not answer within "
                f"{RECOVERY_TIMEOUT_SECONDS:.0f} s: `ray status` lists the nodes"
            )
        return list(ray.get(references))

    def _wait(self) -> int:
        """Wait until all nodes have ended, or PEER_SECONDS after one failed; their worst code."""
        codes: list[int | None] = [None] * self._layout.nodes
        while None in codes and not any(codes):
            codes = self._poll()
        deadline = time.monotonic() + PEER_SECONDS
        while None in codes and time.monotonic() < deadline:
            codes = self._poll()
        return worst_code(DIED if code is None else code for code in codes)

    def _poll(self) -> list[int | None]:
        """Forward stop signals, wait for a moment, and return the nodes' exit codes."""
        import ray

        while self._unsent_signals:
            number = self._unsent_signals.pop(0)
            for node in self._nodes:
                node.stop.remote(number)
        time.sleep(POLL_SECONDS)
        return list(ray.get([node.poll.remote() for node in self._nodes]))
