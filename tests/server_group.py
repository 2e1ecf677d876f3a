"""The server's side of a broadcast of weights, as SGLang's `model_runner.py` does it."""

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d


def join(body: dict[str, Any], tp_rank: int = 0) -> Any:
    """The process group that `/init_weights_update_group` asks for."""
    url = f"tcp://{body['master_address']}:{body['master_port']}"
    rank, size = body["rank_offset"] + tp_rank, body["world_size"]
    store, rank, size = next(c10d.rendezvous(url, rank, size))
    prefix = c10d.PrefixStore(body["group_name"], store)
    group, _ = c10d._new_process_group_helper(
        size,
        rank,
        [],
        c10d.Backend(body["backend"]),
        prefix,
        group_name=body["group_name"],
        timeout=c10d.default_pg_timeout,
    )
    c10d._world.pg_group_ranks[group] = {i: i for i in range(size)}
    return group


def receive(group: Any, body: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of `/update_weights_from_distributed`, by name."""
    assert body["load_format"] == "flattened_bucket"
    parts = [
        torch.empty(shape, dtype=getattr(torch, dtype))
        for shape, dtype in zip(body["shapes"], body["dtypes"], strict=True)
    ]
    flat = torch.cat([part.flatten().view(torch.uint8) for part in parts])
    dist.broadcast(flat, src=0, group=group)
    tensors, start = {}, 0
    for name, part in zip(body["names"], parts, strict=True):
        end = start + part.numel() * part.element_size()
        tensors[name] = flat[start:end].view(part.dtype).reshape(part.shape)
        start = end
    return tensors


class ServerGroup:
    """Answers the routes of a broadcast.

    Attributes:
        held: the tensors that have arrived, by name.
        dies_at: the number of the bucket at which it leaves instead of receiving; -1 for none.
    """

    def __init__(self) -> None:
        self.held: dict[str, torch.Tensor] = {}
        self.dies_at, self.num_received = -1, 0
        self.session: bool | None = None  # None: a release without sessions
        self._groups: dict[str, Any] = {}

    def call(self, route: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """The answer; None for another route. Raises ConnectionError where it dies."""
        if route == "/init_weights_update_group":
            self._groups[body["group_name"]] = join(body)
        elif route == "/destroy_weights_update_group":
            dist.destroy_process_group(self._groups.pop(body["group_name"]))
        elif route == "/update_weights_from_distributed":
            return self._receive(body)
        elif route in ("/begin_weight_update", "/end_weight_update") and self.session is not None:
            self.session = route == "/begin_weight_update"
        else:
            return None
        return {"success": True, "message": ""}

    def leave(self) -> None:
        """As a process that ends."""
        while self._groups:
            dist.destroy_process_group(self._groups.popitem()[1])

    def _receive(self, body: dict[str, Any]) -> dict[str, Any]:
        if self.session is False:
            return {"success": False, "message": "must run between begin_weight_update() and ..."}
        if self.num_received == self.dies_at:
            self.leave()
            raise ConnectionError("scripted: it dies within a transfer")
        self.held |= receive(self._groups[body["group_name"]], body)
        self.num_received += 1
        return {"success": True, "message": ""}
