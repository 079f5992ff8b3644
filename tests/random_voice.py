"""A whole model directory with random weights, small enough to be built and used in no time."""

from dataclasses import asdict
from pathlib import Path

import torch

from fish_speech.files import write_json
from fish_speech.models.text2semantic import DualARTransformer, ModelConfig, save_model
from fish_speech.models.vqgan import Codec, CodecConfig
from fish_speech.models.vqgan.codec import (
    EncoderConfig,
    HeadConfig,
    QuantizerConfig,
    SpectrogramConfig,
)
from fish_speech.tokenizer import FishTokenizer

CODEC_FILE = "firefly-gan-vq-random.pth"


def make_voice(directory: Path, max_seq_len: int = 2048, **extra) -> Path:
    """Write it: 8 kHz, 31.25 frames/s, 8 codebooks, a token a byte; `extra` goes to config.json."""
    tokenizer = FishTokenizer.from_ranks({bytes([value]): value for value in range(256)})
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        dim=32,
        n_layer=2,
        n_head=2,
        n_local_heads=1,
        head_dim=16,
        intermediate_size=64,
        n_fast_layer=1,
        max_seq_len=max_seq_len,
        extra=extra,
    )
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model, codec = DualARTransformer(config), Codec(_codec_config())
    save_model(
        model.state_dict(), directory, config=config, tokenizer=tokenizer, dtype=torch.float32
    )
    torch.save(codec.state_dict(), directory / CODEC_FILE)
    write_json(directory / "codec_config.json", asdict(codec.config))
    return directory


def _codec_config() -> CodecConfig:
    return CodecConfig(
        SpectrogramConfig(sample_rate=8000, n_mels=20, n_fft=256, hop_length=64, win_length=256),
        EncoderConfig(input_channels=20, depths=(1, 1), dims=(16, 16)),
        HeadConfig(
            num_mels=16,
            upsample_initial_channel=16,
            upsample_rates=(8, 8),
            upsample_kernel_sizes=(16, 16),
            resblock_kernel_sizes=(3, 5),
            resblock_dilation_sizes=((1, 3), (1, 3)),
        ),
        QuantizerConfig(input_dim=16),
    )
