"""Planted models and a recogniser that takes no time."""

import hashlib

import pytest
import torch

from fish_speech.audio import load_audio
from fish_speech.evaluation.scoring import Scorer
from fish_speech.evaluation.speaker import SpeakerEncoder
from fish_speech.evaluation.synthesis import Candidate
from fish_speech.inference import Piece
from fish_speech.preparation.transcribe import Transcription
from tests.conftest import ROOT

RATE = 16_000
CLIPS = sorted((ROOT / "samples").glob("*.flac"))
STRANGER = ROOT / "checkpoints/speaker/strangers/SLT.ogg"


def text_of(clip):
    return clip.with_suffix(".txt").read_text(encoding="utf-8").strip()


def waveform_of(path):
    return load_audio(path, RATE)[0]


class Planted:
    """A stand-in for a model: `speak(text, seed)` gives its waveform [1, N] or None."""

    sample_rate = RATE
    said = 0

    def __init__(self, speak, runaway=False):
        self.speak, self.runaway = speak, runaway

    def encode_reference(self, audio, text):
        return text

    def pieces(self, text, reference, speaker, settings):
        self.said += 1
        waveform = self.speak(text, settings.seed)
        if waveform is not None:
            yield Piece(waveform, 0, 1, waveform.shape[1] // 160)
        yield Piece(torch.zeros(1, 0), 0, 1, 0, True, ran_on=self.runaway)
        if waveform is None:
            raise ValueError("the model said nothing")


def planted(name, speak, step=None, **more):
    """A candidate that speaks as told, and its model, which counts what it said."""
    model = Planted(speak, **more)
    return Candidate(name, ROOT, name, lambda: model, step), model


class Hearing:
    """Hears the words of the clips that it was told of, and nonsense in everything else."""

    identity = "told"

    def __init__(self):
        self.known = {self._key(waveform_of(clip)[0].numpy()): text_of(clip) for clip in CLIPS}

    def _key(self, samples):
        coarse = (samples[4000:20000:40] * 50).round()  # in spite of 16 bit
        return hashlib.sha256(coarse.astype("int16").tobytes()).hexdigest()

    def transcribe(self, samples):
        return Transcription(self.known.get(self._key(samples), "mumble mumble"))


@pytest.fixture(scope="session")
def scorer():
    return Scorer(Hearing(), SpeakerEncoder.from_pretrained())


@pytest.fixture(scope="session")
def xvector_folder(tmp_path_factory):
    """A WavLM with an x-vector head of 32 numbers, as the hub has them."""
    import torch
    from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMForXVector

    torch.manual_seed(0)
    config = WavLMConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=(16, 16, 16),
        conv_stride=(5, 8, 8),
        conv_kernel=(10, 8, 8),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        tdnn_dim=(32, 32, 32, 32, 64),
        xvector_output_dim=32,
    )
    path = tmp_path_factory.mktemp("encoders") / "small-sv"
    WavLMForXVector(config).save_pretrained(path)
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(path)
    return path
