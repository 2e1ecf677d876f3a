"""Checkpoints of a run, and weights in and out: Hugging Face in BF16 and FP8, Megatron."""

from pathlib import Path

from infir2.checkpoint.export import export_fp8, export_hf, import_fp8
from infir2.checkpoint.store import Checkpoint, Store, open_checkpoint
from infir2.checkpoint.verify import verify_weights

__all__ = [
    "Checkpoint",
    "Store",
    "export_fp8",
    "export_hf",
    "export_megatron",
    "import_fp8",
    "import_hf",
    "import_megatron",
    "open_checkpoint",
    "verify_weights",
]


def import_megatron(src: str | Path, out: str | Path, like: str | Path | None = None) -> None:
    """Write a Megatron-core checkpoint as a Hugging Face directory; see `infir2.checkpoint.megatron`."""
    from infir2.checkpoint import megatron  # torch.distributed.checkpoint takes 0.6 s to import

    megatron.import_megatron(src, out, like)


def export_megatron(src: str | Path, out: str | Path) -> None:
    """Write weights as a Megatron-core checkpoint; see `infir2.checkpoint.megatron_export`."""
    from infir2.checkpoint import megatron_export

    megatron_export.export_megatron(src, out)


def import_hf(src: str | Path, out: str | Path) -> None:
    """Write what transformers can load as a Hugging Face directory; see `infir2.checkpoint.hf_import`."""
    from infir2.checkpoint import hf_import  # transformers' model classes take seconds to import

    hf_import.import_hf(src, out)
