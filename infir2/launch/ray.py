"""`infir2 launch ray`: one torchrun per node of a running Ray cluster, placed by a placement group, restarted after a death.

Ray places, streams logs and notices dead nodes; on each node torchrun starts the ranks. A node is an actor that holds one bundle
(its GPUs and CPUs). When a rank, a torchrun or a node dies, everything is ended and started again from the newest checkpoint, at
most `max_restarts` times.
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
    DIED,
    RESTARTED,
    STOPPED_BY,
    die_with_parent,
    stop_signals,
    worst_code,
)
from infir2.launch.torchrun import Layout
from infir2.terminal import log

FIRST_ROOM_SECONDS = 60.0  # room that never was will not come
LATER_ROOM_SECONDS = 1800.0  # after a death: a machine has to start again, or another has to come
PEER_SECONDS = 60.0  # one node has ended badly: the others notice, and tell their reason
POLL_SECONDS = 0.5
ENGINES = "INFIR2_ENGINES"  # ID:N, the placement group of engines apart and how often each may be started again
_PASSED = (
    "INFIR2_",
    "OMP_",
    "MKL_",
    "NCCL_",
    "TORCH_",
    "HF_",
)  # variables that travel to every node, beside the user's words


class Node:
    """An actor: the ranks of one node."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def address(self) -> tuple[str, int]:
        """This node's address, and a port that is free on it."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def start(self, command: Sequence[str], variables: Mapping[str, str], directory: str) -> None:
        """Start the node's torchrun; its output goes where this actor's does, to the driver."""
        self._process = subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | dict(variables),
            cwd=directory if os.path.isdir(directory) else None,
            preexec_fn=die_with_parent,
        )

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        assert self._process is not None
        return self._process.poll()

    def stop(self, number: int) -> None:
        """Pass a signal on."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)


def node_command(layout: Layout, words: Sequence[str]) -> list[str]:
    """What runs on every node, after the interpreter."""
    command = [
        "-m",
        "infir2",
        "launch",
        "torchrun",
        "--nodes",
        str(layout.nodes),
        "--gpus-per-node",
        str(layout.ranks_per_node),
    ]
    command += ["--max-restarts", "0"]  # the driver counts restarts, of all nodes together
    if layout.nodes > 1:
        command += [
            "--endpoint",
            layout.endpoint,
            "--run-id",
            layout.run_id,
            "--local-address",
            layout.local_address,
        ]
    return [*command, "--", *words]


def placement(layout: Layout) -> list[tuple[list[dict[str, float]], str]]:
    """Bundles and strategy of each placement group: nodes, every one on a machine of its own, and engines apart."""

    def bundle(processes: int) -> dict[str, float]:
        return {"CPU": layout.cpus_per_rank * processes} | (
            {} if layout.cpu else {"GPU": float(processes)}
        )

    nodes = (
        [bundle(layout.ranks_per_node)] * layout.nodes,
        "STRICT_SPREAD" if layout.nodes > 1 else "STRICT_PACK",
    )
    return [nodes, ([bundle(1)] * layout.engines, "PACK")] if layout.engines else [nodes]


def description(layout: Layout, words: Sequence[str]) -> str:
    """For --dry-run: the placement groups, and the command of a node."""
    command = [
        sys.executable,
        *node_command(replace(layout, endpoint="HOST:PORT", local_address="HOST"), words),
    ]
    groups = "; ".join(
        f"{len(bundles)} bundles of {bundles[0]}, {strategy}"
        for bundles, strategy in placement(layout)
    )
    return f"# {groups}; in each of the first:\n{shlex.join(command)}"


