"""Continuous batching: requests join and leave at any time, and a response depends on its request
only."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from infir2.config.schema import ShapeSection
from infir2.engines.generate import generate, generate_all, generate_groups, group_requests
from infir2.engines.graph_runner import unpack_sampled
from infir2.engines.kv_cache import page_bytes
from infir2.engines.native import NativeEngine
from infir2.engines.runner import ReferenceRunner
from infir2.engines.scheduler import Scheduler
from infir2.engines.types import (
    CacheTooSmallError,
    Completion,
    Engine,
    OffersDigest,
    Request,
    SamplingParams,
)
from infir2.errors import ConfigError
from infir2.model import Decoder
from infir2.model.hf_names import exported_fp8_weights
from infir2.numerics import convert_to_fp8, token_logprobs

VOCAB = 101
PARAMS = SamplingParams(temperature=1.0, max_tokens=12, stop_ids=(7,))


def make_model() -> Decoder:
    shape = ShapeSection(
        hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, ffn_size=136, head_dim=16
    )
    return convert_to_fp8(Decoder.from_shape(shape, VOCAB, seed=3))


@pytest.fixture(scope="module")
def model() -> Decoder:
    return make_model()


@pytest.fixture(params=[0, 1], ids=["waits", "one step ahead"])
def passes_ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also as on a GPU, where a step starts before the tokens of the one before are read."""
    monkeypatch.setattr(ReferenceRunner, "passes_ahead", request.param)


def request(number: int, params: SamplingParams = PARAMS, length: int = 0) -> Request:
    rng = np.random.default_rng(number)
    prompt = rng.integers(0, VOCAB, length or int(rng.integers(1, 40))).tolist()
    return Request(f"r{number}", prompt, params, key=1000 + number)


def alone(model: Decoder, requests: Iterable[Request]) -> dict[str, Completion]:
    """The completion of each request in an engine that has no other."""
    return {each.id: generate_all(NativeEngine(model, 1), [each])[0] for each in requests}


def run_to_end(engine: Engine) -> dict[str, Completion]:
    completions = {}
    while engine.num_unfinished:
        completions |= {completion.id: completion for completion in engine.step()}
    return completions


def assert_same(found: dict[str, Completion], expected: dict[str, Completion]) -> None:
    """Token ids and log-probabilities, to the last bit."""
    assert found.keys() == expected.keys()
    for name, completion in expected.items():
        assert found[name].token_ids == completion.token_ids, name
        assert found[name].finish == completion.finish, name
        assert np.array_equal(found[name].rollout_logprobs, completion.rollout_logprobs), name


MIXED = [
    request(0, SamplingParams(0.0, 9, stop_ids=())),
    request(1, SamplingParams(1.0, 30, stop_ids=(3, 50))),
    request(2, SamplingParams(0.6, 4, stop_ids=(), top_p=0.9)),
    request(3, SamplingParams(1.3, 1, stop_ids=())),
    request(4, SamplingParams(1.0, 17, stop_ids=tuple(range(0, VOCAB, 4)), top_p=0.5)),
    request(5, SamplingParams(0.0, 25, stop_ids=())),
]


@pytest.mark.usefixtures("passes_ahead")
@pytest.mark.parametrize("max_running", [1, 2, 4, 6])
def test_each_request_has_its_own_parameters(model: Decoder, max_running: int) -> None:
    engine = NativeEngine(model, max_running)
    found = {completion.id: completion for completion in generate(engine, MIXED)}
    assert_same(found, alone(model, MIXED))
    for each in MIXED:
        ids = found[each.id].token_ids
        stopped = ids[-1] in each.params.stop_ids
        assert found[each.id].finish == ("stop" if stopped else "length")
        assert stopped or len(ids) == each.params.max_tokens
        assert not set(ids[:-1]) & set(each.params.stop_ids)


