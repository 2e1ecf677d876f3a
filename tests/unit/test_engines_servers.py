"""Which servers a recipe may use: what is refused before the first rollout, and which GPUs."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from infir2.config.schema import RlRecipe, RolloutSection
from infir2.engines.remote import ServerInfo
from infir2.engines.server_room import crowding, require_room, servers_on_a_gpu
from infir2.engines.servers import (
    _hosts,
    check_info,
    gpus_of,
    require_own_gpus,
    weight_directory,
)
from infir2.errors import ConfigError

CONFIG = {
    **{"architectures": ["Qwen2ForCausalLM"], "vocab_size": 320, "hidden_size": 128},
    **{"max_position_embeddings": 4096, "quantization_config": {"scale_fmt": "ue8m0"}},
}


def recipe(directory: Path, **values: Any) -> RlRecipe:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "tokenizer.json").write_text("{}")
    rollout = {"model": str(directory), "engine": "sglang", "python": "p"}
    sections = {"rollout": rollout | values, "schedule": {"learning_rate": 1e-4}}
    return RlRecipe.model_validate(sections | {"rl": {"max_response_tokens": 1000}})


@pytest.mark.parametrize(
    ("info", "problem"),
    [
        (ServerInfo("r", max_positions=2000), "accepts 2000 tokens, and the run needs 3048"),
        (ServerInfo("r", scale_format="fp32"), "has fp32 scales, and the trainer pow2"),
        (ServerInfo("r", tokenizer_sha256="0" * 64), "another tokenizer"),
    ],
)
def test_another_server_than_the_run_needs(tmp_path: Path, info: ServerInfo, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        check_info("the engine at X", info, recipe(tmp_path / "ours"))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"hidden_size": 256}, "its hidden_size is 256, and that of .* is 128"),
        ({"quantization_config": None}, "has none scales, and .* has pow2"),
        ({"quantization_config": {"scale_fmt": "float"}}, "has fp32 scales"),
    ],
)
def test_a_server_of_another_model(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "config.json").write_text(json.dumps(CONFIG | change))
    with pytest.raises(ConfigError, match=problem):
        check_info("engine 1", ServerInfo("r", model=str(theirs)), recipe(tmp_path / "ours"))
    (theirs / "config.json").write_text(json.dumps(CONFIG))
    check_info("engine 1", ServerInfo("r", model=str(theirs)), recipe(tmp_path / "ours"))


@pytest.mark.parametrize(
    ("url", "is_elsewhere"), [("http://127.0.0.1:1", False), ("http://10.0.0.7:1", True)]
)
def test_a_server_on_another_machine_gets_the_weights_in_the_run_directory(
    tmp_path: Path, url: str, is_elsewhere: bool
) -> None:
    """Shared memory is this machine's; run.dir may be on a disk that both see."""
    ours, run = tmp_path / "ours", tmp_path / "run"
    rollout = recipe(ours, urls=(url,), python="").rollout
    save_file({"w": torch.ones(1)}, ours / "model.safetensors")
    weights = weight_directory(rollout, run / "weights")
    published = weights.publish([("w", torch.ones(1))], 1)
    assert published.directory.is_relative_to(run / "weights") == is_elsewhere
    weights.close()


def test_gpus_are_those_that_the_ranks_leave_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert [gpus_of(i, 2, 1) for i in range(2)] == [["6"], ["7"]]
    assert gpus_of(0, 1, 2) == ["6", "7"]
    assert [gpus_of(i, 4, 1) for i in range(4)] == [["4"], ["5"], ["6"], ["7"]]
    assert [gpus_of(i, 2, 2) for i in range(2)] == [["4", "5"], ["6", "7"]]
    with pytest.raises(ConfigError, match="needs more GPUs than the 4"):
        gpus_of(0, 1, 8)


def test_servers_do_not_crowd_the_first_node() -> None:
    """The servers of four nodes, started without Ray, would share the GPUs of one."""
    rollout = RolloutSection(engine="sglang", engines=8, tensor_parallel=4, memory_fraction=0.5)
    with pytest.raises(ConfigError, match=r"put 4 servers .*rollout.engines = 2, or .*launch ray"):
        require_room(rollout, 8)
    require_room(rollout, 0)
    with pytest.raises(ConfigError, match="needs more GPUs than the 8 of a node"):
        require_room(rollout.model_copy(update={"engines": 1, "tensor_parallel": 16}), 8)
    require_room(rollout.model_copy(update={"engines": 4}), 8)
    with pytest.raises(ConfigError, match="put 2 servers"):
        require_room(rollout.model_copy(update={"engines": 4, "memory_fraction": 0.0}), 8)
    require_room(rollout.model_copy(update={"engines": 2, "memory_fraction": 0.0}), 8)


def test_servers_that_leave_gpus_over_share_the_others() -> None:
    """Two servers of three GPUs fill eight: the fifth is the third on the first's GPUs."""
    rollout = RolloutSection(engine="vllm", engines=5, tensor_parallel=3, memory_fraction=0.5)
    assert servers_on_a_gpu(rollout, 8) == 3
    assert "put 3 servers" in crowding(rollout, 8)
    assert servers_on_a_gpu(rollout, 8, nodes=3) == 1
    assert not crowding(rollout, 8, nodes=3)
    assert "set rollout.engines = 4" in crowding(rollout.model_copy(update={"engines": 9}), 8, 2)


def test_nccl_needs_gpus_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    rollout = RolloutSection(engine="sglang", weight_transfer="nccl", engines=2)
    require_own_gpus(rollout, torch.device("cuda"))
    require_own_gpus(rollout.model_copy(update={"engines": 9}), torch.device("cpu"))
    with pytest.raises(ConfigError, match="needs 4 GPUs for the servers beside those of the train"):
        require_own_gpus(rollout.model_copy(update={"tensor_parallel": 2}), torch.device("cuda"))


def test_an_interpreter_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rollout.python: /no/python is no program here"):
        _hosts(recipe(tmp_path / "ours", python="/no/python"), [], tmp_path)
    assert len(_hosts(recipe(tmp_path / "ours", python=sys.executable), [], tmp_path)) == 1
