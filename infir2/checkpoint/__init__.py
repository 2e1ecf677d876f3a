"""The run directory: checkpoints, its lock and its metrics."""

from infir2.checkpoint.store import Checkpoint, Store, open_checkpoint
