"""Weights in and out: Hugging Face (BF16, FP8), Megatron, and what transformers loads."""

from infir2.convert.fp8 import export_fp8, import_fp8
from infir2.convert.hf import export_hf
from infir2.convert.megatron_export import export_megatron
from infir2.convert.megatron_import import import_megatron
from infir2.convert.transformers_import import import_hf
from infir2.convert.verify_weights import verify_weights
