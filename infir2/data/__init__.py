"""Floor 2: files to packed batches. Sources, rows, mixture, chat template, packing, loader, and the demo's small world."""

from infir2.data.chat import ChatTokenizer, load_tokenizer
from infir2.data.loader import Loader, load_prompts, validation_batches
from infir2.data.packing import pack_sequences
from infir2.data.streams import TrainingKind
from infir2.data.types import Batch, Message, Prompt, Sample
