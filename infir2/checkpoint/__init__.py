"""Checkpoints of a run, and weights in and out: Hugging Face in BF16 and FP8, Megatron."""

from infir2.checkpoint.store import Checkpoint, Store, open_checkpoint

__all__ = ["Checkpoint", "Store", "open_checkpoint"]
