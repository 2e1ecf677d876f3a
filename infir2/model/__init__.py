"""One decoder for Qwen2/2.5, Qwen3 and Llama, and its Hugging Face files."""

from infir2.model.config import ModelConfig
from infir2.model.decoder import Decoder
from infir2.model.hf_names import exported_weights
from infir2.model.safetensors_io import HfWeights, write_hf
