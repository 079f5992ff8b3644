"""The codec of a model directory: audio to codes and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import remove_parametrizations

from fish_speech.files import read_json
from fish_speech.hub import find_codec
from fish_speech.models.vqgan.firefly import ConvNeXtEncoder, ConvState, HiFiGANHead
from fish_speech.models.vqgan.fsq import DownsampleFiniteScalarQuantizer
from fish_speech.models.vqgan.spectrogram import LogMelSpectrogram
from fish_speech.models.weights import assign_strictly, empty_modules, read_state_dict

CODEC_CONFIG_FILE = "codec_config.json"
_MOST = 1 << 20  # more is a damaged file
DAMAGED = "the codec computes values that are no numbers: its weights are damaged; get it again"


@dataclass
class SpectrogramConfig:
    sample_rate: int = 44100
    n_mels: int = 160
    n_fft: int = 2048
    hop_length: int = 512
    win_length: int = 2048


@dataclass
class EncoderConfig:
    input_channels: int = 160
    depths: tuple[int, ...] = (3, 3, 9, 3)
    dims: tuple[int, ...] = (128, 256, 384, 512)
    kernel_size: int = 7


@dataclass
class HeadConfig:
    num_mels: int = 512
    upsample_initial_channel: int = 512
    upsample_rates: tuple[int, ...] = (8, 8, 2, 2, 2)
    upsample_kernel_sizes: tuple[int, ...] = (16, 16, 4, 4, 4)
    resblock_kernel_sizes: tuple[int, ...] = (3, 7, 11)
    resblock_dilation_sizes: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    pre_conv_kernel_size: int = 13
    post_conv_kernel_size: int = 13


@dataclass
class QuantizerConfig:
    input_dim: int = 512
    n_groups: int = 8
    levels: tuple[int, ...] = (8, 5, 5, 5)
    downsample_factor: tuple[int, ...] = (2, 2)


@dataclass
class CodecConfig:
    """Sizes of a codec, section by section; the defaults are those of the published one."""

    spec_transform: SpectrogramConfig = field(default_factory=SpectrogramConfig)
    backbone: EncoderConfig = field(default_factory=EncoderConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)

    @property
    def frame_length(self) -> int:
        """Samples per frame."""
        return self.spec_transform.hop_length * math.prod(self.quantizer.downsample_factor)

    @property
    def frame_rate(self) -> float:
        """Frames per second."""
        return self.spec_transform.sample_rate / self.frame_length

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> CodecConfig:
        """`codec_config.json` of a model directory; the published sizes where there is none."""
        file = Path(directory) / CODEC_CONFIG_FILE
        if not file.is_file():
            return cls()
        sections = read_json(file)
        try:
            return cls.from_dict(sections)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    @classmethod
    def from_dict(cls, sections: Any) -> CodecConfig:
        """Sizes from sections as `codec_config.json` holds them. Raises `ValueError`."""
        kinds = {f.name: f.default_factory for f in fields(cls)}
        if not isinstance(sections, dict) or set(sections) != set(kinds):
            raise ValueError(f"must have the sections {', '.join(kinds)} and no others")
        config = cls(**{name: _section(name, kinds[name], sections[name]) for name in kinds})
        spec, backbone, head = config.spec_transform, config.backbone, config.head
        for one, other, fits in (
            ("spec_transform.hop_length", "the product of head.upsample_rates",
             spec.hop_length == math.prod(head.upsample_rates)),
            ("spec_transform.n_mels", "backbone.input_channels",
             spec.n_mels == backbone.input_channels),
            ("spec_transform.win_length", "n_fft", spec.win_length <= spec.n_fft),
            ("backbone.depths", "dims", len(backbone.depths) == len(backbone.dims)),
            ("head.upsample_rates", "upsample_kernel_sizes",
             len(head.upsample_rates) == len(head.upsample_kernel_sizes)),
            ("head.resblock_kernel_sizes", "resblock_dilation_sizes",
             len(head.resblock_kernel_sizes) == len(head.resblock_dilation_sizes)),
        ):  # fmt: skip
            if not fits:
                raise ValueError(f"{one} does not fit {other}")
        return config


def _section(name: str, kind: Any, values: Any) -> Any:
    """Fields that only upstream's training reads (drop_path_rate ...) are left out."""
    if not isinstance(values, dict):
        raise ValueError(f"{name} is {values!r}, not a section of sizes")
    known = [f for f in fields(kind) if f.name in values]
    for f in known:
        if not _is_like(f.default, values[f.name]):
            what = "a size" if f.type == "int" else "a list"
            raise ValueError(f"{name}.{f.name} is {values[f.name]!r}, not {what} as {f.default}")
    return kind(**{f.name: values[f.name] for f in known})


def _is_like(default: Any, value: Any) -> bool:
    """Whether a value is a whole number that can be a size, or a list of such, as the default."""
    if isinstance(default, tuple):
        like = isinstance(value, list | tuple) and len(value) > 0
        return like and all(_is_like(default[0], item) for item in value)
    return type(value) is int and 1 <= value <= _MOST


