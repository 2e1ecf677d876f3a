"""One decoder for Qwen2/2.5, Qwen3 and Llama, and its Hugging Face files."""

from infir2.model.config import ModelConfig
from infir2.model.decoder import Decoder
from infir2.model.files import HfWeights, write_hf
from infir2.model.hf import exported_weights
from infir2.model.kv_cache import KvCache
