"""From files to packed batches: sources, rows, chat template, mixture, packing, loader."""

from infir2.data.chat import ChatTokenizer, load_tokenizer
from infir2.data.loader import Loader, load_prompts, validation_batches
from infir2.data.packing import pack_sequences
from infir2.data.streams import TrainingKind
from infir2.data.types import Batch, Message, Prompt, Sample