def test_log_probabilities_are_those_of_a_packed_forward(model: Decoder) -> None:
    each = request(9, SamplingParams(1.0, 20, stop_ids=()))
    engine = NativeEngine(model, 4)
    completion = next(c for c in generate_all(engine, [each, *MIXED]) if c.id == each.id)
    stream = torch.tensor([*each.token_ids, *completion.token_ids])
    with torch.no_grad():
        hidden = model.hidden_states(
            stream[:-1], torch.arange(len(stream) - 1), torch.tensor([0, len(stream) - 1])
        )
        first = len(each.token_ids)
        expected, _ = token_logprobs(hidden[first - 1 :], model.head_weight, stream[first:])
    assert np.array_equal(completion.rollout_logprobs, expected.numpy())


def letters(token_ids: Sequence[int]) -> str:
    return "".join(chr(ord("a") + token_id % 4) for token_id in token_ids)


@pytest.mark.usefixtures("passes_ahead")
@pytest.mark.parametrize("max_running", [1, 5])
def test_a_response_ends_with_the_token_that_completes_a_stop_text(
    model: Decoder, max_running: int
) -> None:
    stops = [("bd",), ("aaaaaaaa", "cab"), ("d",), ("zz",), ("ab", "abc")]
    plain = [request(i, SamplingParams(1.0, 40, stop_ids=(3,))) for i in range(len(stops))]
    expected = alone(model, plain)
    requests = [
        replace(each, params=replace(each.params, stop_texts=stop))
        for each, stop in zip(plain, stops, strict=True)
    ]
    engine = NativeEngine(model, max_running, decode=letters)
    num_stopped = 0
    for completion in generate_all(engine, requests):
        whole, texts = expected[completion.id], stops[int(completion.id[1:])]
        ends = [
            n + 1
            for n in range(len(whole.token_ids))
            if any(letters(whole.token_ids[: n + 1]).endswith(text) for text in texts)
        ]
        length = min(ends, default=len(whole.token_ids))
        assert completion.token_ids == whole.token_ids[:length]
        assert np.array_equal(completion.rollout_logprobs, whole.rollout_logprobs[:length])
        assert completion.finish == ("stop" if ends else whole.finish)
        num_stopped += bool(ends)
    assert 0 < num_stopped < len(stops)


def test_stop_texts_need_a_tokenizer(model: Decoder) -> None:
    each = request(0, SamplingParams(1.0, 4, stop_ids=(), stop_texts=("a",)))
    with pytest.raises(ValueError, match="without tokenizer"):
        NativeEngine(model, 1).submit(each)
    empty = replace(each, params=replace(each.params, stop_texts=("a", "")))
    with pytest.raises(ValueError, match="stop text is empty"):
        NativeEngine(model, 1, decode=letters).submit(empty)


@pytest.mark.usefixtures("passes_ahead")
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_most_likely_tokens(model: Decoder, temperature: float) -> None:
    """Beside each token, whatever the others of the batch ask for; no token changes by it."""
    params = SamplingParams(temperature, 9, stop_ids=(), top_logprobs=5)
    asking = [request(20, params), request(21, replace(params, top_logprobs=20))]
    plain = [replace(each, params=replace(each.params, top_logprobs=0)) for each in asking]
    expected = alone(model, [*plain, *MIXED])
    found = {c.id: c for c in generate(NativeEngine(model, 4), [*asking, *MIXED])}
    assert_same(found, expected)
    assert all(found[each.id].top_logprobs == [] for each in MIXED)
    for each in asking:
        completion = found[each.id]
        stream = torch.tensor([*each.token_ids, *completion.token_ids])
        logits = model(stream, torch.arange(len(stream)), torch.tensor([0, len(stream)]))
        logprobs = (logits.double() / (temperature or 1.0)).log_softmax(-1)
        rows = logprobs[len(each.token_ids) - 1 : -1]
        assert len(completion.top_logprobs) == len(completion.token_ids)
        for row, top in zip(rows, completion.top_logprobs, strict=True):
            values, token_ids = row.topk(each.params.top_logprobs)
            assert top == list(zip(token_ids.tolist(), values.float().tolist(), strict=True))


