"""examples/ as a user runs them, and what docs/own-loop.md promises of a converted model."""

import copy
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from infir2 import Fp8Linear, convert_to_fp8
from infir2.convert import export_fp8
from infir2.errors import ConfigError
from infir2.model.hf_names import exported_fp8_weights, quantization_config
from infir2.numerics.quantize import quantize_weight

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def run(*command: str) -> tuple[int, float, float]:
    """(FP8 layers, first and last loss) that an example prints; it must warn of nothing of ours."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, timeout=300
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "FP8 is emulated" not in result.stderr
    last = re.findall(
        r"(\d+) FP8 layers, loss ([\d.]+) -> ([\d.]+), [\d,]+ tokens/s", result.stdout
    )[-1]
    return int(last[0]), float(last[1]), float(last[2])


def tiny(name: str = "Qwen2", **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=256, **options,
    )  # fmt: skip
    return getattr(transformers, f"{name}ForCausalLM")(config)


def assert_loads_into_a_plain_model(file: Path) -> None:
    """The trained masters are FP32, under the names of the model, and load without conversion."""
    state, plain = torch.load(file, weights_only=True), tiny()
    before = copy.deepcopy(plain.state_dict())
    assert state.keys() == before.keys()
    assert {value.dtype for value in state.values()} == {torch.float32}
    plain.load_state_dict(state)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, state[name])
        assert not torch.equal(value, before[name]) or name.endswith("norm.weight"), name


def test_the_plain_loop(tmp_path: Path) -> None:
    layers, first, last = run(
        str(EXAMPLES / "plain_loop.py"), "--steps", "6", "--save", str(tmp_path / "a.pt")
    )
    assert layers == 14
    assert last < first - 1
    assert_loads_into_a_plain_model(tmp_path / "a.pt")


def test_the_plain_loop_without_transformers_models(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("to be or not to be, that is the question. " * 40)
    options = ("--mlp", "--steps", "8", "--accumulate", "2", "--text", str(tmp_path / "mine.txt"))
    layers, first, last = run(str(EXAMPLES / "plain_loop.py"), *options)
    assert layers == 2
    assert last < first - 1


@pytest.mark.skipif(not importlib.util.find_spec("accelerate"), reason="accelerate is missing")
def test_the_trainer_of_hugging_face(tmp_path: Path) -> None:
    layers, first, last = run(
        str(EXAMPLES / "hf_trainer.py"), "--steps", "6", "--save", str(tmp_path / "model")
    )
    assert layers == 14
    assert last < first - 1
    reloaded = type(tiny()).from_pretrained(tmp_path / "model")
    assert {parameter.dtype for parameter in reloaded.parameters()} == {torch.float32}
    master = reloaded.model.layers[0].mlp.up_proj.weight
    assert not torch.equal(master, master.bfloat16().float())


@pytest.mark.skipif(not importlib.util.find_spec("trl"), reason="TRL is missing: pip install trl")
def test_the_sft_trainer_of_trl() -> None:
    layers, first, last = run(str(EXAMPLES / "trl_sft.py"), "--steps", "6")
    assert layers == 14
    assert last < first - 1


@pytest.mark.parametrize("gather", ["bf16", "fp8"])
def test_fsdp2(tmp_path: Path, gather: str) -> None:
    script, file = str(EXAMPLES / "fsdp2.py"), str(tmp_path / "a.pt")
    layers, first, last = run(*TORCHRUN, script, "--steps", "6", "--gather", gather, "--save", file)
    assert layers == 14
    assert last < first - 1
    assert_loads_into_a_plain_model(tmp_path / "a.pt")


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[Any]:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_fsdp2_in_mixed_precision_reads_no_stale_codes(one_rank: Any) -> None:
    """FSDP2 writes gathered BF16 weights to the same memory, without a move of its counter."""
    model = convert_to_fp8(tiny())
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=one_rank, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=True)
    stale: list[bool] = []

    def compare(layer: Any, _: Any) -> None:
        fresh = quantize_weight(layer.weight.detach(), "pow2").codes.view(torch.uint8)
        stale.append(not torch.equal(layer.quantized_weight().codes.view(torch.uint8), fresh))

    for module in model.modules():
        if isinstance(module, Fp8Linear):
            module.register_forward_pre_hook(compare)
    for _ in range(3):
        gradients(model, IDS)
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert stale == [False] * (14 * 6)


def test_a_model_that_is_distributed_already_is_refused(one_rank: Any) -> None:
    sharded = fully_shard(nn.Sequential(nn.Linear(8, 8)), mesh=one_rank)
    with pytest.raises(ConfigError, match="call convert_to_fp8 before fully_shard"):
        convert_to_fp8(sharded)
    replicated = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(8, 8)))
    with pytest.raises(ConfigError, match="call it before DistributedDataParallel"):
        convert_to_fp8(replicated)


IDS = torch.arange(48).view(2, 24) * 5 % 256


def gradients(model: Any, *batches: Tensor, autocast: bool = True) -> list[Tensor]:
    """Of the sum of the losses of batches; FP32, and set to zero afterwards."""
    model.train()
    for ids in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
    found = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    assert {gradient.dtype for gradient in found} == {torch.float32}
    return found


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_keeps_the_bits(reentrant: bool) -> None:
    model = convert_to_fp8(tiny())
    expected = gradients(model, IDS)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert equal(gradients(model, IDS), expected)


def test_accumulated_gradients_are_sums_and_weights_are_quantized_once() -> None:
    model = convert_to_fp8(tiny())
    first, second = gradients(model, IDS[:1]), gradients(model, IDS[1:])
    assert equal(gradients(model, IDS[:1], IDS[1:]), list(map(torch.add, first, second)))
    layers = [module for module in model.modules() if isinstance(module, Fp8Linear)]
    assert {layer.quantizations for layer in layers} == {1}


def test_a_compiled_model_has_the_same_gradients() -> None:
    """A compiler's own arithmetic, and autocast in it, change the bits of a plain model too."""
    torch._dynamo.reset()
    model = convert_to_fp8(tiny())
    expected = gradients(model, IDS, autocast=False)
    compiled = torch.compile(model, backend="eager")
    assert equal(gradients(compiled, IDS, autocast=False), expected)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["Qwen2", "Llama"])
