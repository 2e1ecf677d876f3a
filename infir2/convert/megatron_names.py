"""Names and layouts of the tensors of Megatron-core's GPTModel, and its arguments.

N query heads, G key-value heads, H head size, D model size, F feed-forward size, V vocabulary, L
layers:

    embedding.word_embeddings.weight                  [V, D]
    decoder.layers[.i].self_attention.linear_qkv.weight
                                                      [G * (N/G + 2) * H, D]: for each of the G
                                                      groups, its N/G queries, then its key, then
                                                      its value
    decoder.layers[.i].self_attention.linear_proj.weight
                                                      [D, N * H]
    decoder.layers[.i].mlp.linear_fc1.weight          [2F, D]: gate, then up
    decoder.layers[.i].mlp.linear_fc2.weight          [D, F]
    decoder.final_layernorm.weight                    [D]
    output_layer.weight                               [V, D]; absent if tied to the embedding

A layer's number is part of the key, or all layers are stacked in a leading dimension [L, ...]. The
rotary embedding needs no permutation: both sides rotate halves.
"""

EMBEDDING = "embedding.word_embeddings.weight"
HEAD = "output_layer.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
LAYERS = "decoder.layers."
HF_EMBEDDING, HF_HEAD = "model.embed_tokens.weight", "lm_head.weight"

# Megatron's tensors outside the layers -> Hugging Face's.
OUTSIDE_LAYERS = {EMBEDDING: HF_EMBEDDING, FINAL_NORM: "model.norm.weight", HEAD: HF_HEAD}

QKV = [f"self_attn.{part}_proj" for part in "qkv"]
# Megatron's tensors of a layer -> the Hugging Face tensors that it concatenates.
LAYER = {
    "self_attention.linear_qkv.layer_norm_weight": ["input_layernorm.weight"],
    "self_attention.linear_qkv.weight": [f"{name}.weight" for name in QKV],
    "self_attention.linear_qkv.bias": [f"{name}.bias" for name in QKV],
    "self_attention.q_layernorm.weight": ["self_attn.q_norm.weight"],
    "self_attention.k_layernorm.weight": ["self_attn.k_norm.weight"],
    "self_attention.linear_proj.weight": ["self_attn.o_proj.weight"],
    "self_attention.linear_proj.bias": ["self_attn.o_proj.bias"],
    "mlp.linear_fc1.layer_norm_weight": ["post_attention_layernorm.weight"],
    "mlp.linear_fc1.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "mlp.linear_fc1.bias": ["mlp.gate_proj.bias", "mlp.up_proj.bias"],
    "mlp.linear_fc2.weight": ["mlp.down_proj.weight"],
    "mlp.linear_fc2.bias": ["mlp.down_proj.bias"],
}
# The norms of a layer where Megatron does not fuse them into the linear that follows.
UNFUSED_NORMS = {
    "input_layernorm.weight": LAYER["self_attention.linear_qkv.layer_norm_weight"],
    "pre_mlp_layernorm.weight": LAYER["mlp.linear_fc1.layer_norm_weight"],
}

# Fields of our ModelConfig -> Megatron's arguments.
ARGUMENTS = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "ffn_size": "ffn_hidden_size",
    "num_heads": "num_attention_heads",
    "head_dim": "kv_channels",
    "rms_eps": "norm_epsilon",
    "rope_theta": "rotary_base",
}
FLOAT_ARGUMENTS = {"norm_epsilon", "rotary_base"}
# Arguments of Megatron's that ModelConfig has no field for, with the only value that it implements.
FIXED_ARGUMENTS = {
    "use_rope_scaling": False,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "normalization": "RMSNorm",
    "swiglu": True,
    "apply_layernorm_1p": False,
}
