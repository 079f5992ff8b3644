"""The embedded model's layout: its tokenizer, its sizes and its first weights."""

from __future__ import annotations

import math

import torch
from torch import nn

from fish_speech.models.text2semantic import DualARTransformer, ModelConfig
from fish_speech.tokenizer import FishTokenizer
from recipes.tiny.batches import BUCKETS
from recipes.tiny.voices import VOICES

# Bytes, because letters align with sounds sooner than long merges; whole words only for the
# prompt that every utterance shares.
_PROMPT_WORDS = ("system", "user", "assistant", "Speak", " out", " the", " provided", " text")


def tiny_tokenizer() -> FishTokenizer:
    """256 bytes, the words of the fixed prompt and the special tokens."""
    ranks = {bytes([value]): value for value in range(256)}
    ranks |= {word.encode(): 256 + index for index, word in enumerate(_PROMPT_WORDS)}
    return FishTokenizer.from_ranks(ranks)


def tiny_config(tokenizer: FishTokenizer) -> ModelConfig:
    """9.6 M parameters, so that the model and its codec fit in 32 MB at half precision."""
    return ModelConfig(
        vocab_size=tokenizer.vocab_size,
        dim=256,
        n_layer=6,
        n_head=4,
        n_local_heads=2,
        head_dim=64,
        intermediate_size=768,
        n_fast_layer=2,
        max_seq_len=2048,
        dropout=0.0,
        # Read by what fills a prompt with context, and by what checks a speaker's name.
        extra={"trained_seq_len": max(BUCKETS), "speakers": list(VOICES)},
    )


def new_model(seed: int) -> DualARTransformer:
    """A random model: deviation 0.02, less where a block writes to the residual stream."""
    generator = torch.Generator().manual_seed(seed)
    model = DualARTransformer(tiny_config(tiny_tokenizer()))
    residual = 0.02 / math.sqrt(2 * model.config.n_layer)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            deviation = residual if name.endswith(("wo.weight", "w2.weight")) else 0.02
            nn.init.normal_(parameter, std=deviation, generator=generator)
    return model
