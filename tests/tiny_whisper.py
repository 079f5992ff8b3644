"""A whisper model small enough for tests, which hears one sentence in anything."""

from pathlib import Path

import torch
from whisper.model import ModelDimensions, Whisper
from whisper.tokenizer import get_tokenizer

SENTENCE = "The tide had gone out, and the boats lay on the sand."


def make_whisper(path: Path) -> Path:
    """A whisper model in openai's format that hears `SENTENCE` in anything.

    Its decoder's blocks add nothing, and what it says at a place is written into the embedding of
    that place; the rest of its 3.5 million weights is random.
    """
    sizes = {
        "n_mels": 80, "n_audio_ctx": 1500, "n_audio_state": 64, "n_audio_head": 2,
        "n_audio_layer": 1, "n_vocab": 51865, "n_text_ctx": 64, "n_text_state": 64,
        "n_text_head": 2, "n_text_layer": 1,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    state = Whisper(ModelDimensions(**sizes)).state_dict()
    for name, value in state.items():
        scale = 1.0 if name == "decoder.token_embedding.weight" else 0.1
        value.copy_(scale * torch.randn(value.shape, generator=generator))
        if name.endswith("bias"):
            value.zero_()
        elif "ln" in name:
            value.fill_(1.0)
        elif name.startswith("decoder") and name.endswith(("attn.out.weight", "mlp.2.weight")):
            value.zero_()
    words = get_tokenizer(True, language="en", task="transcribe")
    begin, end = words.timestamp_begin, words.timestamp_begin + round(3.0 / 0.02)
    for place, token in enumerate([begin, *words.encode(f" {SENTENCE}"), end, words.eot], 2):
        embedding = state["decoder.token_embedding.weight"][token]
        state["decoder.positional_embedding"][place] = 10 * embedding
    torch.save({"dims": sizes, "model_state_dict": state}, path)
    return path
