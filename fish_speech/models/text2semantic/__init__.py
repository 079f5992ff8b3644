"""The language model: text and earlier frames in, semantic codes out."""

from fish_speech.models.text2semantic.checkpoint import load_model, save_model
from fish_speech.models.text2semantic.config import ModelConfig
from fish_speech.models.text2semantic.llama import DualARTransformer

__all__ = ["DualARTransformer", "ModelConfig", "load_model", "save_model"]
