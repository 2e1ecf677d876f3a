"""Weights in and out: Hugging Face in BF16 and FP8, GGUF, and Megatron's checkpoints."""

from infir2.convert.export import export_fp8, export_hf, import_fp8
from infir2.convert.megatron_import import import_megatron
from infir2.convert.verify_weights import verify_weights
