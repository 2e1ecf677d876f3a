"""The native engine on a GPU: paged attention, sampling on the device, decode graphs."""

from collections.abc import Iterable

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (pip install 'infir2[gpu]')")

from infir2.config.schema import ShapeSection
from infir2.engines.generate import generate, generate_all
from infir2.engines.graph_runner import GraphRunner
from infir2.engines.kv_cache import KvCache, NewTokens, pack, page_bytes, plan_cached
from infir2.engines.native import NativeEngine
from infir2.engines.paged_attention_cuda import plan_paged
from infir2.engines.sampling import sample, sample_on_device
from infir2.engines.scheduler import Scheduler
from infir2.engines.types import Completion, Request, SamplingParams
from infir2.model import Decoder
from infir2.model.hf_names import exported_fp8_weights
from infir2.numerics import convert_to_fp8, token_logprobs
from infir2.numerics.gemm_scaled import missing_block_scaling
from infir2.numerics.kernels import api as kernels
from infir2.numerics.kernels import usable

hopper = (
    torch.cuda.is_available()
    and usable(torch.device("cuda"))
    and missing_block_scaling(torch.device("cuda")) is None
)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not hopper, reason="block-scaled FP8 GEMMs need a Hopper GPU"),
]
VOCAB = 512
SHAPE = {
    "hidden_size": 512, "num_layers": 3, "num_heads": 8, "num_kv_heads": 2, "head_dim": 64,
    "ffn_size": 1536,
}  # fmt: skip


def make_model(seed: int = 1) -> Decoder:
    return convert_to_fp8(Decoder.from_shape(ShapeSection(**SHAPE), VOCAB, seed, device="cuda"))


@pytest.fixture(scope="module")
def model() -> Decoder:
    return make_model()


def request(number: int, params: SamplingParams, length: int) -> Request:
    prompt = np.random.default_rng(number).integers(0, VOCAB, length).tolist()
    return Request(f"r{number}", prompt, params, key=1000 + number)


@torch.no_grad()
def packed_logprobs(model: Decoder, asked: Request, completion: Completion) -> np.ndarray:
    stream = torch.tensor([*asked.token_ids, *completion.token_ids], device="cuda")
    count, first = len(stream) - 1, len(asked.token_ids)
    hidden = model.hidden_states(
        stream[:-1], torch.arange(count, device="cuda"), torch.tensor([0, count])
    )
    temperature = asked.params.temperature or 1.0
    values, _ = token_logprobs(
        hidden[first - 1 :], model.head_weight, stream[first:], temperature=temperature
    )
    return values.cpu().numpy()


def assert_close_to_packed(
    model: Decoder, requests: Iterable[Request], found: dict[str, Completion]
) -> None:
    """The tokens are the model's: log-probabilities as a packed pass of the same model has them."""
    for each in requests:
        completion = found[each.id]
        difference = completion.rollout_logprobs - packed_logprobs(model, each, completion)
        assert np.abs(difference).mean() < 0.03, each.id
        assert np.abs(difference).max() < 0.5, each.id


SEQUENCES = {
    "prefill": [
        NewTokens([1] * 300, 0, [7, 2, 10]),
        NewTokens([1] * 128, 0, [4]),
        NewTokens([1] * 5, 0, [9]),
        NewTokens([1], 0, [0]),
    ],
    "behind a prefix": [
        NewTokens([1] * 200, 0, [7, 2]),
        NewTokens([1], 300, [4, 9, 0]),
        NewTokens([1] * 30, 127, [11, 5]),
    ],
    "decode": [
        NewTokens([1], 300, [4, 9, 0]),
        NewTokens([1], 0, [11]),
        NewTokens([1], 127, [5]),
        NewTokens([1], 128, [7, 2]),
    ],
}


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize(("heads", "head_dim"), [(8, 64), (12, 128), (14, 128)])
def test_paged_attention_equals_the_reference(name: str, heads: int, head_dim: int) -> None:
    """With q, k and v as parts of one tensor, as the model's are."""
    shape = ShapeSection(**{**SHAPE, "num_heads": heads, "head_dim": head_dim, "num_layers": 1})
    config = Decoder.from_shape(shape, VOCAB, 1).config
    cache = KvCache(config, num_pages=12, page_size=128, device="cuda")
    for tensor in (*cache.keys, *cache.values):
        tensor.normal_()
        tensor[3].fill_(float("nan"))  # a page of another sequence
    sequences = SEQUENCES[name]
    stream = pack(sequences, 128)
    fused = torch.randn(len(stream.rows), heads + 4, head_dim, device="cuda").bfloat16()
    q, k, v = fused.split([heads, 2, 2], dim=1)
    found = plan_paged(cache, sequences, stream).attend(q, k, v, 0)
    expected = plan_cached(cache, sequences, stream).attend(q, k, v, 0)
    torch.testing.assert_close(found.float(), expected.float(), atol=2e-2, rtol=2e-2)


