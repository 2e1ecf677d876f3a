"""One decoder for Qwen2/2.5, Qwen3 and Llama: a block is two residual lines.

The model knows no parallelism, no FP8, no KV cache and no file format: `convert_to_fp8` swaps its
Linears, the operations of `infir2.numerics` choose by the layers' types, and an `AttentionContext`
brings the attention. Parameters are FP32 masters with Hugging Face's names; activations have
`compute_dtype`.

Shapes: T packed tokens, B sequences, D model, N heads, G key heads, H head, F ffn, V vocabulary.
"""

from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from infir2.config.schema import ShapeSection
from infir2.model.attention import AttentionContext, PackedAttention
from infir2.model.attention_cuda import plan_varlen
from infir2.model.block_graphs import BlockGraphs
from infir2.model.config import ModelConfig
from infir2.model.hf_names import load_directory
from infir2.model.memory import require_memory
from infir2.model.padding import plan_packing
from infir2.model.rope import rope_tables
from infir2.model.safetensors_io import read_config
from infir2.numerics import (
    RMSNorm,
    SavedActivations,
    add_linear,
    apply_rope,
    attention_inputs,
    feed_forward,
    head_logits,
    quantize_weights,
)
from infir2.numerics.formats import GROUP
from infir2.numerics.kernels import usable

Rope = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Attention of block `layer`, with its norm before it and the residual after it."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, config.qkv_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, config.output_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_eps) if config.qk_norm else nn.Identity()

    @property
    def groups(self) -> list[tuple[nn.Linear, ...]]:
        """The layers that share an input."""
        return [(self.q_proj, self.k_proj, self.v_proj), (self.o_proj,)]

    def inputs(
        self, x: Tensor, norm: RMSNorm, rope: Rope, saved: SavedActivations
    ) -> tuple[Tensor, ...]:
        """x [T, D], and of norm(x) the rotated q [T, N, H] and k [T, G, H], and v [T, G, H]."""
        layers = (self.q_proj, self.k_proj, self.v_proj)
        if not isinstance(self.q_norm, RMSNorm):
            return attention_inputs(x, norm, layers, self.head_dim, rope, saved)
        # Qwen3 normalizes heads before it rotates them, so the fused rotation does not apply.
        x, q, k, v = attention_inputs(x, norm, layers, self.head_dim, None, saved)
        return x, apply_rope(self.q_norm(q), *rope), apply_rope(self.k_norm(k), *rope), v

    def forward(
        self,
        x: Tensor,
        norm: RMSNorm,
        rope: Rope,
        context: AttentionContext,
        saved: SavedActivations,
    ) -> Tensor:
        """x + o(attention(rope(q), rope(k), v)) of norm(x), [T, D] -> [T, D]."""
        x, q, k, v = self.inputs(x, norm, rope, saved)
        out = context.attend(q, k, v, self.layer)
        return add_linear(x, out.flatten(1), self.o_proj, saved)


class FeedForward(nn.Module):
    """SwiGLU feed-forward, with its norm before it and the residual after it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.ffn_size, config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.ffn_size, config.mlp_bias)
        self.down_proj = nn.Linear(config.ffn_size, config.hidden_size, config.mlp_bias)

    @property
    def groups(self) -> list[tuple[nn.Linear, ...]]:
        """The layers that share an input."""
        return [(self.gate_proj, self.up_proj), (self.down_proj,)]

    def forward(self, x: Tensor, norm: RMSNorm, saved: SavedActivations) -> Tensor:
        """x + down(silu(gate) * up) of norm(x), [T, D] -> [T, D]."""
        return feed_forward(x, norm, self.gate_proj, self.up_proj, self.down_proj, saved)


class Block(nn.Module):
    """A pre-norm transformer block, [T, D] -> [T, D]."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_eps)
        self.mlp = FeedForward(config)

    @property
    def groups(self) -> list[tuple[nn.Linear, ...]]:
        """The layers that share an input."""
        return [*self.self_attn.groups, *self.mlp.groups]

    def forward(
        self, x: Tensor, rope: Rope, context: AttentionContext, saved: SavedActivations
    ) -> Tensor:
        x = self.self_attn(x, self.input_layernorm, rope, context, saved)
        return self.mlp(x, self.post_attention_layernorm, saved)