def test_the_most_likely_tokens_of_a_gpu_are_unpacked() -> None:
    top_ids = torch.tensor([[4, 9, 1], [2, 8, 7]])  # of two sequences
    values = torch.tensor([[-0.5, -1.0, -2.0], [-0.25, -3.0, -4.0]])
    sampled = torch.stack([torch.tensor([9, 2]), values[:, 1].view(torch.int32)]).int()
    packed = torch.cat([sampled, top_ids.int().T, values.view(torch.int32).T])
    assert unpack_sampled(sampled) == ([9, 2], [-1.0, -3.0], [[], []])
    assert unpack_sampled(packed) == (
        [9, 2],
        [-1.0, -3.0],
        [[(4, -0.5), (9, -1.0), (1, -2.0)], [(2, -0.25), (8, -3.0), (7, -4.0)]],
    )


@pytest.mark.usefixtures("passes_ahead")
def test_responses_are_seen_while_they_grow(model: Decoder) -> None:
    params = SamplingParams(1.0, 12, stop_ids=(), top_logprobs=2)
    requests = [replace(request(i, params), streams=i < 3) for i in range(4)]
    engine, seen = NativeEngine(model, 2), {each.id: list[int]() for each in requests}
    for each in requests:
        engine.submit(each)
    num_early, completions = 0, dict[str, Completion]()
    while engine.num_unfinished:
        completions |= {completion.id: completion for completion in engine.step()}
        new = engine.new_tokens()
        assert not new.keys() & completions.keys()
        for name, tokens in new.items():
            assert len(tokens.logprobs) == len(tokens.top_logprobs) == len(tokens.token_ids)
            num_early += len(tokens.token_ids)
            seen[name] += tokens.token_ids
    assert num_early >= 3 * 10
    assert not seen[requests[3].id]
    for name, completion in completions.items():
        assert seen[name] == completion.token_ids[: len(seen[name])]


@pytest.mark.usefixtures("passes_ahead")
@pytest.mark.parametrize("max_running", [1, 3, 8])
def test_late_requests_join_the_running_ones(model: Decoder, max_running: int) -> None:
    """Also one that is longer than any before it, for which the cache has to grow in use."""
    params = SamplingParams(1.0, 24, stop_ids=())
    requests = [request(i, params, length=3 + 2 * i) for i in range(5)]
    requests.append(request(5, SamplingParams(1.0, 40, stop_ids=()), length=300))
    engine = NativeEngine(model, max_running)
    completions: dict[str, Completion] = {}
    for each in requests:
        engine.submit(each)
        for _ in range(3):
            completions |= {completion.id: completion for completion in engine.step()}
    if max_running == 8:
        assert engine.num_unfinished == len(requests), "all of them run side by side"
    completions |= run_to_end(engine)
    assert_same(completions, alone(model, requests))


def test_requests_are_admitted_first_come_first_served(model: Decoder) -> None:
    engine = NativeEngine(model, 1)
    requests = [request(i, SamplingParams(1.0, 2, stop_ids=())) for i in range(4)]
    for each in requests:
        engine.submit(each)
    assert list(run_to_end(engine)) == [each.id for each in requests]


