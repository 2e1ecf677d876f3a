"""The interface of attention, and its FP64 reference over packed sequences.

A forward pass builds one `AttentionContext` and hands it to every block. `PackedAttention` here is
the reference; `attention_cuda.VarlenAttention` calls the GPU's libraries; the engine's KV cache and
context parallelism bring their own.

The reference computes scores, softmax and value sums in FP64 and rounds once to the activation
dtype: a token's output does not depend on the rest of the batch, on the chunk it was computed in,
or on whether its keys came from a cache (docs/DESIGN.md, idea 3). The backward recomputes the
probabilities with FP32 accumulation from q, k, v, the output and the log-sum-exp (FlashAttention-2,
arXiv 2307.08691). Grouped-query heads never repeat keys: the R = N / G query heads of a key head
become rows of its matrix product.

Shapes: T packed tokens, N query heads, G key heads, H head size; n sequences of L rows in a
rectangle, S keys.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from infir2.model.padding import Packing, Rectangle


class AttentionContext(Protocol):
    """Which keys the tokens of one forward pass attend to; one context serves all layers."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """Attention of rotated q [T, N, H] to k, v [T, G, H] of block `layer`; [T, N, H] like q."""
        ...


@dataclass(frozen=True)
class PackedAttention:
    """The reference, on any device: causal attention within each sequence of a packed stream."""

    packing: Packing

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """See `AttentionContext`; differentiable, and the same for every layer."""
        if not q.shape[0]:
            return torch.zeros_like(q)
        assert q.shape[0] == k.shape[0] == v.shape[0] == self.packing.num_tokens, (
            "packing belongs to another stream"
        )
        out: Tensor = _ReferenceAttention.apply(q, k, v, self.packing)
        return out


def softmax_values(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocked: Tensor,
    want_lse: bool = False,
    diagonal: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """FP64 softmax(q @ k.T) @ v for pre-scaled q [n*G, R*L, H] and k, v [n*G, S, H].

    `blocked` [n or 1, 1, L, S] marks keys that a query must not see: they contribute exactly zero.
    Every query sees at least one key. `diagonal` says that they are those after query + diagonal.
    Returns [n*G, R*L, H] and, with `want_lse`, the log-sum-exp [n*G, R*L].
    """
    scores = torch.bmm(q, k.transpose(1, 2))
    squares = scores.view(blocked.shape[0], -1, *blocked.shape[2:])
    squares.masked_fill_(blocked, float("-inf"))
    largest = scores.amax(-1, keepdim=True)
    weights = scores.sub_(largest)
    if diagonal is None:
        weights.exp_()
    else:  # -inf takes a CPU's exp five times as long as other numbers
        squares.tril_(diagonal).exp_().tril_(diagonal)
    total = weights.sum(-1, keepdim=True)
    out = torch.bmm(weights, v).div_(total)
    return out, (largest + total.log()).squeeze(-1) if want_lse else None


def heads_first(x: Tensor, rectangle: Rectangle, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """Rows of x [T, N, H] as [n, G, R, L, H] contiguous in `dtype` (R = 1 for keys and values)."""
    n, length = rectangle.shape
    rows = x.index_select(0, rectangle.rows.flatten()).view(n, length, kv_heads, -1, x.shape[-1])
    # `to` ignores memory_format where it has nothing to convert
    return rows.permute(0, 2, 3, 1, 4).to(dtype, memory_format=torch.contiguous_format).contiguous()


def tokens_first(x: Tensor) -> Tensor:
    """The inverse of `heads_first`: [n, G, R, L, H] as [n*L, G*R, H]."""
    n, groups, ratio, length, size = x.shape
    return x.permute(0, 3, 1, 2, 4).reshape(n * length, groups * ratio, size)


def _blocked(start: int, end: int, device: torch.device) -> Tensor:
    """[1, 1, end - start, end]: True where the key comes after the query."""
    keys, queries = torch.arange(end, device=device), torch.arange(start, end, device=device)
    return (keys[None, :] > queries[:, None])[None, None]


class _ReferenceAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
        groups, scale = k.shape[1], q.shape[2] ** -0.5
        outs, lses = [], []
        for rectangle in packing.rectangles:
            q_r, k_r, v_r = (heads_first(x, rectangle, groups, torch.float64) for x in (q, k, v))
            out, lse = _forward_rectangle(
                q_r.mul_(scale), k_r.flatten(0, 2), v_r.flatten(0, 2), rectangle.query_chunk
            )
            outs.append(tokens_first(out.to(q.dtype)))
            lses.append(tokens_first(lse.float()[..., None]))
        out = torch.cat(outs).index_select(0, packing.unpad)
        ctx.save_for_backward(q, k, v, out, torch.cat(lses).index_select(0, packing.unpad))
        ctx.packing = packing
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse = ctx.saved_tensors
        packing, groups = ctx.packing, k.shape[1]
        # D_i = sum_h dO_ih O_ih: the row sum that the softmax's Jacobian subtracts
        row_sums = (grad_out.float() * out.float()).sum(-1, keepdim=True)
        parts: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
        for rectangle in packing.rectangles:
            tensors = [
                heads_first(x, rectangle, groups, torch.float32)
                for x in (q, k, v, grad_out, lse, row_sums)
            ]
            # padded queries repeat a real row; without this they would add to its keys' gradients
            padding = ~rectangle.is_real[:, None, None, :, None]
            tensors[3].masked_fill_(padding, 0.0)
            tensors[5].masked_fill_(padding, 0.0)
            for part, grad, like in zip(
                parts, _backward_rectangle(tensors, rectangle.query_chunk), (q, k, v), strict=True
            ):
                part.append(tokens_first(grad.to(like.dtype)))
        grad_q, grad_k, grad_v = (torch.cat(part).index_select(0, packing.unpad) for part in parts)
        return grad_q, grad_k, grad_v, None


def _forward_rectangle(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Causal attention of scaled q [n, G, R, L, H] to k, v [n*G, L, H].

    Returns the output, shaped like q, and the log-sum-exp [n, G, R, L].
    """
    n, groups, ratio, length, size = q.shape
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:-1])
    for start in range(0, length, chunk):
        end = min(start + chunk, length)
        rows = q[:, :, :, start:end].reshape(n * groups, ratio * (end - start), size)
        part, part_lse = softmax_values(
            rows, k[:, :end], v[:, :end], _blocked(start, end, q.device), True, start
        )
        assert part_lse is not None
        out[:, :, :, start:end] = part.view(n, groups, ratio, end - start, size)
        lse[:, :, :, start:end] = part_lse.view(n, groups, ratio, end - start)
    return out, lse