def test_embeddings_and_heads_are_left_alone(name: str, tied: bool) -> None:
    model = tiny(name, tie_word_embeddings=tied)
    names, parameters = list(model.state_dict()), list(model.parameters())
    convert_to_fp8(model)
    assert type(model.lm_head) is nn.Linear
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert sum(isinstance(module, Fp8Linear) for module in model.modules()) == 14
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


COPIES: dict[str, Callable[[Any, Path], Any]] = {
    "deepcopy": lambda model, path: copy.deepcopy(model),
    "safetensors": lambda model, path: saved_and_loaded(model, path),
}


def saved_and_loaded(model: Any, path: Path) -> Any:
    model.save_pretrained(path)
    assert {file.suffix for file in path.iterdir()} <= {".json", ".safetensors"}
    return convert_to_fp8(type(model).from_pretrained(path))


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_computes_the_same_bits(name: str, tmp_path: Path) -> None:
    model = convert_to_fp8(tiny(tie_word_embeddings=True)).eval()
    expected = model(IDS).logits
    twin = COPIES[name](model, tmp_path).eval()
    assert torch.equal(twin(IDS).logits, expected)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
    assert torch.equal(twin(IDS).logits, expected)


def test_an_export_of_a_saved_model_has_the_bytes_of_the_live_one(tmp_path: Path) -> None:
    skipped = ["model.layers.0"]
    model = convert_to_fp8(tiny(), skip_modules=skipped)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "plain")
    export_fp8(tmp_path / "plain", tmp_path / "fp8", skip_modules=skipped)
    stored = load_file(tmp_path / "fp8" / "model.safetensors")
    live = dict(exported_fp8_weights(model))
    assert stored.keys() == live.keys()
    assert sum(value.dtype == torch.float8_e4m3fn for value in live.values()) == 7
    for name, value in live.items():
        assert torch.equal(stored[name].view(torch.uint8), value.view(torch.uint8)), name
    config = json.loads((tmp_path / "fp8" / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"] == quantization_config(model)