def test_prefill_is_split(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """No pass computes more prompt tokens than the bound; a long prompt is computed in chunks."""
    passes = record_prefill(monkeypatch, tokens=40)
    params = SamplingParams(1.0, 1, stop_ids=())
    requests = [request(i, params, length) for i, length in enumerate((50, 20, 20, 20, 130))]
    found = {c.id: c for c in generate_all(NativeEngine(model, 8), requests)}
    assert passes == [[40], [40], [40], [10, 30], [20, 20], [20, 20]]
    assert_same(found, alone(model, requests))


def record_prefill(monkeypatch: pytest.MonkeyPatch, tokens: int = 4096) -> list[list[int]]:
    """The number of new tokens of each sequence, for each prefill pass from now on."""
    passes = list[list[int]]()
    real = ReferenceRunner.prefill

    def record(self, cache, new, sampled, how):  # type: ignore[no-untyped-def]
        if any(len(each.token_ids) > 1 for each in new):
            passes.append([len(each.token_ids) for each in new])
        return real(self, cache, new, sampled, how)

    monkeypatch.setattr(ReferenceRunner, "prefill_tokens", tokens)
    monkeypatch.setattr(ReferenceRunner, "prefill", record)
    return passes


def cache_gib(model: Decoder, pages: int) -> float:
    page = page_bytes(model.config, ReferenceRunner.page_size, model.compute_dtype)
    return (pages + 0.5) * page / 2**30


@pytest.mark.usefixtures("passes_ahead")
@pytest.mark.parametrize("pages", [8, 9, 13])
def test_preempted_requests_go_on_with_the_same_tokens(model: Decoder, pages: int) -> None:
    """Memory for two or three sequences, six that run: they preempt one another all the time."""
    params = SamplingParams(1.0, 60, stop_ids=())
    requests = [request(i, params, length=5 + 10 * i) for i in range(6)]
    preempted, real = [], Scheduler._preempt

    def preempt(self, sequence):  # type: ignore[no-untyped-def]
        preempted.append(sequence.request.id)
        real(self, sequence)

    engine = NativeEngine(model, 6, cache_gib(model, pages))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scheduler, "_preempt", preempt)
        found = {completion.id: completion for completion in generate(engine, requests)}
    assert_same(found, alone(model, requests))
    assert preempted