def connect(address: str) -> None:
    """`ray.init`, but SIGTERM stays with the handler it has. Call it in the main thread. Raises ConnectionError without a cluster."""
    import ray

    # ray.init takes SIGTERM over, to exit at once; one that comes meanwhile waits for the handler's return
    handler, blocked = (
        signal.getsignal(signal.SIGTERM),
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM}),
    )
    try:
        ray.init(address=address, log_to_driver=True)
    finally:
        signal.signal(signal.SIGTERM, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def actors_in(group: Any, kind: type, *arguments: Any, **options: Any) -> list[Any]:
    """An actor in each bundle of a placement group, which holds all of it."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as In

    return [
        ray.remote(kind)
        .options(
            num_cpus=room["CPU"],
            num_gpus=room.get("GPU", 0),
            scheduling_strategy=In(group, index),
            **options,
        )
        .remote(*arguments)
        for index, room in enumerate(group.bundle_specs)
    ]


def run_ray(layout: Layout, words: Sequence[str], variables: Sequence[str]) -> int:
    """Run on the cluster that `RAY_ADDRESS`, `ray start` or `ray job submit` names; the worst rank's code.

    `variables`: names of environment variables that the verb reads. Raises ConfigError without Ray, a cluster or room on it,
    RankError when a dead node's room does not come back.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError("Ray is not installed here: pip install 'infir2[ray]'.") from error
    driver = _Driver(layout, words, variables)
    with stop_signals(driver.stop):
        try:
            connect(os.environ.get("RAY_ADDRESS", "auto"))
        except ConnectionError as error:
            raise ConfigError(
                "no Ray cluster runs here: start one with `ray start --head`, or set RAY_ADDRESS."
            ) from error
        try:
            return driver.run()
        finally:
            ray.shutdown()


class _Stopped(Exception):
    """SIGTERM or Ctrl-C came before all nodes had started."""


class _Driver:
    def __init__(self, layout: Layout, words: Sequence[str], variables: Sequence[str]) -> None:
        self._layout, self._words = layout, words
        passed = {name: os.environ[name] for name in variables if name in os.environ}
        self._variables = passed | {
            name: value for name, value in os.environ.items() if name.startswith(_PASSED)
        }
        self._nodes: list[Any] = []
        self._stopped = 0  # the newest stop signal
        self._unsent: list[int] = []  # stop signals of which the nodes have not heard

    def run(self) -> int:
        from ray.util.placement_group import placement_group, remove_placement_group

        groups = [
            placement_group(bundles, strategy=strategy)
            for bundles, strategy in placement(self._layout)
        ]
        if self._layout.engines:
            self._variables |= {ENGINES: f"{groups[1].id.hex()}:{self._layout.max_restarts}"}
        code = DIED
        try:
            for attempt in range(self._layout.max_restarts + 1):
                code = self._attempt(groups, attempt)
                if self._stopped or code not in RESTARTED:
                    break
                left = self._layout.max_restarts - attempt
                log(
                    f"a worker died; {left} restarts left, from the newest checkpoint",
                    "infir2 launch",
                )
        except _Stopped:
            code = -self._stopped
        finally:
            for group in groups:
                remove_placement_group(group)
        # A node that hears of the signal before it can handle it ends by it.
        return STOPPED_BY[self._stopped] if self._stopped and code == -self._stopped else code

    def stop(self, number: int, _frame: FrameType | None) -> None:
        """Handle SIGTERM or Ctrl-C: the nodes hear of it as soon as they are there."""
        self._stopped = number
        self._unsent.append(number)

    def _attempt(self, groups: Sequence[Any], attempt: int) -> int:
        import ray

        deadline = time.monotonic() + LATER_ROOM_SECONDS
        while True:
            started = False
            try:
                self._await_room(groups, attempt)
                self._start(groups[0], attempt)
                started = True
                return self._wait()
            except ray.exceptions.RayActorError:
                # The cluster takes a moment to know that a machine is dead, and may place a node there: that is no further death.
                if started or not attempt or time.monotonic() > deadline:
                    return DIED
            finally:
                for node in self._nodes:
                    ray.kill(node)  # with it goes, by the kernel, all that it started
            time.sleep(POLL_SECONDS)

    def _await_room(self, groups: Sequence[Any], attempt: int) -> None:
        import ray

        seconds = LATER_ROOM_SECONDS if attempt else FIRST_ROOM_SECONDS
        for group, (bundles, _) in zip(groups, placement(self._layout), strict=True):
            wanted = f"room for {len(bundles)} bundles of {bundles[0]}"
            if attempt and not group.wait(1):
                log(f"waits up to {seconds / 60:.0f} minutes for {wanted}", "infir2 launch")
            if not self._until(partial(group.wait, 1), seconds):
                there = ray.cluster_resources()
                has = f"{wanted} after {seconds:.0f} s (in all it has CPU {there.get('CPU', 0):g}, GPU {there.get('GPU', 0):g})"
                if attempt:
                    raise RankError(
                        f"the Ray cluster again has no {has}: start the dead node again; the same command goes on."
                    )
                raise ConfigError(f"the Ray cluster has no {has}: ask for less, or end other jobs.")

    def _until(self, ready: Callable[[], bool], seconds: float) -> bool:
        """Whether `ready`, which takes a moment, came true in time. Raises _Stopped."""
        deadline = time.monotonic() + seconds
        while not self._stopped and not (there := ready()) and time.monotonic() < deadline:
            pass
        if self._stopped:
            raise _Stopped
        return there

    def _start(self, group: Any, attempt: int) -> None:
        """Start every node's torchrun. A bundle whose machine died unnoticed is placed again first, which takes as long as it does."""
        import ray

        self._nodes = actors_in(group, Node)
        addresses = self._get([node.address.remote() for node in self._nodes])
        endpoint, run_id = f"{addresses[0][0]}:{addresses[0][1]}", f"infir2-{os.getpid()}-{attempt}"
        variables = self._variables | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        starts = []
        for node, (address, _) in zip(self._nodes, addresses, strict=True):
            layout = replace(self._layout, endpoint=endpoint, run_id=run_id, local_address=address)
            starts.append(
                node.start.remote(node_command(layout, self._words), variables, os.getcwd())
            )
        self._get(starts)

    def _get(self, references: list[Any]) -> list[Any]:
        """What the nodes answer. Raises _Stopped, RayActorError."""
        import ray

        if not self._until(
            lambda: not ray.wait(references, num_returns=len(references), timeout=POLL_SECONDS)[1],
            LATER_ROOM_SECONDS,
        ):
            raise RankError(
                f"a node of the Ray cluster gave no answer in {LATER_ROOM_SECONDS:.0f} s: `ray status` shows the nodes"
            )
        return list(ray.get(references))

    def _wait(self) -> int:
        """The worst node's code, when all have ended, or one has badly and the others have had time to."""
        codes: list[int | None] = [None] * self._layout.nodes
        while (
            None in codes and worst_code([code for code in codes if code is not None] or [0]) == 0
        ):
            codes = self._poll()
        deadline = time.monotonic() + PEER_SECONDS
        while None in codes and time.monotonic() < deadline:
            codes = self._poll()
        return worst_code(DIED if code is None else code for code in codes)

    def _poll(self) -> list[int | None]:
        """Exit codes of the nodes after a moment, in which stop signals are passed on."""
        import ray

        while self._unsent:
            number = self._unsent.pop(0)
            for node in self._nodes:
                node.stop.remote(number)
        time.sleep(POLL_SECONDS)
        return list(ray.get([node.poll.remote() for node in self._nodes]))
