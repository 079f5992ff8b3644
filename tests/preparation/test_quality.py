"""The figures of a clip say what is wrong with it, and nothing where nothing is."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import soundfile

from fish_speech.preparation import quality
from fish_speech.preparation.options import Thresholds
from fish_speech.preparation.pipeline import prepare
from fish_speech.preparation.segment import Segment, find_speech

GOOD = {
    "file": "me/a_0001.wav", "speaker": "me", "text": "Twenty letters or so.", "duration": 3.0,
    "speech_share": 0.9, "snr": 40.0, "clipping": 0.0, "edge_start": -60.0, "edge_end": -60.0,
}  # fmt: skip


def measured(path, samples, start=0.0, end=None):
    soundfile.write(path, samples, 16_000, "FLOAT")
    speech = find_speech(path)
    part = Segment(start, end or speech.duration)
    cut = samples[round(part.start * 16_000) : round(part.end * 16_000)]
    return quality.measure(cut, 16_000, part, speech, floating=False)


@pytest.mark.parametrize("snr", [10, 20, 30])
def test_snr_is_estimated(tmp_path, utterances, snr):
    voice = np.pad(utterances[0].samples, 8000)
    power = float(np.square(utterances[0].samples).mean())
    noise = np.random.default_rng(0).normal(0, np.sqrt(power / 10 ** (snr / 10)), len(voice))
    figures = measured(tmp_path / "a.wav", (voice + noise).astype(np.float32))
    assert figures["snr"] == pytest.approx(snr, abs=3)


def test_clean_speech_has_good_figures(tmp_path, utterances):
    figures = measured(tmp_path / "a.wav", utterances[0].samples)
    clip = {**GOOD, **figures, "text": utterances[0].text}
    assert quality.with_flags(clip, Thresholds(), 1.0)["flags"] == []


def test_a_word_cut_off_shows_at_the_edge(tmp_path, utterances):
    samples = utterances[0].samples
    middle = 2000 + int(np.argmax(np.abs(samples[2000:-2000])))
    figures = measured(tmp_path / "a.wav", samples, end=middle / 16_000)
    assert figures["edge_end"] > -10
    assert figures["edge_start"] < -30


@pytest.mark.parametrize(("offset", "noise"), [(0.02, 0.0), (-0.1, 0.0), (0.0, 0.008)])
def test_neither_an_offset_nor_noise_is_taken_for_a_word_cut_off(
    tmp_path, utterances, offset, noise
):
    voice = np.pad(0.5 * utterances[0].samples, 8000)
    hiss = np.random.default_rng(0).normal(offset, noise, len(voice))
    samples = (voice + hiss).astype(np.float32)
    figures = measured(tmp_path / "a.wav", samples)
    assert figures["snr"] < 20 or not noise, "its noise is to be above the limit of an edge"
    clip = {**GOOD, **figures, "text": utterances[0].text}
    assert quality.with_flags(clip, Thresholds(), 1.0)["flags"] == []
    loudest = 8000 + int(np.argmax(np.abs(voice[8000:-8000])))
    cut = measured(tmp_path / "a.wav", samples, end=loudest / 16_000)
    assert "clipped_end" in quality.with_flags({**clip, **cut}, Thresholds(), 1.0)["flags"]


def test_clipping_is_counted_wherever_the_ceiling_is(tmp_path, utterances):
    loud = np.clip(20 * utterances[0].samples, -1, 1)
    for gain in (1.0, 0.5):
        for floating in (False, True):
            assert quality.clipping(gain * loud, floating=floating) > 0.05
    assert quality.clipping(utterances[0].samples, floating=False) == 0
    assert quality.clipping(np.zeros(100, np.float32), floating=False) == 0


def test_floats_above_full_scale_are_not_clipped_and_lossy_ones_are(folder, options, utterances):
    source, voice = folder(2), utterances[0].samples / np.abs(utterances[0].samples).max()
    soundfile.write(source / "take 0.wav", 1.5 * voice, 16_000, "FLOAT")
    (source / "take 1.wav").unlink()
    soundfile.write(source / "take 1.ogg", np.clip(3 * voice, -1, 1), 16_000)
    floating, lossy = prepare(replace(options, input=str(source))).clips
    assert floating["peak"] > 3
    assert "clipping" not in floating["flags"]
    assert "clipping" in lossy["flags"]


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({}, None),
        ({"duration": 0.5}, "too_short"),
        ({"duration": 31.0, "text": "x" * 300}, "too_long"),
        ({"speech_share": 0.2}, "little_speech"),
        ({"snr": 5.0}, "noisy"),
        ({"clipping": 0.01}, "clipping"),
        ({"edge_start": -3.0}, "clipped_start"),
        ({"edge_end": -3.0}, "clipped_end"),
        ({"cut_in_speech": True}, "cut_in_speech"),
        ({"text": "Ah."}, "slow_text"),
        ({"text": "x" * 200}, "fast_text"),
        ({"disagreement": 0.5}, "disagreement"),
        ({"no_speech": 0.85}, "doubted"),
        ({"unheard": 2.5}, "unheard"),
        ({"text": "555 0199 2233.", "duration": 5.0}, None),
        ({"text": "我們明天去海邊。"}, None),
    ],
)
def test_flags(change, flag):
    flags = quality.with_flags({**GOOD, **change}, Thresholds(), 1.0)["flags"]
    assert flag in flags if flag else not flags


def test_thresholds_are_the_users():
    strict = replace(Thresholds(), min_snr=50)
    assert quality.with_flags(GOOD, strict, 1.0)["flags"] == ["noisy"]


def test_a_second_take_of_the_same_is_a_near_duplicate_and_another_sentence_is_not(utterances):
    noise = np.random.default_rng(0).normal(0, 0.003, 10**6).astype(np.float32)
    clips = []
    for utterance in utterances:
        for gain in (1.0, 0.4):
            samples = gain * utterance.samples + noise[: len(utterance.samples)] * (gain - 0.4)
            shape = quality.spectral_fingerprint(samples, 16_000)
            clips.append({**GOOD, "shape": shape, "duration": round(utterance.duration, 3)})
    duplicates = quality.near_duplicates(clips)
    assert duplicates == {index: index - 1 for index in range(1, len(clips), 2)}
    other = [{**clip, "speaker": str(index)} for index, clip in enumerate(clips)]
    assert quality.near_duplicates(other) == {}
    marked = quality.mark_near_duplicates(
        [{**clip, "file": "x", "flags": []} for clip in clips[:2]]
    )
    assert marked[1]["flags"] == ["near_duplicate"]
    assert marked[1]["duplicate_of"] == "x"
    assert "shape" not in marked[0]


def test_the_duplicate_that_stays_is_one_without_flags(utterances):
    shape = quality.spectral_fingerprint(utterances[0].samples, 16_000)
    clips = [
        {**GOOD, "file": name, "shape": shape, "flags": flags}
        for name, flags in (("bad", ["noisy"]), ("good", []), ("copy", []))
    ]
    marked = quality.mark_near_duplicates(clips)
    assert [clip.get("duplicate_of") for clip in marked] == [None, None, "good"]


def random_clips(count: int, speakers: int) -> list[dict]:
    """Entries of clips, half of them like another one."""
    rng, clips = np.random.default_rng(0), []
    for _ in range(count):
        levels, duration = rng.normal(0, 30, 128), rng.uniform(2, 12)
        if clips and rng.random() < 0.5:
            other = clips[rng.integers(len(clips))]
            levels = np.frombuffer(bytes.fromhex(other["shape"]), np.int8) + rng.normal(0, 7, 128)
            duration = other["duration"] * rng.uniform(0.96, 1.04)
        shape = levels.round().clip(-127, 127).astype(np.int8).tobytes().hex()
        flags = ["noisy"] if rng.random() < 0.1 else []
        speaker = f"speaker {rng.integers(speakers)}"
        clips.append({"shape": shape, "duration": duration, "speaker": speaker, "flags": flags})
    return clips


def test_near_duplicates_are_those_that_comparing_all_with_all_finds():
    clips = random_clips(400, 2)
    shapes = [np.frombuffer(bytes.fromhex(clip["shape"]), np.int8) for clip in clips]
    shapes = [shape / np.linalg.norm(shape.astype(float)) for shape in shapes]
    duplicates = {}
    for index, clip in enumerate(clips):
        for earlier, other in enumerate(clips[:index]):
            close = abs(other["duration"] - clip["duration"]) < 0.03 * clip["duration"]
            fit = earlier not in duplicates and not other["flags"]
            same = other["speaker"] == clip["speaker"] and shapes[earlier] @ shapes[index] > 0.97
            if close and fit and same:
                duplicates[index] = earlier
                break
    assert len(duplicates) > 20
    assert quality.near_duplicates(clips) == duplicates


def test_near_duplicates_of_many_speakers_are_found_soon():
    clips = random_clips(1_000, 100) * 10
    begun = time.process_time()
    assert len(quality.near_duplicates(clips)) > 8_000
    assert time.process_time() - begun < 0.5
