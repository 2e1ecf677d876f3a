"""The trainer's step: normalisation, the finite check, one quantisation per weight."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import infir2.train.trainer as trainer_module
from infir2.config.schema import OptimizerSection, ShapeSection
from infir2.data import Batch
from infir2.model import Decoder
from infir2.numerics import Fp8Linear, convert_to_fp8
from infir2.train.losses import Loss, NextTokenLoss, TokenScores, next_token_loss
from infir2.train.trainer import Trainer

SHAPE = ShapeSection(
    hidden_size=40, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, ffn_size=136
)


def make_trainer(
    fp8: bool, recompute: str = "none", dtype: torch.dtype = torch.bfloat16
) -> Trainer:
    model = Decoder.from_shape(SHAPE, vocab_size=61, seed=3, compute_dtype=dtype)
    model.recompute = recompute  # type: ignore[assignment]
    return Trainer(
        convert_to_fp8(model) if fp8 else model, OptimizerSection(), loss_chunk_tokens=16
    )


def sequences(lengths: list[int], seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(0, 61, (sum(lengths),), generator=generator)
    positions = torch.cat([torch.arange(n) for n in lengths])
    ends = torch.tensor(lengths).cumsum(0)
    mask = torch.ones(len(token_ids), dtype=torch.bool)
    mask[ends - 1] = False
    labels = torch.where(mask, token_ids.roll(-1), 0)
    return Batch(token_ids, positions, labels, mask, torch.cat([torch.zeros(1), ends]).int())


def split(batch: Batch, at: int) -> list[Batch]:
    """The batch cut into two at sequence `at`."""
    row = int(batch.cu_seqlens[at])
    halves = []
    for part, cu in (
        (slice(0, row), batch.cu_seqlens[: at + 1]),
        (slice(row, None), batch.cu_seqlens[at:] - row),
    ):
        halves.append(
            Batch(
                batch.token_ids[part],
                batch.positions[part],
                batch.labels[part],
                batch.loss_mask[part],
                cu,
            )
        )
    return halves


def gradients(
    trainer: Trainer, batches: list[Batch], loss: Loss = next_token_loss
) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}

    def keep(*_: object) -> None:
        found.update({name: p.grad.clone() for name, p in trainer.model.named_parameters()})  # type: ignore[union-attr]

    trainer.optimizer.register_step_pre_hook(keep)
    trainer.step(batches, loss, 1e-3)
    return found


def test_micro_batches_give_the_gradients_of_the_whole_step() -> None:
    batch = sequences([5, 40, 17, 9])
    whole = gradients(make_trainer(fp8=False, dtype=torch.float32), [batch])
    parts = gradients(make_trainer(fp8=False, dtype=torch.float32), split(batch, 1))
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


class FirstTokensLoss:
    """A weighted loss whose weights come from no input: tokens weigh 1, 1/2, 1/3, ..."""

    uniform_gradient, needs_entropy = False, True

    def __call__(self, scores: TokenScores) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        assert scores.entropy is not None
        weights = 1 / torch.arange(1, len(scores.logprobs) + 1)
        return -(weights * scores.logprobs).sum().double(), {"entropy": scores.entropy.sum()}


class _GradientOfTheFirstToken(torch.autograd.Function):
    """The identity, whose backward is allowed what `uniform_gradient` allows the head on a GPU."""

    @staticmethod
    def forward(_: Any, logprobs: torch.Tensor) -> torch.Tensor:
        return logprobs.clone()

    @staticmethod
    def backward(_: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad[0].expand(len(grad))


def test_a_weighted_loss_without_token_inputs_gets_its_own_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against autograd on plain logits, with a head that uses `uniform_gradient` as the GPU's."""

    def token_logprobs(
        *arguments: Any, uniform_gradient: bool, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        logprobs, entropy = real(*arguments, **options)
        return _GradientOfTheFirstToken.apply(logprobs) if uniform_gradient else logprobs, entropy

    real = trainer_module.token_logprobs
    monkeypatch.setattr(trainer_module, "token_logprobs", token_logprobs)
    batch, loss = sequences([30, 21]), FirstTokensLoss()
    trained = gradients(make_trainer(fp8=False, dtype=torch.float32), [batch], loss)

    model = make_trainer(fp8=False, dtype=torch.float32).model
    dense = model(batch.token_ids, batch.positions, batch.cu_seqlens).double().log_softmax(-1)
    logprobs = dense.gather(1, batch.labels[:, None]).squeeze(1)[batch.loss_mask]
    weights = 1 / torch.arange(1, len(logprobs) + 1)
    (-(weights * logprobs).sum() / len(logprobs)).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trained[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_gradients_and_masters_are_fp32() -> None:
    trainer = make_trainer(fp8=True)
    assert {gradient.dtype for gradient in gradients(trainer, [sequences([30, 20])]).values()} == {
        torch.float32
    }
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_weight_is_quantised_once_per_step(recompute: str) -> None:
    trainer = make_trainer(fp8=True, recompute=recompute)
    layers = [module for module in trainer.model.modules() if isinstance(module, Fp8Linear)]
    assert len(layers) == 14
    for step in (1, 2, 3):
        trainer.step(split(sequences([30, 20, 10], seed=step), 1), next_token_loss, 1e-3)
        assert {layer.quantizations for layer in layers} == {step}


def test_recompute_changes_nothing() -> None:
    batch = sequences([30, 20])
    kept, again = (
        gradients(make_trainer(fp8=True), [batch]),
        gradients(make_trainer(fp8=True, recompute="full"), [batch]),
    )
    for name, gradient in kept.items():
        assert torch.equal(gradient, again[name]), name


def test_a_non_finite_step_changes_nothing_and_says_so() -> None:
    trainer = make_trainer(fp8=True)
    trainer.step([sequences([30])], next_token_loss, 1e-3)
    before = {name: tensor.clone() for name, tensor in trainer.tensors().items()}

    class PoisonedLoss(NextTokenLoss):
        def __call__(self, scores: TokenScores) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            loss, metrics = super().__call__(scores)
            return loss * float("nan"), metrics

    result = trainer.step([sequences([30], seed=1)], PoisonedLoss(), 1e-3)
    assert result.skipped
    assert math.isnan(result.loss)
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.tensors().items())
    assert not trainer.step([sequences([30], seed=2)], next_token_loss, 1e-3).skipped


def test_a_step_without_trained_tokens_is_skipped() -> None:
    trainer = make_trainer(fp8=True)
    batch = sequences([30])
    result = trainer.step(
        [replace(batch, loss_mask=torch.zeros_like(batch.loss_mask))], next_token_loss, 1e-3
    )
    assert result.skipped
    assert result.trained_tokens == 0


def test_scores_are_those_of_the_dense_model() -> None:
    trainer = make_trainer(fp8=True)
    batch = sequences([30, 21])
    scores = trainer.score(batch, temperature=0.7, with_entropy=True)
    logits = trainer.model(batch.token_ids, batch.positions, batch.cu_seqlens).double() / 0.7
    dense = torch.log_softmax(logits, -1)
    torch.testing.assert_close(
        scores.logprobs, dense.gather(1, batch.labels[:, None]).squeeze(1)[batch.loss_mask].float()
    )
    entropy = -(dense.exp() * dense).sum(-1)[batch.loss_mask].float()
    torch.testing.assert_close(scores.entropy, entropy)
