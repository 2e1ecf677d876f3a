"""A fixed prompt and the trainer's log-probability of each of its tokens.

Proof for servers that do not show their weights: they score the same prompt. It finds other, mixed
and half-loaded weights as far as their log-probabilities differ more than two implementations of
the same model do (docs/engines.md has the measured numbers).
"""

import torch

from infir2.data import Batch
from infir2.engines.remote import WeightProbe
from infir2.numerics import token_logprobs
from infir2.parallel.collectives import to_device
from infir2.parallel.parallel_model import ParallelModel

NUM_TOKENS = 192  # more than a page of any server's cache, so that a stale page is seen


def probe_tokens(vocab_size: int, max_positions: int) -> list[int]:
    """The prompt, scattered over the vocabulary; one token may follow it."""
    count = min(NUM_TOKENS, max_positions - 1)
    return [(7919 * i + 104729 * i * i + 1) % vocab_size for i in range(count)]


@torch.no_grad()
def trainer_probe(parallel_model: ParallelModel) -> WeightProbe:
    """The probe of the trainer's current weights. Every rank calls this at the same point."""
    config = parallel_model.model.config
    token_ids = probe_tokens(config.vocab_size, config.max_positions)
    count = len(token_ids)
    ids, index = torch.tensor(token_ids), torch.arange(count)
    batch = Batch(
        token_ids=ids,
        positions=index,
        labels=ids.roll(-1),
        loss_mask=index < count - 1,
        cu_seqlens=torch.tensor([0, count], dtype=torch.int32),
        token_inputs={"index": index},
    )
    logprobs = _score(parallel_model, parallel_model.local_batch(batch), count)
    parallel_model.reshard()
    return WeightProbe(token_ids, logprobs[:-1].cpu().numpy())


def _score(parallel_model: ParallelModel, batch: Batch, count: int) -> torch.Tensor:
    """FP32 [count]; the ranks that share the batch score different tokens of it."""
    model, device = parallel_model.model, parallel_model.layout.device
    rows = batch.loss_mask.nonzero().squeeze(1)
    places = to_device(batch.token_inputs["index"][rows], device)
    ids, positions, labels, rows = (
        to_device(x, device) for x in (batch.token_ids, batch.positions, batch.labels, rows)
    )
    hidden = model.hidden_states(ids, positions, batch.cu_seqlens.numpy())
    logprobs, _ = token_logprobs(hidden[rows], model.head_weight, labels[rows], 1.0, count)
    values = torch.zeros(count, dtype=torch.float32, device=device)
    values.index_copy_(0, places, logprobs.float())
    return parallel_model.all_reduce_over_batch(values)
