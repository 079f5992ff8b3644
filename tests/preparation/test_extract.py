import json
import os
import shutil

import numpy as np
import pytest
import soundfile
import torch

from fish_speech.audio import load_audio
from fish_speech.files import file_digest
from fish_speech.models.vqgan import Codec, find_codec, load_codec
from fish_speech.preparation.extract import codecs_of_codes, extract_codes


@pytest.fixture
def data(tmp_path):
    """Five clips of noise, of different lengths and rates."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "voice" / "Ann"
    folder.mkdir(parents=True)
    for number in range(5):
        samples = rng.normal(0, 0.1, 8000 + 3000 * number)
        soundfile.write(folder / f"c{number}.wav", samples, 22050 if number % 2 else 44100)
        (folder / f"c{number}.lab").write_text("words")
    return tmp_path / "voice"


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (4, 0), (2, 1)])
def test_every_clip_gets_the_codes_that_it_has_alone(data, codec, codec_dir, batch_size, workers):
    result = extract_codes(data, codec, codec_dir, batch_size=batch_size, num_workers=workers)
    assert (result.made, result.kept, result.failed) == (5, 0, {})
    for file in sorted(data.rglob("*.wav")):
        codes = np.load(file.with_suffix(".npy"))
        waveform, _ = load_audio(file, codec.sample_rate)
        alone, lengths = codec.encode(waveform[None])
        assert codes.shape == (8, waveform.shape[1] // 2048) == (8, lengths[0])
        assert np.array_equal(codes, alone[0, :, : lengths[0]].numpy())


def test_a_second_run_makes_only_what_is_missing_or_stale(data, codec, codec_dir):
    extract_codes(data, codec, codec_dir)
    assert extract_codes(data, codec, codec_dir).kept == 5
    (data / "Ann" / "c0.npy").unlink()
    soundfile.write(data / "Ann" / "c1.wav", np.zeros(9000), 44100)
    os.utime(data / "Ann" / "c1.wav", ns=(1, 1))
    result = extract_codes(data, codec, codec_dir)
    assert (result.made, result.kept) == (2, 3)


@pytest.mark.parametrize("change", [{"codec": []}, {"clips": 5}, 7, [1, 2], [None], "stamp"])
def test_where_the_record_is_damaged_codes_are_made_again(data, codec, codec_dir, change):
    extract_codes(data, codec, codec_dir)
    record = json.loads((data / "codes.json").read_text())
    if isinstance(change, dict):
        record |= change
    else:
        record["clips"] = dict.fromkeys(record["clips"], change)
    (data / "codes.json").write_text(json.dumps(record))
    assert not codecs_of_codes(data) - {file_digest(find_codec(codec_dir))}
    result = extract_codes(data, codec, codec_dir)
    assert result.failed == {}
    assert result.made + result.kept == 5
    assert extract_codes(data, codec, codec_dir).kept == 5


def test_a_copied_data_set_keeps_its_codes(data, codec, codec_dir, tmp_path):
    extract_codes(data, codec, codec_dir)
    copied = shutil.copytree(data, tmp_path / "copy", copy_function=shutil.copyfile)
    for file in copied.rglob("*.wav"):
        os.utime(file, ns=(1, 1))
    for _ in range(2):
        assert extract_codes(copied, codec, codec_dir).kept == 5
    samples, rate = soundfile.read(copied / "Ann" / "c0.wav")
    soundfile.write(copied / "Ann" / "c0.wav", -samples, rate)  # as long as before
    os.utime(copied / "Ann" / "c0.wav", ns=(2, 2))
    assert extract_codes(copied, codec, codec_dir).made == 1


@pytest.fixture
def other_codec(codec_dir, tmp_path):
    """The directory of another codec."""
    other = tmp_path / "other"
    other.mkdir()
    for file in codec_dir.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    state = torch.load(other / "firefly-gan-vq-golden.pth", weights_only=True)
    state["backbone.norm.bias"] += 0.5
    torch.save(state, other / "firefly-gan-vq-golden.pth")
    return other


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x93NUMPY\x01\x00v\x00{'descr': \x00"])
def test_damaged_codes_are_made_again(data, codec, codec_dir, content):
    extract_codes(data, codec, codec_dir)
    file = data / "Ann" / "c1.npy"
    codes = np.load(file)
    file.write_bytes(content)
    result = extract_codes(data, codec, codec_dir)
    assert (result.made, result.kept, result.failed) == (1, 4, {})
    assert np.array_equal(np.load(file), codes)


def test_another_codec_makes_all_codes_anew(data, codec, codec_dir, other_codec):
    extract_codes(data, codec, codec_dir)
    assert extract_codes(data, load_codec(other_codec), other_codec).made == 5


def test_what_several_processes_recorded_does_not_vouch_for_later_codes(
    data, codec, codec_dir, other_codec
):
    for rank in range(2):
        extract_codes(data, codec, codec_dir, rank=rank, world_size=2)
    for rank in range(2):
        assert extract_codes(data, codec, codec_dir, rank=rank, world_size=2).made == 0
    record = (data / "codes.1.json").read_text()
    other = load_codec(other_codec)
    assert extract_codes(data, other, other_codec).made == 5
    assert codecs_of_codes(data) == {file_digest(find_codec(other_codec))}
    assert extract_codes(data, other, other_codec).kept == 5
    (data / "codes.1.json").write_text(record)  # as versions before this one left it
    assert extract_codes(data, codec, codec_dir).made == 5


def test_codes_made_elsewhere_are_kept_where_they_fit(data, codec, codec_dir):
    np.save(data / "Ann" / "c0.npy", np.zeros((8, 4), np.int64))  # 8000 samples: 3.9 frames
    np.save(data / "Ann" / "c1.npy", np.zeros((8, 90), np.int64))
    result = extract_codes(data, codec, codec_dir)
    assert (result.made, result.kept) == (4, 1)


def test_an_array_of_something_else_beside_a_clip_is_named_and_kept(data, codec, codec_dir):
    mel = np.ones((80, 30), np.float32)
    np.save(data / "Ann" / "c0.npy", mel)
    result = extract_codes(data, codec, codec_dir)
    assert result.made == 4
    assert "c0.npy: an array [80, 30] of float32" in result.failed["Ann/c0"]
    assert np.array_equal(np.load(data / "Ann" / "c0.npy"), mel)


def test_a_clip_that_fails_is_named_and_the_others_are_made(data, codec, codec_dir):
    (data / "Ann" / "c0.wav").write_bytes(b"RIFF no audio")
    soundfile.write(data / "Ann" / "c1.wav", np.zeros(100), 44100)
    result = extract_codes(data, codec, codec_dir)
    assert result.made == 3
    assert "c0.wav" in result.failed["Ann/c0"]
    assert "shorter than one frame" in result.failed["Ann/c1"]


def test_a_clip_that_breaks_off_is_not_encoded(data, codec, codec_dir):
    extract_codes(data, codec, codec_dir)
    clip = data / "Ann" / "c4.wav"
    clip.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    result = extract_codes(data, codec, codec_dir)
    assert (result.made, result.kept) == (0, 4)
    assert "c4.wav: breaks off after 0.2 of 0.5 s; prepare it again" in result.failed["Ann/c4"]
    assert not clip.with_suffix(".npy").exists()


def test_a_clip_that_has_become_a_link_to_nowhere_is_named(data, codec, codec_dir):
    extract_codes(data, codec, codec_dir)
    clip = data / "Ann" / "c0.wav"
    clip.unlink()
    clip.symlink_to(data / "nowhere.wav")
    result = extract_codes(data, codec, codec_dir)
    assert (result.made, result.kept) == (0, 4)
    assert "c0.wav: no such audio file" in result.failed["Ann/c0"]


def test_an_interrupted_run_goes_on(data, codec, codec_dir, monkeypatch):
    encode, calls = Codec.encode, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Codec, "encode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            extract_codes(data, codec, codec_dir, batch_size=1)
    result = extract_codes(data, codec, codec_dir)
    assert (result.made, result.kept) == (3, 2)


def test_codes_of_old_audio_do_not_outlive_an_interrupted_run(data, codec, codec_dir, monkeypatch):
    extract_codes(data, codec, codec_dir)
    rng = np.random.default_rng(1)
    for number in range(5):  # as long as before, but other sound
        samples = rng.normal(0, 0.1, 8000 + 3000 * number)
        file = data / "Ann" / f"c{number}.wav"
        soundfile.write(file, samples, 22050 if number % 2 else 44100)
        os.utime(file, ns=(1, 1))
    with monkeypatch.context() as patch:
        patch.setattr(Codec, "encode", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            extract_codes(data, codec, codec_dir, batch_size=1)
    assert extract_codes(data, codec, codec_dir).made == 5
    assert extract_codes(data, codec, codec_dir).kept == 5
