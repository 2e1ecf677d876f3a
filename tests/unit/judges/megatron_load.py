"""Load a `torch_dist` checkpoint with Megatron-core into its GPTModel on a CPU and save its logits.

    python megatron_load.py DIRECTORY SHAPE.json OUT.safetensors

SHAPE.json holds the sizes and token ids; OUT gets the logits and every loaded parameter.
"""

import contextlib
import json
import os
import sys

import torch
from safetensors.torch import save_file


def build(shape: dict) -> torch.nn.Module:
    """A GPTModel of plain torch layers."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.cuda.current_device = lambda: "cpu"
    tensor_parallel.random.CudaRNGStatesTracker.fork = lambda self, name=None: (
        contextlib.nullcontext()
    )
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel(1, 1)
    config = TransformerConfig(
        num_layers=shape["num_layers"],
        hidden_size=shape["hidden_size"],
        ffn_hidden_size=shape["ffn_size"],
        num_attention_heads=shape["num_heads"],
        num_query_groups=shape["num_kv_heads"],
        kv_channels=shape["head_dim"],
        normalization="RMSNorm",
        layernorm_epsilon=shape["rms_eps"],
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=shape["qkv_bias"],
        qk_layernorm=shape["qk_norm"],
        use_cpu_initialization=True,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=torch.float32,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=shape["qk_norm"]),
        vocab_size=shape["vocab_size"],
        max_sequence_length=shape["max_positions"],
        share_embeddings_and_output_weights=shape["tie_embeddings"],
        position_embedding_type="rope",
        rotary_base=shape["rope_theta"],
    )


def main(directory: str, shape_file: str, out: str) -> None:
    from megatron.core import dist_checkpointing

    with open(shape_file) as file:
        shape = json.load(file)
    model = build(shape).eval()
    with torch.no_grad():  # a value that no checkpoint has, to find parameters that are not loaded
        for parameter in model.parameters():
            parameter.fill_(12345.0)
    # The result has the tensors and the non-tensor entries of common.pt.
    common = dist_checkpointing.load(model.sharded_state_dict(), directory)
    tensors = {name: common.pop(name) for name in list(common) if name in model.state_dict()}
    model.load_state_dict(tensors, strict=False)
    token_ids = torch.tensor([shape["token_ids"]])
    positions = torch.arange(token_ids.shape[1])[None]
    mask = torch.ones(token_ids.shape[1], token_ids.shape[1], dtype=torch.bool).triu(1)[None, None]
    with torch.no_grad():
        logits = model(token_ids, positions, mask)
    parameters = {
        f"parameters/{name}": value.detach().clone().contiguous()
        for name, value in model.named_parameters()
    }
    save_file({"logits": logits[0].contiguous().float(), **parameters}, out)
    print(
        json.dumps(
            {
                "checkpoint_version": common["checkpoint_version"],
                "num_layers": common["args"].num_layers,
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
