"""The servers of `[rollout]` as one pool: what each kind is, and what it must be to be used."""

import os
import shutil
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from infir2.config.schema import RlRecipe, RolloutSection
from infir2.engines.engine_weights import engine_scale_format
from infir2.engines.http_client import KEY_VARIABLE, is_loopback, require_urls
from infir2.engines.infir2_server import Infir2Client, infir2_command
from infir2.engines.pool import EnginePool
from infir2.engines.pool_member import PoolLimits
from infir2.engines.ray_servers import Bundle, RayServer, ray_bundles
from infir2.engines.remote import EngineHost, ServerInfo, WeightPublisher
from infir2.engines.server_process import (
    OpenClient,
    Place,
    RunningServer,
    ServerCommand,
    ServerProcess,
)
from infir2.engines.server_room import require_room
from infir2.engines.sglang import SglangClient, sglang_command
from infir2.engines.vllm import VllmClient
from infir2.engines.vllm_command import vllm_command
from infir2.engines.weight_directory import WeightDirectory
from infir2.engines.weight_memory import WeightMemory
from infir2.errors import ConfigError
from infir2.files import disk_errors
from infir2.model.safetensors_io import read_json
from infir2.parallel.ranks import Ranks
from infir2.terminal import log

QUEUE_FACTOR = 1.25  # requests at a server per request that it runs, so that no free slot waits
TIMEOUT_FRACTION = 0.8  # of the time after which the other ranks give up
SILENCE_SECONDS = 120.0  # a server that compiles its kernels may be silent for a minute
# What two directories of one model have in common.
_MODEL_KEYS = (
    *("architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings"),
)


@dataclass(frozen=True)
class ServerKind:
    """A server that RL can use.

    Attributes:
        open_client: its client.
        command: how to start it.
    """

    open_client: OpenClient
    command: Callable[[RolloutSection, Place], ServerCommand]


KINDS = {
    "infir2": ServerKind(Infir2Client, infir2_command),
    "sglang": ServerKind(SglangClient, sglang_command),
    "vllm": ServerKind(VllmClient, vllm_command),
}


def open_pool(recipe: RlRecipe, ranks: Ranks, device: torch.device, run_dir: Path) -> EnginePool:
    """Start the servers of a recipe, or connect to them; every rank calls this.

    `device` is the trainer's. They serve after the first `update_weights`. Raises ConfigError for
    what the recipe or a server that runs already has wrong.
    """
    rollout, timeout = recipe.rollout, TIMEOUT_FRACTION * recipe.parallel.timeout_seconds
    limits = PoolLimits(
        max_queued=max(1, round(QUEUE_FACTOR * rollout.max_running_requests)),
        silence_seconds=min(SILENCE_SECONDS, timeout / 2),
        start_seconds=timeout,
    )

    def open_on_rank0() -> tuple[list[EngineHost], WeightPublisher | None]:
        if not ranks.is_rank0:
            return [], None
        _check_scale_format(recipe)
        bundles = [] if rollout.urls else ray_bundles(rollout.engines, rollout.tensor_parallel)
        publisher: WeightPublisher
        if rollout.weight_transfer == "nccl":
            require_own_gpus(rollout, device, bundles)
            publisher = WeightMemory(Path(rollout.model), device)
        else:
            publisher = weight_directory(rollout, run_dir / "weights", bundles)
        return _hosts(recipe, bundles, run_dir / "engines"), publisher

    hosts, publisher = ranks.raise_together(open_on_rank0)
    return EnginePool(hosts, limits, publisher, ranks, rollout.sleep)


def require_own_gpus(
    rollout: RolloutSection, device: torch.device, bundles: Sequence[Bundle] = ()
) -> None:
    """Raise ConfigError if a server would share a GPU with the trainer, which NCCL refuses."""
    if any(bundle.is_shared for bundle in bundles):
        raise ConfigError(
            "rollout.weight_transfer = nccl needs servers on GPUs of their own: start with infir2 "
            "launch ray --engines N, or set rollout.weight_transfer = directory."
        )
    if rollout.urls or bundles or device.type != "cuda":
        return
    needed, ranks = rollout.engines * rollout.tensor_parallel, _num_local_ranks()
    if torch.cuda.device_count() - ranks < needed:
        raise ConfigError(
            f"rollout.weight_transfer = nccl needs {needed} GPUs for the servers beside those of "
            f"the trainer's {ranks}, and here are {torch.cuda.device_count()}: set "
            "rollout.weight_transfer = directory, or use fewer ranks or servers."
        )


def weight_directory(
    rollout: RolloutSection, fallback: Path, bundles: Sequence[Bundle] = ()
) -> WeightDirectory:
    """In shared memory, or in `fallback` if a server runs elsewhere: that may be a shared disk."""
    hosts = [urllib.parse.urlsplit(url).hostname or "" for url in rollout.urls]
    if all(map(is_loopback, hosts)) and all(bundle.is_here for bundle in bundles):
        return WeightDirectory(Path(rollout.model), fallback)
    log(
        f"the servers read the weights from {fallback.resolve()}: on other machines they must see "
        "it under this path",
        "rl",
    )
    with disk_errors(f"{fallback}: cannot hold the published weights"):
        fallback.mkdir(parents=True, exist_ok=True)
    return WeightDirectory(Path(rollout.model), fallback, shared_memory=fallback)


