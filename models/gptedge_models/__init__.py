"""The model in PyTorch: definition, configurations, checkpoint readers and the demo model."""

from .checkpoint import CheckpointError, load_checkpoint
from .gpt import CONFIGS, GPTConfig, GPTModel, generate_text_simple

__all__ = ["CONFIGS", "CheckpointError", "GPTConfig", "GPTModel", "generate_text_simple", "load_checkpoint"]
