"""Servers that Ray places: each in a bundle of a placement group, started by an actor there.

Apart, in the bundles of `infir2 launch ray --engines N`, with GPUs of their own; or, with several
nodes, beside the ranks in theirs, on the same GPUs. An actor owns a `ServerProcess`; when the actor
is killed or its machine dies, its guard ends the server. Rank 0 speaks HTTP with the servers: on
another machine they listen on the address that Ray knows of it, behind a key of their own.
"""

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from infir2.engines.remote import EngineClient, EngineError
from infir2.engines.server_process import OpenClient, ServerProcess
from infir2.errors import ConfigError, UserError, first_line
from infir2.launch.ray import (
    ENGINES_VARIABLE,
    NODES_VARIABLE,
    connect,
    placement_group_of,
    start_actor,
)

MakeServer = Callable[[str, str], ServerProcess]  # from the address to listen on and its GPUs


@dataclass(frozen=True)
class Bundle:
    """Where a server is started.

    Attributes:
        group: the placement group.
        index: of the bundle.
        is_shared: whether the ranks have its resources, so that an actor takes none.
        gpus: CUDA_VISIBLE_DEVICES of the server; "" for what Ray gives the actor.
        is_here: whether it is on this machine.
    """

    group: Any
    index: int
    is_shared: bool
    gpus: str
    is_here: bool


class ServerActor:
    """Actor: a server on its node."""

    def __init__(self, make: MakeServer, rank0_address: str, gpus: str, directory: str) -> None:
        import ray

        if os.path.isdir(directory):
            os.chdir(directory)  # the recipe's paths are relative to it
        if gpus:  # Ray hides them from an actor that has none of its own
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus
        own = str(ray.util.get_node_ip_address())
        self._server = make("127.0.0.1" if own == rank0_address else own, gpus)

    def start(self) -> tuple[str, str]:
        """Start it. Returns its URL and key once it generates. Raises as `ServerProcess.start`."""

        async def run() -> None:
            await (await self._server.start()).close()

        asyncio.run(run())
        assert self._server.place is not None
        return self._server.place.url, self._server.place.api_key


class RayServer:
    """An `EngineHost`: a server that an actor starts."""

    def __init__(
        self,
        name: str,
        bundle: Bundle,
        make: MakeServer,
        open_client: OpenClient,
        max_restarts: int,
    ) -> None:
        self.name, self.max_restarts = name, max_restarts
        self._bundle, self._make, self._open_client = bundle, make, open_client
        self._actor: Any = None
        self._was_ready = False

    async def start(self) -> EngineClient:
        """As `EngineHost`."""
        import ray

        self.kill()
        self._actor = self._start_actor()
        try:
            url, api_key = await self._actor.start.remote()
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError) and not self._was_ready:
                raise error.cause from error
            raise EngineError("start", f"{self.name}: {first_line(error.cause)}") from error
        except ray.exceptions.RayError as error:
            raise EngineError("start", f"{self.name}: {first_line(error)}") from error
        self._was_ready = True
        return self._open_client(url, api_key)

    def kill(self) -> None:
        """As `EngineHost`: the guard of the server ends with the actor."""
        import ray

        actor, self._actor = self._actor, None
        if actor is not None:
            ray.kill(actor)

    def _start_actor(self) -> Any:
        import ray

        group, index = self._bundle.group, self._bundle.index
        resources = {} if self._bundle.is_shared else group.bundle_specs[index]
        return start_actor(
            group,
            index,
            ServerActor,
            self._make,
            str(ray.util.get_node_ip_address()),
            self._bundle.gpus,
            os.getcwd(),
            num_cpus=resources.get("CPU", 0),
            num_gpus=resources.get("GPU", 0),
        )


def ray_bundles(num_engines: int, size: int) -> list[Bundle]:
    """Where Ray places the servers; [] without Ray, or if they are started beside rank 0.

    `num_engines` and `size` (GPUs of each) are the recipe's. Call it in the main thread. Raises
    ConfigError if they are not those of the launcher.
    """
    engines, nodes = os.environ.get(ENGINES_VARIABLE, ""), os.environ.get(NODES_VARIABLE, "")
    if not engines and not nodes:
        return []
    connect(os.environ["RAY_ADDRESS"])
    group_id, _, rest = (engines or nodes).partition(":")
    group = placement_group_of(group_id)
    here = _bundles_here(group)
    if engines:
        count = len(group.bundle_specs)
        check_size(count, group.bundle_specs[0].get("GPU", size), num_engines, size)
        return [Bundle(group, index, False, "", here[index]) for index in range(count)]
    gpus = rest.split(";")
    placed = (divmod(number, len(gpus)) for number in range(num_engines))
    return [
        Bundle(group, index, True, _slice(gpus[index], nth, size), here[index])
        for nth, index in placed
    ]


def check_size(count: int, gpus: float, num_engines: int, size: int) -> None:
    """Raise ConfigError unless `count` bundles of `gpus` are what the recipe's servers need:
    `num_engines` of `size` GPUs."""
    if num_engines not in (1, count):
        raise ConfigError(
            f"rollout.engines = {num_engines}, and infir2 launch ray has --engines {count}; remove "
            "rollout.engines."
        )
    if gpus != size:
        raise ConfigError(
            f"rollout.tensor_parallel = {size}, and infir2 launch ray has --gpus-per-engine "
            f"{gpus:g}; make them equal."
        )


def _slice(gpus: str, nth: int, size: int) -> str:
    """GPUs of the server number `nth` of a node; servers share them if there are too few."""
    names = gpus.split(",")
    start = nth * size % max(1, len(names) - len(names) % size)
    return ",".join(names[start : start + size])


def _bundles_here(group: Any) -> list[bool]:
    """Of each bundle, whether it is on this machine."""
    import ray
    from ray.util.placement_group import placement_group_table

    nodes = placement_group_table(group)["bundles_to_node_id"]
    own = ray.get_runtime_context().get_node_id()
    return [nodes[index] == own for index in sorted(nodes)]