def _hosts(recipe: RlRecipe, bundles: Sequence[Bundle], directory: Path) -> list[EngineHost]:
    rollout, kind = recipe.rollout, KINDS[recipe.rollout.engine]
    key = os.environ.get(KEY_VARIABLE, "")
    if rollout.urls:
        require_urls(rollout.urls)
        check = partial(check_info, recipe=recipe)
        return [
            RunningServer(url, key, kind.open_client, check, rollout.max_restarts)
            for url in rollout.urls
        ]
    if bundles:
        return [
            RayServer(
                f"engine {index + 1}",
                bundle,
                partial(make_server, recipe, index, directory),
                kind.open_client,
                rollout.max_restarts,
            )
            for index, bundle in enumerate(bundles)
        ]
    if rollout.python and not shutil.which(rollout.python):
        raise ConfigError(
            f"rollout.python: {rollout.python} is no program here; name the interpreter of an "
            f"environment with {rollout.engine}, such as {rollout.engine}-env/bin/python."
        )
    count, size = rollout.engines, rollout.tensor_parallel
    require_room(rollout, torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return [
        make_server(recipe, index, directory, "127.0.0.1", ",".join(gpus_of(index, count, size)))
        for index in range(count)
    ]


def make_server(
    recipe: RlRecipe, index: int, directory: Path, host: str, gpus: str
) -> ServerProcess:
    """Server `index` of a recipe, which listens on `host` and sees `gpus` only ("": all)."""
    rollout, kind = recipe.rollout, KINDS[recipe.rollout.engine]

    def command(place: Place) -> ServerCommand:
        made = kind.command(rollout, place)
        visible = {"CUDA_VISIBLE_DEVICES": gpus} if gpus else {}
        return replace(made, variables={**made.variables, **visible})

    return ServerProcess(
        f"engine {index + 1}",
        command,
        kind.open_client,
        partial(check_info, recipe=recipe),
        directory,
        rollout.max_restarts,
        host=host,
    )


def gpus_of(index: int, num_engines: int, size: int) -> list[str]:
    """The GPUs of a server: those that this node's ranks leave free, or else shared with them.

    Raises ConfigError if the node has fewer than `size`.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        return []
    if count < size:
        raise ConfigError(
            f"rollout.tensor_parallel = {size} needs more GPUs than the {count} here."
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    names, ranks = visible.split(","), _num_local_ranks()
    free = names[ranks:] if len(names) - ranks >= num_engines * size else names
    start = index * size % (len(free) - len(free) % size)
    return free[start : start + size]


def _num_local_ranks() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def check_info(name: str, info: ServerInfo, recipe: RlRecipe) -> None:
    """Raise ConfigError for a server of another model, tokenizer, scale format or context."""
    directory, rl = Path(recipe.rollout.model), recipe.rl
    scale_format = engine_scale_format(recipe)
    # Prompts of the run and their responses fit the model: that is checked before.
    positions = int(read_json(directory / "config.json").get("max_position_embeddings") or 0)
    wanted = min(rl.max_prompt_tokens + rl.max_response_tokens, positions)
    if info.max_positions is not None and info.max_positions < wanted:
        raise ConfigError(
            f"{name} ({info.release}) accepts {info.max_positions} tokens, and the run needs "
            f"{wanted} (rl.max_prompt_tokens + rl.max_response_tokens, or the model's positions): "
            "start it with a longer context."
        )
    if info.scale_format is not None and info.scale_format != scale_format:
        raise ConfigError(
            f"{name} has {info.scale_format} scales, and the trainer {scale_format}: start it with "
            f"{directory}."
        )
    if info.tokenizer_sha256 and info.tokenizer_sha256 != _tokenizer_sha256(directory):
        raise ConfigError(f"{name} has another tokenizer than {directory}: start it with that.")
    if info.model.startswith("/") and (Path(info.model) / "config.json").is_file():
        _compare_configs(name, read_json(Path(info.model) / "config.json"), directory)


def _compare_configs(name: str, config: dict[str, Any], directory: Path) -> None:
    ours = read_json(directory / "config.json")
    for key in _MODEL_KEYS:
        if config.get(key) != ours.get(key):
            raise ConfigError(
                f"{name} has another model: its {key} is {config.get(key)}, and that of "
                f"{directory} is {ours.get(key)}; start it with that."
            )
    if _declared_format(config) != _declared_format(ours):
        raise ConfigError(
            f"{name} has {_declared_format(config)} scales, and {directory} has "
            f"{_declared_format(ours)}; start it with that."
        )


def _check_scale_format(recipe: RlRecipe) -> None:
    path = Path(recipe.rollout.model)
    found, wanted = _declared_format(read_json(path / "config.json")), engine_scale_format(recipe)
    if found != wanted:
        raise ConfigError(
            f"rollout.model: {path} has {found} scales, and the trainer {wanted}: export it again "
            "with the same fp8.scale_format, or say that they differ: rollout.precision."
        )


def _declared_format(config: dict[str, Any]) -> str:
    """Scale format of a config.json: "pow2", "fp32", or "none" without FP8."""
    section = config.get("quantization_config")
    if not isinstance(section, dict):
        return "none"
    return "pow2" if section.get("scale_fmt") == "ue8m0" else "fp32"


def _tokenizer_sha256(directory: Path) -> str:
    path = directory / "tokenizer.json"
    return sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
