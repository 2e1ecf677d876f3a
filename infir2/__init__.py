"""InfiR2: train reasoning language models in block-wise FP8, from continual pre-training to reinforcement learning."""

__version__ = "0.1.0"
