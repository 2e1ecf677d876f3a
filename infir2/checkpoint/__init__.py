"""Checkpoints of a run, and weights in and out: Hugging Face in BF16 and FP8; Megatron's formats in modules of their own."""

from infir2.checkpoint.store import Checkpoint, Store, open_checkpoint
from infir2.convert.export import export_fp8, export_hf, import_fp8
from infir2.convert.verify_weights import verify_weights