def test_sampling_on_the_device_draws_the_same_tokens() -> None:
    generator = torch.Generator("cuda").manual_seed(3)
    logits = 3 * torch.randn(4000, 1000, device="cuda", generator=generator)
    rng = np.random.default_rng(0)
    temperatures = rng.choice([0.0, 0.6, 1.0, 1.3], 4000)
    top_ps = rng.choice([0.3, 0.9, 1.0], 4000)
    draws = rng.random(4000)
    expected, expected_logprobs = sample(logits, temperatures, top_ps, draws)
    inverse = np.divide(1, temperatures, out=np.zeros(4000), where=temperatures > 0)
    options = [torch.from_numpy(x).float().cuda() for x in (inverse, top_ps, draws)]
    found, logprobs = sample_on_device(logits.clone(), *options, truncate=True)
    same = found == expected
    assert same.float().mean() > 0.999, "FP32 moves a draw across a token's edge once in a while"
    torch.testing.assert_close(logprobs[same], expected_logprobs[same], atol=1e-5, rtol=1e-5)
    plain, again = sample_on_device(logits, *options, truncate=False)
    for temperature in (0.6, 1.0, 1.3):  # the trainer's bits
        rows = torch.from_numpy(temperatures == temperature).cuda()
        trainer, _, _ = kernels.label_logprobs(logits[rows], plain[rows], temperature, False)
        assert torch.equal(again[rows], trainer)
    options[2].fill_(1.0)  # a draw that rounds up to 1
    last, _ = sample_on_device(logits.clone(), *options, truncate=True)
    assert (last < 1000).all()


MIXED = [
    request(0, SamplingParams(0.0, 40, stop_ids=()), 300),
    request(1, SamplingParams(1.0, 200, stop_ids=(3, 50)), 5),
    request(2, SamplingParams(0.6, 4, stop_ids=(), top_p=0.9), 129),
    request(3, SamplingParams(1.3, 1, stop_ids=()), 128),
    request(4, SamplingParams(1.0, 300, stop_ids=tuple(range(0, VOCAB, 64)), top_p=0.5), 17),
    request(5, SamplingParams(0.0, 150, stop_ids=()), 1),
]


@pytest.mark.parametrize("max_running", [1, 3, 6])
def test_requests_with_their_own_parameters(model: Decoder, max_running: int) -> None:
    engine = NativeEngine(model, max_running)
    found = {completion.id: completion for completion in generate(engine, MIXED)}
    assert_close_to_packed(model, MIXED, found)
    for each in MIXED:
        ids = found[each.id].token_ids
        stopped = ids[-1] in each.params.stop_ids
        assert found[each.id].finish == ("stop" if stopped else "length")
        assert stopped or len(ids) == each.params.max_tokens
        assert not set(ids[:-1]) & set(each.params.stop_ids)
    again = {completion.id: completion for completion in generate(engine, MIXED)}
    assert all(again[each.id].token_ids == found[each.id].token_ids for each in MIXED)


def test_requests_join_are_preempted_and_share_pages(
    model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    preempted, real = [], Scheduler._preempt

    def preempt(self, sequence):  # type: ignore[no-untyped-def]
        preempted.append(sequence.request.id)
        real(self, sequence)

    monkeypatch.setattr(Scheduler, "_preempt", preempt)
    params = SamplingParams(1.0, 200, stop_ids=())
    requests = [request(i, params, 100 + 30 * i) for i in range(6)]
    requests += [Request(f"s{i}", [*requests[5].token_ids, i], params, key=i) for i in range(3)]
    page = page_bytes(model.config, GraphRunner.page_size, model.compute_dtype)
    engine = NativeEngine(model, 9, cache_gib=10.5 * page / 2**30)
    found = {}
    for each in requests:
        engine.submit(each)
        for _ in range(2):
            found |= {completion.id: completion for completion in engine.step()}
    engine.cancel(["r2"])
    while engine.num_unfinished:
        found |= {completion.id: completion for completion in engine.step()}
    assert found.keys() == {each.id for each in requests if each.id != "r2"}
    assert preempted
    assert_close_to_packed(model, [each for each in requests if each.id in found], found)


def test_new_weights_replace_the_graphs() -> None:
    first, second = make_model(1), make_model(2)
    weights = [(name, tensor.clone()) for name, tensor in exported_fp8_weights(second)]
    engine = NativeEngine(first, 4, cache_gib=0.1, keep_cache=True)
    greedy = [request(i, SamplingParams(0.0, 20, stop_ids=()), 40) for i in range(4)]
    before = generate_all(engine, greedy)
    engine.update_weights(weights, 1)
    after = {completion.id: completion for completion in generate_all(engine, greedy)}
    assert before[0].token_ids != after["r0"].token_ids
    assert_close_to_packed(second, greedy, after)
    assert {completion.policy_version for completion in after.values()} == {1}
