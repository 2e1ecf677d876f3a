"""The checkpoints of a run directory."""

from infir2.checkpoint.store import Checkpoint, Store, open_checkpoint
