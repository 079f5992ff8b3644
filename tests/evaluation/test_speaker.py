"""The speaker encoder: upstream's numbers, and voices told apart."""

import numpy as np
import pytest

from fish_speech.audio import load_audio
from fish_speech.evaluation.speaker import SAMPLE_RATE, SpeakerEncoder, similarity, stranger_clips
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def encoder():
    return SpeakerEncoder.from_pretrained()


def load(path):
    return load_audio(path, SAMPLE_RATE)[0][0].numpy()


def test_it_computes_what_resemblyzer_computes(encoder):
    """The eight largest numbers that Resemblyzer 0.1.4 gives for a wave made here, levelled."""
    time = np.arange(40_000) / SAMPLE_RATE
    wave = sum(np.sin(2 * np.pi * 120 * k * time + k) / k for k in range(1, 20))
    wave = (0.3 * wave * (0.6 + 0.4 * np.sin(9 * time))).astype(np.float32)
    vector = encoder.embed(wave)
    expected = [0.2141, 0.2017, 0.1979, 0.1957, 0.1685, 0.1665, 0.1616, 0.1599]
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(vector[[246, 189, 146, 248, 164, 82, 180, 111]], expected, atol=1e-3)


def test_a_voice_is_more_like_itself_than_like_strangers(encoder):
    own = [encoder.embed(load(ROOT / f"samples/rms_00{number}.flac")) for number in range(1, 5)]
    strangers = [encoder.embed(load(file)) for file in stranger_clips()]
    assert len(strangers) == 3
    within = min(similarity(a, b) for a in own for b in own)
    across = max(similarity(a, b) for a in own for b in strangers)
    assert within > across + 0.05


def test_level_is_no_matter_and_silence_has_no_voice(encoder):
    wave = load(ROOT / "samples/rms_001.flac")
    assert similarity(encoder.embed(wave), encoder.embed(wave * 0.01)) > 0.99
    assert encoder.embed(np.zeros(16_000, np.float32)) is None
    assert encoder.embed(np.zeros(0, np.float32)) is None
    assert encoder.embed(wave[4000:4400]) is not None  # shorter than one part


def test_a_missing_file_is_named_with_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match="git checkout"):
        SpeakerEncoder.from_pretrained(tmp_path / "encoder.pth")