def test_samples_of_a_prompt_share_its_pages(
    model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of the four full pages of 50 tokens stay when one token must be left over: 2 remain."""
    passes = record_prefill(monkeypatch)
    prompt = request(0, length=50).token_ids
    requests = [Request(f"s{i}", prompt, PARAMS, key=i) for i in range(4)]
    later = Request("later", [*prompt[:40], 1, 2, 3], PARAMS, key=9)
    engine = NativeEngine(model, 8)
    for each in requests:
        engine.submit(each)
    engine.step()
    engine.submit(later)
    found = run_to_end(engine)
    assert passes == [[50, 2, 2, 2], [11]]
    monkeypatch.undo()
    assert_same(found, alone(model, [*requests, later]))


def test_a_kept_cache_serves_the_next_turn_until_the_weights_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model()
    passes = record_prefill(monkeypatch)
    engine = NativeEngine(model, 2, cache_gib(model, 20), keep_cache=True)
    turn = request(0, SamplingParams(1.0, 20, stop_ids=()), length=30)
    answer = generate_all(engine, [turn])[0]
    follow_up = Request("next", [*turn.token_ids, *answer.token_ids, 5], PARAMS, key=2)
    first = generate_all(engine, [follow_up])[0]
    assert passes == [[30], [51 - 48]]
    engine.update_weights(list(exported_fp8_weights(model)), 1)
    again = generate_all(engine, [follow_up])[0]
    assert passes[2:] == [[51]]
    assert first.token_ids == again.token_ids


def test_a_request_that_the_cache_cannot_hold_is_refused(model: Decoder) -> None:
    engine = NativeEngine(model, 4, cache_gib(model, 3))
    with pytest.raises(CacheTooSmallError, match=r"r0: 49 tokens need .* GiB of KV cache") as error:
        engine.submit(request(0, SamplingParams(1.0, 9, stop_ids=()), length=40))
    assert isinstance(error.value, ConfigError), "a run that meets it says one sentence"
    engine.submit(request(1, SamplingParams(1.0, 8, stop_ids=()), length=40))
    assert len(run_to_end(engine)["r1"].token_ids) == 8


def test_cancel_frees_slots_and_leaves_the_others_alone(model: Decoder) -> None:
    params = SamplingParams(1.0, 10, stop_ids=())
    requests = [request(i, params) for i in range(6)]
    engine = NativeEngine(model, 2)
    for each in requests:
        engine.submit(each)
    engine.step()
    engine.cancel(["r0", "r3", "unknown"])  # r0 runs, r3 waits
    assert engine.num_unfinished == 4
    engine.step()
    engine.submit(requests[0])  # its id is free again
    found = run_to_end(engine)
    assert_same(found, alone(model, [each for each in requests if each.id != "r3"]))
    assert next(iter(found)) == "r1"


def test_the_cache_fits_the_requests_and_is_freed_with_the_last(model: Decoder) -> None:
    """A closed batch: pages for as many as may run, each as long as the longest request needs."""
    engine = NativeEngine(model, max_running_requests=4)
    scheduler = engine._scheduler
    requests = [request(i, PARAMS, length=25 + i) for i in range(9)]
    for each in requests:
        scheduler.submit(each)
    sizes = set()
    while scheduler.num_unfinished:
        scheduler.step(0)
        if cache := scheduler._cache:
            sizes.add(cache.num_pages)
    assert sizes == {4 * 3}, "45 tokens are three pages of 16"
    assert scheduler._cache is None
    scheduler.submit(requests[0])
    scheduler.step(0)
    assert scheduler._cache is not None
    assert scheduler._cache.num_pages == 3
    scheduler.cancel_all()
    assert scheduler._cache is None
    scheduler.submit(requests[1])
    scheduler.submit(request(20, SamplingParams(1.0, 10_000, stop_ids=())))
    scheduler.cancel(["r20"])
    scheduler.step(0)
    assert scheduler._cache.num_pages == 3


def test_requests_that_cannot_generate_are_refused(model: Decoder) -> None:
    engine = NativeEngine(model, 2)
    engine.submit(request(0))
    for bad, message in (
        (request(0), "another id"),
        (Request("empty", [], PARAMS, 0), "no tokens"),
        (request(1, SamplingParams(1.0, 0, stop_ids=())), "max_tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.submit(bad)
    assert engine.num_unfinished == 1


def test_new_weights_need_an_engine_without_requests() -> None:
    engine = NativeEngine(make_model(), 2)
    weights = [(name, tensor.clone()) for name, tensor in exported_fp8_weights(engine.model)]
    engine.submit(request(0))
    with pytest.raises(AssertionError, match="finish or cancel"):
        engine.update_weights(weights, 1)
    engine.cancel_all()
    engine.update_weights(weights, 1)
    assert engine.policy_version == 1
    assert isinstance(engine, OffersDigest)


def test_a_caller_that_goes_away_cancels_the_rest(model: Decoder) -> None:
    engine = NativeEngine(model, 2)
    completions = generate(engine, MIXED)
    next(completions)
    assert engine.num_unfinished == len(MIXED) - 1
    completions.close()
    assert engine.num_unfinished == 0

    class Stop(Exception):
        pass

    def check() -> None:
        raise Stop

    with pytest.raises(Stop):
        list(generate(engine, MIXED, check))
    assert engine.num_unfinished == 0
    assert_same({c.id: c for c in generate(engine, MIXED)}, alone(model, MIXED))


def test_groups_are_complete_and_in_order(model: Decoder) -> None:
    prompts = [(f"p{i}", request(i).token_ids) for i in range(4)]
    engine = NativeEngine(model, 3)
    requests = group_requests(prompts, 3, PARAMS, seed=5, policy_version=0)  # type: ignore[arg-type]
    groups = dict(generate_groups(engine, [requests[i : i + 3] for i in range(0, 12, 3)]))
    assert sorted(groups) == [0, 1, 2, 3]
    for index, group in groups.items():
        assert [each.id for each in group] == [f"p{index}/{sample}" for sample in range(3)]
    assert len({tuple(each.token_ids) for each in groups[0]}) == 3, "each has its own randomness"
