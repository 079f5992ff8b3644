"""Stage 2: train the codec from nothing on speech of the training sentences.

Reconstruction only: log-mel distance at four scales, harmonics of low voices, and a little linear
spectrum. A stopped run goes on from its last checkpoint; at the end the codec is written as a model
directory holds it. `--start DIR` goes on from the codec of a model directory, and `--keep-encoder`
trains its decoder alone: the codes, and what a transformer has learned of them, stay as they are.
"""

from __future__ import annotations

import argparse
import math
import os
import random
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fish_speech.devices import has_native_bf16
from fish_speech.files import write_json
from fish_speech.models.vqgan.codec import CODEC_CONFIG_FILE, Codec, CodecConfig, find_codec
from fish_speech.models.vqgan.firefly import ConvNeXtBlock
from fish_speech.models.vqgan.spectrogram import LogMelSpectrogram
from fish_speech.models.weights import read_checkpoint, read_state_dict, save_tensors
from fish_speech.resources import tune_malloc
from recipes.tiny.texts import CACHE, read_sentences
from recipes.tiny.voices import SAMPLE_RATE, STRANGERS, VOICES, disguise, speak, unnamed_speaker

CHECKPOINT = "codec.ckpt"
CODEC_FILE = "firefly-gan-vq-fsq-8x1000-20hz-generator.pth"
LEARNING_RATE = 4e-4
LAYER_SCALE = 0.1  # the published 1e-6 would take a long training to grow
SCALES = ((2048, 80), (1024, 80), (512, 60), (256, 40))  # n_fft and mels of the loss
HARMONICS_BELOW, HARMONICS_WEIGHT = 1500.0, 0.2  # Hz
WARMUP_STEPS = 100
DISGUISED = 0.4  # of the crops
ENCODER_DELAY, ENCODER_RAMP = 100, 300  # steps
CONFIG = {
    "spec_transform": {
        "sample_rate": SAMPLE_RATE,
        "n_mels": 80,
        "n_fft": 1024,
        "hop_length": 200,
        "win_length": 1024,
    },
    "backbone": {
        "input_channels": 80,
        "depths": [2, 2, 4, 2],
        "dims": [96, 128, 160, 192],
        "kernel_size": 7,
    },
    "head": {
        "num_mels": 192,
        "upsample_initial_channel": 256,
        "upsample_rates": [5, 5, 4, 2],
        "upsample_kernel_sizes": [10, 10, 8, 4],
        "resblock_kernel_sizes": [3, 7],
        "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5]],
        "pre_conv_kernel_size": 7,
        "post_conv_kernel_size": 7,
    },
    "quantizer": {
        "input_dim": 192,
        "n_groups": 8,
        "levels": [8, 5, 5, 5],
        "downsample_factor": [2, 2],
    },
}


def codec_to_train(directory: Path) -> Codec:
    """The codec of a model directory with its weight norm, in fp32."""
    codec = Codec(CodecConfig.from_pretrained(directory))
    state = read_state_dict(find_codec(directory), prefixes=())
    codec.load_state_dict({key: value.float() for key, value in state.items()})
    return codec


def new_codec(speech: Tensor, seed: int) -> Codec:
    """A random codec whose quantizer does not collapse, fitted to speech [B, 1, N].

    Without the centred first convolution and the whitened projections, a run ends with a single
    code within 20 steps.
    """
    torch.manual_seed(seed)
    codec = Codec(CodecConfig.from_dict(CONFIG))
    for module in codec.modules():
        if isinstance(module, ConvNeXtBlock):
            nn.init.constant_(module.gamma, LAYER_SCALE)
    with torch.no_grad():
        mels = codec.spec_transform(speech)  # [B, M, T]
        stem = codec.backbone.downsample_layers[0][0].conv
        mean = mels.mean((0, 2))
        stem.bias.copy_(-torch.einsum("omk,m->o", stem.weight, mean))
        rvqs = codec.quantizer.residual_fsq.rvqs
        features = codec.quantizer.downsample(codec.backbone(mels)).transpose(1, 2)
        for rvq, group in zip(rvqs, features.chunk(len(rvqs), -1), strict=True):
            group = group.flatten(0, 1)
            centre = group.mean(0)
            values, vectors = torch.linalg.eigh(torch.cov(group.T))
            size = rvq.project_in.out_features
            whitening = vectors[:, -size:] / values[-size:].clamp(min=1e-8).sqrt()
            rvq.project_in.weight.copy_(0.9 * whitening.T)
            rvq.project_in.bias.copy_(-rvq.project_in.weight @ centre)
    return codec


