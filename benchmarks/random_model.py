"""A model directory of the published size with seeded random weights, made once and kept."""

from __future__ import annotations

from pathlib import Path

from benchmarks.measure import CACHE, in_new_process

_CODEC_FILE = "firefly-gan-vq-fsq-8x1024-21hz-generator.pth"


def full_size_model() -> Path:
    """The four files of the language model, with random weights."""
    directory = CACHE / "full-size"
    if not (directory / "model.pth").exists():  # written last, so the rest is there too
        in_new_process(_make_model, directory)
    return directory


def full_size_model_with_codec() -> Path:
    """The same with a random codec, so that it can speak (noise)."""
    directory = full_size_model()
    if not (directory / _CODEC_FILE).exists():
        in_new_process(_make_codec, directory / _CODEC_FILE)
    return directory


def _make_model(directory: Path) -> None:
    import torch

    from fish_speech.models.text2semantic import DualARTransformer, ModelConfig, save_model
    from fish_speech.tokenizer import CONTROL_TOKENS, FishTokenizer

    config = ModelConfig()
    special = len(CONTROL_TOKENS) + config.codebook_size
    # Every byte, every pair of bytes, and as many triples as it takes.
    tokens = [bytes([i]) for i in range(256)] + [i.to_bytes(2, "big") for i in range(1 << 16)]
    triples = config.vocab_size - special - len(tokens)
    tokens += [i.to_bytes(3, "big") for i in range(triples)]
    tokenizer = FishTokenizer.from_ranks({token: i for i, token in enumerate(tokens)})

    with torch.device("meta"):
        shapes = {key: value.shape for key, value in DualARTransformer(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, shape in shapes.items():
        weight = torch.empty(shape, dtype=torch.bfloat16)
        scales = len(shape) == 1  # the weights of norms lie around one
        state[key] = weight.normal_(1.0 if scales else 0.0, 0.02, generator=generator)
    save_model(state, directory, config=config, tokenizer=tokenizer)


def _make_codec(file: Path) -> None:
    import torch

    from fish_speech.models.vqgan import Codec, CodecConfig
    from fish_speech.models.weights import save_tensors

    torch.manual_seed(0)
    save_tensors(Codec(CodecConfig()).state_dict(), file)
