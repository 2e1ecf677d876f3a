"""The metrics of rollout against trainer, against closed forms."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from infir2.config.schema import RlSection
from infir2.data import Batch
from infir2.errors import CheckFailedError
from infir2.parallel.ranks import Ranks
from infir2.rl.mismatch import check_mismatch, mismatch_metrics


def batch(*sequences: list[float]) -> Batch:
    """Per sequence a prompt of two tokens, then tokens with these differences."""
    mask = [position >= 1 for values in sequences for position in range(len(values) + 1)]
    flat = [value for values in sequences for value in (9.0, *values)]
    lengths = [0, *(len(values) + 1 for values in sequences)]
    size = len(mask)
    zeros = torch.zeros(size, dtype=torch.int64)
    return Batch(
        zeros,
        zeros,
        zeros,
        torch.tensor(mask),
        torch.tensor(lengths).cumsum(0).int(),
        {"trainer_logprobs": torch.tensor(flat), "rollout_logprobs": torch.zeros(size)},
    )


class Together(Ranks):
    """Ranks that are threads of this process."""

    def __init__(self, rank: int, size: int, shared: dict[str, Any]) -> None:
        self.rank, self.size = rank, size
        self._shared = shared

    def all_gather(self, value: Any) -> list[Any]:
        self._shared["values"][self.rank] = value
        self._shared["barrier"].wait()
        values = list(self._shared["values"])
        self._shared["barrier"].wait()
        return values


def test_each_metric_has_its_closed_form() -> None:
    found = mismatch_metrics([batch([0.0, 0.5], [-0.25, -0.25])], Ranks())
    x = [0.0, 0.5, -0.25, -0.25]
    assert found == pytest.approx(
        {
            "mismatch_equal": 0.25,
            "mismatch_k1": -sum(x) / 4,
            "mismatch_kl": sum(math.exp(v) - 1 - v for v in x) / 4,
            "mismatch_mean": 0.25,
            "mismatch_p999": 0.5,
            "mismatch_max": 0.5,
            "mismatch_prob_error": sum(math.exp(abs(v)) for v in x) / 4,
            "mismatch_sequence": 0.25,
        }
    )


def test_the_percentile_is_not_the_maximum() -> None:
    found = mismatch_metrics([batch([i / 4096 for i in range(4000)])], Ranks())
    assert found["mismatch_max"] == 3999 / 4096
    assert found["mismatch_p999"] == 3996 / 4096  # the fourth of 4,000


def test_equal_policies_differ_in_nothing() -> None:
    found = mismatch_metrics([batch([0.0, 0.0])], Ranks())
    assert found.pop("mismatch_equal") == found.pop("mismatch_prob_error") == 1
    assert set(found.values()) == {0.0}


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_ranks_find_what_one_process_finds(parts: int) -> None:
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randn(700, generator=generator).tolist() for _ in range(3)]
    alone = mismatch_metrics([batch(*sequences)], Ranks())
    shared = {"values": [None] * parts, "barrier": threading.Barrier(parts)}
    with ThreadPoolExecutor(parts) as pool:
        found = pool.map(
            lambda rank: mismatch_metrics(
                [batch(values) for values in sequences[rank::parts]], Together(rank, parts, shared)
            ),
            range(parts),
        )
        for each in found:
            assert each == pytest.approx(alone, rel=1e-12)


@pytest.mark.parametrize("value", [1.0, math.nan])
@pytest.mark.parametrize("name", ["kl", "prob_error"])
def test_a_limit_stops_the_run(name: str, value: float) -> None:
    metrics = {"mismatch_kl": 0.0, "mismatch_prob_error": 1.0}
    check_mismatch(metrics, RlSection())
    with pytest.raises(CheckFailedError, match=f"rl.max_mismatch_{name}"):
        check_mismatch(metrics | {f"mismatch_{name}": value * 2}, RlSection())


def test_exact_rollouts_allow_no_other_bit() -> None:
    metrics = {"mismatch_kl": 0.0, "mismatch_prob_error": 1.0, "mismatch_max": 1e-7}
    check_mismatch(metrics | {"mismatch_equal": 1.0}, RlSection(), exact=True)
    check_mismatch(metrics | {"mismatch_equal": 0.999}, RlSection())
    with pytest.raises(CheckFailedError, match=r"0\.100% of the tokens.*1e-07.*engines\.md"):
        check_mismatch(metrics | {"mismatch_equal": 0.999}, RlSection(), exact=True)
