"""The run directory: checkpoints, its lock and its metrics."""

from infir2.checkpoint.reader import Checkpoint, open_checkpoint
from infir2.checkpoint.store import Store
