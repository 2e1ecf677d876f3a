"""`infir2 launch ray`: one torchrun per node of a running Ray cluster, placed by a placement group, restarted after a death.

Ray places, streams logs and notices dead nodes; on each node torchrun starts the ranks. A node is an actor that holds one bundle
(its GPUs and CPUs). When a rank, a torchrun or a node dies, everything is ended and started again from the newest checkpoint, at
most `max_restarts` times.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import FrameType
from typing import Any

from infir2.errors import ConfigError
from infir2.launch.ranks import DIED, RESTARTED, die_with_parent, worst_code
from infir2.launch.torchrun import Layout

PLACEMENT_SECONDS = 60.0
POLL_SECONDS = 0.5
ENGINES = "INFIR2_ENGINES"  # ID:N, the placement group of engines apart and how often each may be started again
_PASSED = ("INFIR2_", "OMP_", "MKL_", "NCCL_", "TORCH_", "HF_")  # variables that travel to every node, beside the user's words


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
    command = ["-m", "infir2", "launch", "torchrun", "--nodes", str(layout.nodes), "--gpus-per-node", str(layout.ranks_per_node)]
    command += ["--max-restarts", "0"]  # the driver counts restarts, of all nodes together
    if layout.nodes > 1:
        command += ["--endpoint", layout.endpoint, "--run-id", layout.run_id, "--local-address", layout.local_address]
    return [*command, "--", *words]


def placement(layout: Layout) -> list[tuple[list[dict[str, float]], str]]:
    """Bundles and strategy of each placement group: nodes, every one on a machine of its own, and engines apart."""

    def bundle(processes: int) -> dict[str, float]:
        return {"CPU": layout.cpus_per_rank * processes} | ({} if layout.cpu else {"GPU": float(processes)})

    nodes = [bundle(layout.ranks_per_node)] * layout.nodes, "STRICT_SPREAD" if layout.nodes > 1 else "STRICT_PACK"
    return [nodes, ([bundle(1)] * layout.engines, "PACK")] if layout.engines else [nodes]


def run_ray(layout: Layout, words: Sequence[str], variables: Sequence[str]) -> int:
    """Run on the cluster that `RAY_ADDRESS`, `ray start` or `ray job submit` names; the worst rank's code.

    `variables`: names of environment variables that the verb reads. Raises ConfigError without Ray, a cluster or room on it.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError("Ray is not installed here: pip install 'infir2[ray]'.") from error
    try:
        ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), log_to_driver=True)
    except ConnectionError as error:
        raise ConfigError("no Ray cluster runs here: start one with `ray start --head`, or set RAY_ADDRESS.") from error
    try:
        return _Driver(layout, words, variables).run()
    finally:
        ray.shutdown()


class _Driver:
    def __init__(self, layout: Layout, words: Sequence[str], variables: Sequence[str]) -> None:
        self._layout, self._words = layout, words
        passed = {name: os.environ[name] for name in variables if name in os.environ}
        self._variables = passed | {name: value for name, value in os.environ.items() if name.startswith(_PASSED)}
        self._nodes: list[Any] = []
        self._stopped = False

    def run(self) -> int:
        from ray.util.placement_group import placement_group, remove_placement_group

        groups = [placement_group(bundles, strategy=strategy) for bundles, strategy in placement(self._layout)]
        if self._layout.engines:
            self._variables |= {ENGINES: f"{groups[1].id.hex()}:{self._layout.max_restarts}"}
        previous = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            for attempt in range(self._layout.max_restarts + 1):
                self._await_room(groups)
                code = self._attempt(groups[0], attempt)
                if self._stopped or code not in RESTARTED:
                    break
                left = self._layout.max_restarts - attempt
                print(f"infir2 launch: a worker died; {left} restarts left, from the newest checkpoint", file=sys.stderr, flush=True)
            return code
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            for group in groups:
                remove_placement_group(group)

    def _await_room(self, groups: Sequence[Any]) -> None:
        import ray

        for group, (bundles, _) in zip(groups, placement(self._layout), strict=True):
            if not group.wait(PLACEMENT_SECONDS):
                there = ray.cluster_resources()
                raise ConfigError(
                    f"the Ray cluster has no room for {len(bundles)} bundles of {bundles[0]} after {PLACEMENT_SECONDS:.0f} s "
                    f"(in all it has CPU {there.get('CPU', 0):g}, GPU {there.get('GPU', 0):g}): ask for less, or end other jobs."
                )

    def _attempt(self, group: Any, attempt: int) -> int:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        (room, *_), _ = placement(self._layout)[0]
        self._nodes = [
            ray.remote(Node)
            .options(
                num_cpus=room["CPU"],
                num_gpus=room.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
            )
            .remote()
            for index in range(self._layout.nodes)
        ]
        try:
            addresses = ray.get([node.address.remote() for node in self._nodes])
            endpoint, run_id = f"{addresses[0][0]}:{addresses[0][1]}", f"infir2-{os.getpid()}-{attempt}"
            variables = self._variables | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
            starts = []
            for node, (address, _) in zip(self._nodes, addresses, strict=True):
                layout = replace(self._layout, endpoint=endpoint, run_id=run_id, local_address=address)
                starts.append(node.start.remote(node_command(layout, self._words), variables, os.getcwd()))
            ray.get(starts)
            return self._wait()
        except ray.exceptions.RayActorError:
            return DIED
        finally:
            for node in self._nodes:
                ray.kill(node)  # with it goes, by the kernel, all that it started

    def _wait(self) -> int:
        import ray

        while True:
            codes = ray.get([node.poll.remote() for node in self._nodes])
            ended = [code for code in codes if code is not None]
            if len(ended) == len(codes) or worst_code(ended or [0]) != 0:
                break
            time.sleep(POLL_SECONDS)
        deadline = time.monotonic() + PLACEMENT_SECONDS  # one node has ended badly: the others notice and tell their reason
        while None in codes and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            codes = ray.get([node.poll.remote() for node in self._nodes])
        return worst_code(DIED if code is None else code for code in codes)

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        self._stopped = True
        for node in self._nodes:
            node.stop.remote(number)
