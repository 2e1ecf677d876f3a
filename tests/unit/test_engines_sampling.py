"""Counter-based randomness and inverse-distribution sampling."""

import numpy as np
import torch

from infir2.engines.sampling import sample, sampling_key, uniforms


def draw(
    logits: torch.Tensor, temperature: float, top_p: float = 1.0, count: int = 20000
) -> torch.Tensor:
    draws = uniforms(np.full(count, sampling_key(1, "p", 0, 0), dtype=np.uint64), np.arange(count))
    params = np.full(count, temperature), np.full(count, top_p)
    return sample(logits.expand(count, -1), *params, draws)[0]


def test_uniforms_are_uniform_and_depend_on_key_and_counter_only() -> None:
    keys = np.array([sampling_key(0, "a", i, 0) for i in range(1000)], dtype=np.uint64)
    values = uniforms(keys, np.zeros(1000))
    assert values.min() >= 0
    assert values.max() < 1
    assert abs(values.mean() - 0.5) < 0.03
    assert abs(np.corrcoef(values, uniforms(keys, np.ones(1000)))[0, 1]) < 0.1
    assert uniforms(keys[7:8], np.zeros(1))[0] == values[7]


def test_keys_differ_in_every_part() -> None:
    parts = [(1, "p", 0, 0), (2, "p", 0, 0), (1, "q", 0, 0), (1, "p", 1, 0), (1, "p", 0, 1)]
    assert len({sampling_key(*p) for p in parts}) == 5


def test_frequencies_follow_the_tempered_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -30.0]])
    for temperature in (0.7, 1.1):
        expected = torch.softmax(logits.double() / temperature, -1)[0]
        found = torch.bincount(draw(logits, temperature), minlength=4) / 20000
        assert torch.allclose(found.double(), expected, atol=0.012)


def test_top_p_keeps_the_smallest_sufficient_set() -> None:
    logits = torch.log(torch.tensor([[0.2, 0.5, 0.3]]))
    assert set(draw(logits, 1.0, top_p=0.75).tolist()) == {1, 2}
    assert set(draw(logits, 1.0, top_p=0.4).tolist()) == {1}


def test_greedy_takes_the_mode_and_reports_its_probability() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    chosen, logprobs = sample(logits, np.zeros(1), np.ones(1), np.zeros(1))
    assert chosen.tolist() == [1]
    assert torch.allclose(logprobs, torch.log_softmax(logits, -1)[:, 1])


def test_an_impossible_token_is_never_drawn_at_the_ends_of_the_unit_interval() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(2, -1)
    chosen, _ = sample(logits, np.ones(2), np.ones(2), np.array([0.0, 1.0 - 2.0**-53]))
    assert chosen.tolist() == [1, 2]


def test_a_row_does_not_depend_on_the_parameters_of_the_others() -> None:
    logits = torch.randn(12, 50, generator=torch.Generator().manual_seed(3))
    temperatures = np.array([0.0, 1.0, 0.6, 1.0] * 3)
    top_ps = np.array([1.0, 1.0, 0.9, 0.3] * 3)
    draws = np.random.default_rng(0).random(12)
    token_ids, logprobs = sample(logits, temperatures, top_ps, draws)
    for i in range(12):
        row = slice(i, i + 1)
        alone = sample(logits[row], temperatures[row], top_ps[row], draws[row])
        assert (token_ids[i], logprobs[i]) == (alone[0][0], alone[1][0])