def _backward_rectangle(tensors: list[Tensor], chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q [n, G, R, L, H], k and v [n, G, 1, L, H] in FP32.

    `tensors` holds q, k, v, grad_out, the log-sum-exp and the row sums.
    """
    q, k, v, grad_out, lse, row_sums = tensors
    n, groups, ratio, length, size = q.shape
    scale = size**-0.5
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    keys, values, grad_keys, grad_values = (
        x.view(n * groups, length, size) for x in (k, v, grad_k, grad_v)
    )
    for start in range(0, length, chunk):
        end = min(start + chunk, length)
        chunks = (x[:, :, :, start:end] for x in (q, grad_out, lse, row_sums))
        q_c, go_c, lse_c, sums_c = (
            x.reshape(n * groups, ratio * (end - start), -1) for x in chunks
        )
        q_c = q_c * scale
        weights = torch.bmm(q_c, keys[:, :end].transpose(1, 2)).sub_(lse_c).exp_()
        weights.view(-1, end - start, end).tril_(start)  # blocked keys
        grad_values[:, :end] += torch.bmm(weights.transpose(1, 2), go_c)
        # dS = P * (dP - D)
        grad_scores = torch.bmm(go_c, values[:, :end].transpose(1, 2)).sub_(sums_c).mul_(weights)
        grad_keys[:, :end] += torch.bmm(grad_scores.transpose(1, 2), q_c)
        part = torch.bmm(grad_scores, keys[:, :end]).mul_(scale)
        grad_q[:, :, :, start:end] = part.view(n, groups, ratio, end - start, size)
    return grad_q, grad_k, grad_v