class Codec(nn.Module):
    """Firefly-GAN with grouped finite scalar quantization, causal throughout."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        self.spec_transform = LogMelSpectrogram(**asdict(config.spec_transform))
        self.backbone = ConvNeXtEncoder(**asdict(config.backbone))
        self.quantizer = DownsampleFiniteScalarQuantizer(**asdict(config.quantizer))
        self.head = HiFiGANHead(**asdict(config.head))
        self.sample_rate = config.spec_transform.sample_rate
        self.num_codebooks = config.quantizer.n_groups
        self.codebook_size = math.prod(config.quantizer.levels)
        self._mels_per_frame = math.prod(config.quantizer.downsample_factor)
        self.frame_length, self.frame_rate = config.frame_length, config.frame_rate

    @property
    def device(self) -> torch.device:
        return self.quantizer.residual_fsq.rvqs[0].project_in.weight.device

    @torch.no_grad()
    def encode(self, waveforms: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """waveforms [B, 1, N] (at `sample_rate`, `lengths [B]` samples of each) to codes.

        Returns codes [B, K, T] (int64) and their lengths [B]: whole frames only. Raises
        `ValueError` where damaged weights give no numbers.
        """
        if lengths is None:
            lengths = torch.full((len(waveforms),), waveforms.shape[-1])
        lengths = lengths.to(waveforms.device)
        mel_lengths = lengths // self.config.spec_transform.hop_length
        mels = self.spec_transform(waveforms, lengths)
        mask = length_mask(mel_lengths, mels.shape[-1])
        mels = channels_last(mels * mask)
        features = self.backbone(mels) * mask
        codes = self.quantizer.encode(features)
        if (codes < 0).any():
            raise ValueError(DAMAGED)
        return codes, mel_lengths // self._mels_per_frame

    def encode_batch(self, waveforms: Sequence[Tensor]) -> list[Tensor]:
        """waveforms [1, N] of any lengths (at `sample_rate`) to codes [K, T] (int64) of each.

        They are padded to the longest and encoded together. Whole frames only, on the CPU.
        """
        lengths = torch.tensor([waveform.shape[1] for waveform in waveforms])
        padded = torch.zeros(len(waveforms), 1, int(lengths.max()))
        for row, waveform in zip(padded, waveforms, strict=True):
            row[:, : waveform.shape[1]] = waveform
        codes, code_lengths = self.encode(padded.to(self.device), lengths)
        codes = codes.cpu()
        return [row[:, :n] for row, n in zip(codes, code_lengths.tolist(), strict=True)]

    @torch.no_grad()
    def decode(
        self,
        codes: Tensor,
        code_lengths: Tensor | None = None,
        *,
        state: ConvState | None = None,
    ) -> tuple[Tensor, Tensor]:
        """codes [B, K, T] (`code_lengths [B]` frames of each) to waveforms.

        Returns waveforms [B, 1, T * frame_length] (float32) and their lengths [B] in samples. With
        a `state` (and no lengths) the codes continue those of the call before with the same one.
        """
        if code_lengths is None:
            code_lengths = torch.full((len(codes),), codes.shape[-1])
        code_lengths = code_lengths.to(codes.device)
        features = self.quantizer.decode(codes.long(), state)
        mask = length_mask(code_lengths * self._mels_per_frame, features.shape[-1])
        waveforms = self.head(channels_last(features * mask), state)
        lengths = code_lengths * self.frame_length
        return waveforms * length_mask(lengths, waveforms.shape[-1]), lengths


def channels_last(x: Tensor) -> Tensor:
    """x [B, C, T] in channels-last memory format: a frame's channels side by side."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def length_mask(lengths: Tensor, size: int) -> Tensor:
    """lengths [B] -> bool [B, 1, size], True before each length."""
    return (torch.arange(size, device=lengths.device) < lengths[:, None])[:, None]


def load_codec(
    model_dir: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Codec:
    """Load the codec of a model directory strictly, in eval mode, its weight norm folded.

    `dtype` is that of the decoder's convolutions but the last, nearly all of its work. The encoder
    and the waveform are float32 always: codes must be exact, and rounded samples would hiss.

    Raises `FileNotFoundError` or `ValueError` that names file, key and both shapes.
    """
    file = find_codec(model_dir)
    with empty_modules():
        codec = Codec(CodecConfig.from_pretrained(model_dir))
    assign_strictly(codec, read_state_dict(file, prefixes=("generator.",)), file)
    for module in codec.head.modules():
        if hasattr(module, "parametrizations"):
            remove_parametrizations(module, "weight")
    codec.to(device=device, dtype=torch.float32)
    codec.head.to(dtype).conv_post.float()
    if codec.device.type == "cpu":  # where every call would copy weights in another order
        for module in codec.modules():
            if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
                module.weight.data = channels_last(module.weight.data)
    return codec.eval().requires_grad_(False)