class SpectralLoss(nn.Module):
    """Mean absolute distance of log-mels at four scales, of the low log magnitudes of long windows
    (mels blur the harmonics of a low voice), and of linear magnitudes."""

    def __init__(self) -> None:
        super().__init__()
        self.mels = nn.ModuleList(
            LogMelSpectrogram(SAMPLE_RATE, n_mels, n_fft, n_fft // 4, n_fft)
            for n_fft, n_mels in SCALES
        )

    def forward(self, made: Tensor, target: Tensor) -> Tensor:  # [B, 1, N] each
        mels = torch.stack([F.l1_loss(mel(made), mel(target)) for mel in self.mels]).mean()
        low = round(HARMONICS_BELOW / SAMPLE_RATE * 2048)
        harmonics = F.l1_loss(
            _magnitudes(made, 2048)[:, :low].log(), _magnitudes(target, 2048)[:, :low].log()
        )
        linear = F.l1_loss(_magnitudes(made, 1024), _magnitudes(target, 1024))
        return mels + HARMONICS_WEIGHT * harmonics + 0.1 * linear


def _magnitudes(waveforms: Tensor, n_fft: int) -> Tensor:
    """[B, 1, N] to [B, n_fft / 2 + 1, T]."""
    window = torch.hann_window(n_fft, device=waveforms.device)
    spectrum = torch.stft(waveforms[:, 0], n_fft, 256, window=window, return_complex=True)
    return (torch.view_as_real(spectrum).square().sum(-1) + 1e-6).sqrt()


class Trainer:
    """Codec, its optimizer, and what holds the values before quantization in their range."""

    def __init__(self, codec: Codec, steps: int, *, keep_encoder: bool = False) -> None:
        self.codec, self.steps, self.step = codec, steps, 0
        self.distance = SpectralLoss()
        encoder = [*codec.backbone.parameters(), *codec.quantizer.downsample.parameters()]
        projections = [rvq.project_in for rvq in codec.quantizer.residual_fsq.rvqs]
        encoder += [parameter for module in projections for parameter in module.parameters()]
        for parameter in encoder:
            parameter.requires_grad_(not keep_encoder)
        chosen = {id(parameter) for parameter in encoder}
        decoder = [p for p in codec.parameters() if id(p) not in chosen]
        self.optimizer = torch.optim.AdamW(
            [{"params": decoder}, {"params": encoder}], lr=LEARNING_RATE, betas=(0.8, 0.99)
        )
        self._values: list[Tensor] = []
        for module in projections:
            module.register_forward_hook(lambda _m, _i, output: self._values.append(output))

    def update(self, speech: Tensor) -> tuple[float, float]:
        """One step on speech [B, 1, N]; returns the spectral distance and the penalty."""
        decay = 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
        decay *= min(1.0, (self.step + 1) / WARMUP_STEPS)
        ramp = min(1.0, max(0.0, (self.step - ENCODER_DELAY) / ENCODER_RAMP))
        decoder, encoder = self.optimizer.param_groups
        decoder["lr"] = LEARNING_RATE * decay
        encoder["lr"] = 0.5 * decoder["lr"] * ramp
        self._values.clear()
        features = self.codec.backbone(self.codec.spec_transform(speech))
        quantized, _ = self.codec.quantizer(features)
        # The codes are made in fp32, as they will always be.
        native = has_native_bf16(speech.device)
        with torch.autocast(speech.device.type, torch.bfloat16, enabled=native):
            made = self.codec.head(quantized).float()[..., : speech.shape[-1]]
        values = torch.stack(self._values)  # [G, B, T, 4]
        penalty = values.mean((1, 2)).square().mean()
        penalty = penalty + (values.flatten(1, 2).std(1) - 0.9).square().mean()
        distance = self.distance(made, speech)
        self.optimizer.zero_grad()
        (distance + penalty).backward()
        nn.utils.clip_grad_norm_(self.codec.parameters(), 10.0)
        self.optimizer.step()
        self.step += 1
        return distance.item(), penalty.item()


def load_speech(texts: list[str]) -> list[np.ndarray]:
    """Every text in every named voice, an unnamed one and by two strangers, as waveforms [N]."""
    strangers = cycle(STRANGERS)
    jobs = [
        (text, speaker)
        for number, text in enumerate(texts)
        for speaker in (*VOICES, unnamed_speaker(number), next(strangers), next(strangers))
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        spoken = pool.map(lambda job: speak(*job), jobs)
        return list(tqdm(spoken, total=len(jobs), disable=None))


def crops(speech: list[np.ndarray], count: int, size: int, generator: random.Random) -> Tensor:
    """Random stretches of the speech, the last ones in other voices: [count, 1, size]."""
    rows, plain = [], round((1 - DISGUISED) * count)
    for number, waveform in enumerate(generator.choices(speech, k=count)):
        begin = generator.randrange(max(1, len(waveform) - size))
        row = waveform[begin : begin + 2 * size]
        if number >= plain:
            row = disguise(row, generator)
        rows.append(np.pad(row[:size], (0, max(0, size - len(row)))))
    return torch.from_numpy(np.stack(rows))[:, None]


def save(trainer: Trainer, path: Path) -> None:
    """Everything that a resumed run needs."""
    state = {
        "codec": trainer.codec.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "step": trainer.step,
    }
    save_tensors(state, path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the texts")
    parser.add_argument("--output", type=Path, default=CACHE / "codec", help="model directory")
    parser.add_argument("--start", type=Path, help="model directory whose codec to train on")
    parser.add_argument("--keep-encoder", action="store_true", help="train the decoder alone")
    parser.add_argument("--steps", type=int, default=16000)
    parser.add_argument("--sentences", type=int, default=2000, help="each in six voices")
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=0.8, help="length of a crop")
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    tune_malloc()
    texts = read_sentences("train.txt", args.cache)
    speech, size = load_speech(texts[: args.sentences]), round(args.seconds * SAMPLE_RATE)
    if args.start:
        codec = codec_to_train(args.start)
    else:
        codec = new_codec(crops(speech, 64, size, random.Random(args.seed)), args.seed)
    trainer = Trainer(codec.to(args.device), args.steps, keep_encoder=args.keep_encoder)
    checkpoint = args.cache / CHECKPOINT
    if checkpoint.exists():
        state = read_checkpoint(checkpoint, mapped=False)
        codec.load_state_dict(state["codec"])
        trainer.optimizer.load_state_dict(state["optimizer"])
        trainer.step = state["step"]
    bar = tqdm(total=args.steps, initial=trainer.step, unit="step", disable=None)
    while trainer.step < args.steps:
        # Seeded by the step, so that a resumed run hears what an unbroken one would have heard.
        generator = random.Random(f"{args.seed} {trainer.step}")
        batch = crops(speech, args.batch_size, size, generator).to(args.device)
        distance, penalty = trainer.update(batch)
        bar.update()
        bar.set_postfix_str(f"distance {distance:.3f}, penalty {penalty:.3f}", refresh=False)
        if trainer.step % args.save_every == 0 or trainer.step == args.steps:
            save(trainer, checkpoint)
    write_json(args.output / CODEC_CONFIG_FILE, CONFIG)
    save_tensors(codec.state_dict(), args.output / CODEC_FILE)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