class Backbone(nn.Module):
    """Embedding, blocks and final norm, under the name `model` as in Hugging Face's classes."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_eps)


class Decoder(nn.Module):
    """A causal language model over packed token streams.

    Example, sequences of 3 and 2 tokens: `model(torch.tensor([5, 6, 7, 5, 9]),
    torch.tensor([0, 1, 2, 0, 1]), torch.tensor([0, 3, 5]))` -> logits [5, V].

    Attributes:
        config: shape of the model.
        compute_dtype: dtype of activations, BF16 or FP32; masters are FP32 either way.
        recompute: "full" saves only each block's input and runs its forward again in the backward.
        saved_activations: tensors that a block saves for its backward when recompute is "none".
        block_graphs: runs the blocks as CUDA graphs (`use_block_graphs`); None: never.
    """

    def __init__(
        self,
        config: ModelConfig,
        compute_dtype: torch.dtype = torch.bfloat16,
        recompute: Literal["none", "full"] = "none",
    ) -> None:
        super().__init__()
        self.config, self.compute_dtype, self.recompute, self.saved_activations = (
            config,
            compute_dtype,
            recompute,
            SavedActivations(),
        )
        self.block_graphs: BlockGraphs | None = None
        self.model = Backbone(config)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @classmethod
    def from_hf(
        cls,
        directory: str | Path,
        compute_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> "Decoder":
        """Load a Hugging Face directory tensor by tensor.

        A BF16 file fills the masters; a block-FP8 file gives layers that hold its codes and no
        masters. Raises CheckpointError if the directory is unreadable, incomplete or of an
        unsupported model, and ConfigError if it does not fit the memory.
        """
        with torch.device("meta"):
            model = cls(read_config(Path(directory)), compute_dtype)
        load_directory(model, Path(directory), device)
        return model

    @classmethod
    def from_shape(
        cls,
        shape: ShapeSection,
        vocab_size: int,
        seed: int,
        compute_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> "Decoder":
        """A new model; its weights depend only on shape and seed, not on the device.

        Raises ConfigError if they do not fit the memory.
        """
        config = ModelConfig.from_shape(shape, vocab_size)
        require_memory(4 * config.num_parameters)
        with torch.device("meta"):
            model = cls(config, compute_dtype)
        model.to_empty(device="cpu")
        model.initialize(seed, shape.init_std)
        return model.to(device)

    def initialize(self, seed: int, std: float = 0.0) -> None:
        """Draw normal weights; biases are 0, norms 1.

        `std` is their standard deviation; 0 means 1/sqrt(fan_in), and 1/sqrt(D) for the embedding.
        """
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0.0, std or parameter.shape[1] ** -0.5, generator=generator)
                else:
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0)

    @property
    def head_weight(self) -> nn.Parameter:
        """FP32 master [V, D] of the output projection: the embedding's if the two are tied."""
        weight = (
            self.model.embed_tokens.weight if self.config.tie_embeddings else self.lm_head.weight
        )
        assert isinstance(weight, nn.Parameter)
        return weight

    def forward(self, token_ids: Tensor, positions: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Logits FP32 [T, V] of token_ids [T] at positions [T].

        Attention is causal within each of the B sequences that `cu_seqlens` [B+1] bounds.
        """
        return head_logits(self.hidden_states(token_ids, positions, cu_seqlens), self.head_weight)

    def plan_attention(self, cu_seqlens: Tensor, device: torch.device) -> AttentionContext:
        """Causal attention within each sequence of `cu_seqlens` [B+1], for tensors on `device`."""
        if self._uses_kernels(device):
            lengths = cu_seqlens.diff().tolist()
            return plan_varlen(tuple(length for length in lengths if length), device)
        key_width = self.config.num_kv_heads * self.config.head_dim
        return PackedAttention(
            plan_packing(cu_seqlens, self.config.num_heads, key_width, device=device)
        )

    def hidden_states(
        self,
        token_ids: Tensor,
        positions: Tensor,
        cu_seqlens: Any,
        context: AttentionContext | None = None,
    ) -> Tensor:
        """States [T, D] after the final norm, of token_ids [T] at positions [T].

        `cu_seqlens` [B+1] is a tensor or an array; the host reads it, and FSDP2 moves tensors to
        the GPU but not arrays. `context` replaces causal attention within the B sequences, for
        example by attention to a KV cache. Raises ValueError for a `cu_seqlens` of another stream.
        """
        cu_seqlens = torch.as_tensor(cu_seqlens)
        num_tokens, end = token_ids.numel(), int(cu_seqlens[-1])
        if token_ids.shape != positions.shape or end != num_tokens:
            raise ValueError(
                "token_ids, positions and cu_seqlens must describe the same tokens; got "
                f"{num_tokens} token_ids, {positions.numel()} positions, cu_seqlens up to {end}"
            )
        if context is None:
            if self._uses_kernels(token_ids.device):
                # With full blocks of 128 tokens no GEMM of the backward has to pad a copy. The
                # padding is a sequence of its own.
                padding = -num_tokens % GROUP
                token_ids, positions = (
                    F.pad(token_ids, (0, padding)),
                    F.pad(positions, (0, padding)),
                )
                cu_seqlens = F.pad(cu_seqlens, (0, 1), value=num_tokens + padding)
            context = self.plan_attention(cu_seqlens, token_ids.device)
        x = self._run_blocks(token_ids, positions, context)
        return self.model.norm(x[:num_tokens])

    def use_block_graphs(self, num_tokens: int) -> "BlockGraphs":
        """Let `block_graphs.active()` run the blocks of micro-batches of `num_tokens` as graphs."""
        rows = num_tokens + -num_tokens % GROUP
        self.block_graphs = BlockGraphs(self.model.layers, self._blocks, rows)
        return self.block_graphs

    def _uses_kernels(self, device: torch.device) -> bool:
        return self.compute_dtype == torch.bfloat16 and usable(device)

    def _run_blocks(
        self, token_ids: Tensor, positions: Tensor, context: AttentionContext
    ) -> Tensor:
        """States [T, D] after the last block."""
        # The FP32 master's rows are rounded after the look-up, so that its gradient sums in FP32.
        x = self.model.embed_tokens(token_ids).to(self.compute_dtype)
        rope = rope_tables(self.config, positions)
        if self.block_graphs is not None:
            replayed = self.block_graphs.run(x, rope, context)
            if replayed is not None:
                return replayed
        blocks: Any = self.model.layers
        quantize_weights(x, (group for block in blocks for group in block.groups))
        return self._blocks(x, rope, context)

    def _blocks(self, x: Tensor, rope: Rope, context: AttentionContext) -> Tensor:
        recomputed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        for block in self.model.layers:
            arguments = (x, rope, context, self.saved_activations)
            if self.recompute == "full" and torch.is_grad_enabled():
                x = recomputed(block, *arguments)
            else:
                x = block(*arguments)
        return x
