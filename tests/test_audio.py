"""Audio comes in whole and at the right level from any format, and is levelled without harm."""

from __future__ import annotations

import os
import re
from contextlib import suppress

import numpy as np
import pytest
import soundfile

from fish_speech import audio, audio_decoding

SECOND = 16_000


def sine(frequency: float, seconds: float, sample_rate: int, amplitude: float = 0.5) -> np.ndarray:
    time = np.arange(round(seconds * sample_rate)) / sample_rate
    return (amplitude * np.sin(2 * np.pi * frequency * time)).astype(np.float32)


def pitch(samples: np.ndarray, sample_rate: int) -> float:
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(np.argmax(spectrum)) * sample_rate / len(samples)


@pytest.mark.parametrize(
    ("name", "sample_rate", "channels", "subtype"),
    [
        ("a.wav", 8_000, 1, "PCM_U8"),
        ("a.wav", 44_100, 2, "PCM_24"),
        ("a.wav", 48_000, 6, "FLOAT"),
        ("a.wav", 192_000, 1, "PCM_32"),
        ("a.flac", 16_000, 1, "PCM_16"),
        ("a.ogg", 22_050, 2, "VORBIS"),
        ("a.mp3", 44_100, 1, "MPEG_LAYER_III"),
        ("a.aiff", 44_100, 2, "PCM_16"),
    ],
)
def test_every_format_arrives_at_its_pitch_level_and_length(
    tmp_path, name, sample_rate, channels, subtype
):
    tone = sine(440, 1.0, sample_rate)
    soundfile.write(tmp_path / name, np.tile(tone[:, None], channels), sample_rate, subtype)
    waveform, rate = audio.load_audio(tmp_path / name, 44_100)
    assert waveform.shape[0] == 1
    assert rate == 44_100
    samples = waveform[0].numpy()
    assert len(samples) / rate == pytest.approx(1.0, abs=0.06)  # an MP3 begins with a little more
    assert pitch(samples, rate) == pytest.approx(440, abs=2)
    assert np.abs(samples[4000:-4000]).max() == pytest.approx(0.5, abs=0.03)


def test_channels_are_averaged(tmp_path):
    tone = sine(440, 0.2, SECOND)
    soundfile.write(tmp_path / "a.wav", np.stack([tone, 0 * tone], 1), SECOND, "FLOAT")
    assert audio.load_audio(tmp_path / "a.wav")[0][0].numpy() == pytest.approx(tone / 2)


@pytest.mark.parametrize(("name", "codec"), [("a.m4a", "aac"), ("a.webm", "libopus")])
def test_what_libsndfile_cannot_read_is_decoded_all_the_same(tmp_path, name, codec):
    encode(tmp_path / name, sine(440, 1.0, 48_000), codec)
    samples = audio.load_audio(tmp_path / name, SECOND)[0][0].numpy()
    assert len(samples) == pytest.approx(SECOND, abs=1000)
    assert pitch(samples, SECOND) == pytest.approx(440, abs=2)
    assert audio_decoding.audio_info(tmp_path / name).duration == pytest.approx(1.0, abs=0.06)


def test_blocks_add_up_to_the_whole(tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.1, 3 * 44_100).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", noise, 44_100, "FLOAT")
    whole = audio.resample(noise, 44_100, SECOND)
    parts = list(audio.decode_blocks(tmp_path / "a.wav", SECOND, block_seconds=0.1))
    assert len(parts) > 20
    assert np.concatenate(parts) == pytest.approx(whole, abs=1e-4)


def test_no_more_than_the_wanted_seconds_is_decoded(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(10 * SECOND), SECOND)
    parts = list(audio.decode_blocks(tmp_path / "a.wav", max_seconds=2.5, block_seconds=1))
    assert [len(part) for part in parts] == [SECOND, SECOND, SECOND // 2]


def test_broken_files_are_refused_with_their_names(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.wav: no such"):
        audio.load_audio(tmp_path / "none.wav")
    (tmp_path / "empty.wav").touch()
    with pytest.raises(ValueError, match=r"empty\.wav: the file is empty"):
        audio.load_audio(tmp_path / "empty.wav")
    (tmp_path / "text.wav").write_text("Dear diary,")
    with pytest.raises(ValueError, match=r"text\.wav: not an audio file"):
        audio.load_audio(tmp_path / "text.wav")
    noise = np.random.default_rng(0).normal(0, 0.1, 3 * 44_100)
    soundfile.write(tmp_path / "cut.flac", noise, 44_100)
    data = (tmp_path / "cut.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"cut\.flac: damaged audio"):
        audio.load_audio(tmp_path / "cut.flac")


def encode(path, samples, codec, rate=48_000, channels=1):
    """Write what libsndfile can't, with PyAV."""
    import av

    layout = ("mono", "stereo")[channels - 1]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        samples = np.stack([samples] * channels)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
        frame.sample_rate = rate
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.wav", {"subtype": "PCM_16"}),
        ("a.wav", {"subtype": "FLOAT", "endian": "BIG"}),
        ("a.wav", {"format": "RF64", "subtype": "PCM_16"}),
        ("a.aiff", {}),
        ("a.mp3", {}),
        ("a.ogg", {}),
        ("a.opus", {"format": "OGG", "subtype": "OPUS"}),
        ("a.webm", None),
    ],
)
def test_files_that_break_off_are_told_from_whole_ones(tmp_path, name, options):
    noise = np.random.default_rng(0).normal(0, 0.1, 6 * 48_000).astype(np.float32)
    path = tmp_path / name
    if options is None:
        encode(path, noise, "libopus")
    else:
        soundfile.write(path, noise, 48_000, **options)

    def seconds():
        return sum(map(len, audio.decode_blocks(path))) / 48_000

    assert audio_decoding.truncation(path, seconds()) is None
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert seconds() < 4
    assert audio_decoding.truncation(path, seconds()).startswith("breaks off after ")


@pytest.mark.parametrize(
    ("subtype", "rate", "length"), [("OPUS", 48_000, 0.15), ("VORBIS", 8_000, 0.8)]
)
def test_a_short_file_is_whole_although_its_codec_delays_it(tmp_path, subtype, rate, length):
    path = tmp_path / "a.ogg"
    soundfile.write(path, sine(220, length, rate), rate, format="OGG", subtype=subtype)
    waveform, _ = audio.load_audio(path)
    assert waveform.shape[1] / rate < 0.97 * audio_decoding.audio_info(path).duration
    assert audio_decoding.truncation(path, waveform.shape[1] / rate) is None


def test_a_picture_that_outlasts_the_sound_breaks_nothing_off(tmp_path):
    import av

    with av.open(tmp_path / "film.mp4", "w") as film:
        picture, sound = film.add_stream("mpeg4", rate=5), film.add_stream("aac", rate=44100)
        picture.width = picture.height = 32
        picture.pix_fmt, sound.layout = "yuv420p", "mono"
        frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        for _ in range(15):
            film.mux(picture.encode(frame))
        film.mux(picture.encode())
        for begin, block in enumerate(np.split(sine(440, 86 * 1024 / 44100, 44100), 86)):
            tone = av.AudioFrame.from_ndarray(block[None], format="fltp", layout="mono")
            tone.sample_rate, tone.pts = 44100, 1024 * begin
            film.mux(sound.encode(tone))
        film.mux(sound.encode())
    waveform, sample_rate = audio.load_audio(tmp_path / "film.mp4")
    seconds = waveform.shape[1] / sample_rate
    assert seconds == pytest.approx(2.0, abs=0.1)
    assert audio_decoding.truncation(tmp_path / "film.mp4", seconds) is None


@pytest.mark.parametrize(
    ("name", "options"),
    [("a.mp3", {}), ("a.ogg", {}), ("a.opus", {"format": "OGG", "subtype": "OPUS"})],
)
def test_files_that_were_joined_are_read_to_their_end(tmp_path, name, options):
    for part, frequency in enumerate((300, 600)):
        soundfile.write(
            tmp_path / f"{part}-{name}", sine(frequency, 2.0, 48_000), 48_000, **options
        )
    parts = [(tmp_path / f"{part}-{name}").read_bytes() for part in range(2)]
    (tmp_path / name).write_bytes(b"".join(parts))
    waveform, rate = audio.load_audio(tmp_path / name)
    samples = waveform[0].numpy()
    assert len(samples) / rate == pytest.approx(4.0, abs=0.1)
    assert pitch(samples[:rate], rate) == pytest.approx(300, abs=2)
    assert pitch(samples[-rate:], rate) == pytest.approx(600, abs=2)
    assert audio_decoding.truncation(tmp_path / name, len(samples) / rate) is None


@pytest.mark.parametrize("name", ["a.mp3", "a.aac"])
def test_joined_files_may_differ_in_rate_and_channels(tmp_path, name):
    joined = b""
    for rate, channels, frequency in ((48_000, 1, 300), (44_100, 2, 600), (48_000, 1, 900)):
        tone, part = sine(frequency, 2.0, rate, 0.4), tmp_path / f"{frequency}-{name}"
        if name == "a.mp3":
            soundfile.write(part, np.stack([tone] * channels, 1), rate)
        else:
            encode(part, tone, "aac", rate, channels)
        joined += part.read_bytes()
    (tmp_path / name).write_bytes(joined)
    waveform, rate = audio.load_audio(tmp_path / name)
    samples = waveform[0].numpy()
    assert len(samples) / rate == pytest.approx(6.0, abs=0.2)
    for second, frequency in ((0.5, 300), (2.5, 600), (4.6, 900)):
        part = samples[round(second * rate) :][:rate]
        assert pitch(part, rate) == pytest.approx(frequency, abs=2)
        assert np.abs(part).max() == pytest.approx(0.4, abs=0.03)


def test_an_mp3_that_does_not_state_its_length_is_read_to_its_end(tmp_path):
    tones = [sine(300, 2.0, 48_000), np.zeros(96_000, np.float32), sine(600, 2.0, 48_000)]
    soundfile.write(tmp_path / "a.mp3", np.concatenate(tones), 48_000, bitrate_mode="VARIABLE")
    data = (tmp_path / "a.mp3").read_bytes()
    for tag in (b"Xing", b"Info"):
        data = data.replace(tag, bytes(4))
    (tmp_path / "a.mp3").write_bytes(data)
    waveform, rate = audio.load_audio(tmp_path / "a.mp3")
    assert waveform.shape[1] / rate == pytest.approx(6.0, abs=0.15)
    assert audio_decoding.truncation(tmp_path / "a.mp3", waveform.shape[1] / rate) is None


def test_flac_and_wave_files_from_a_pipe_state_no_length_and_are_read(tmp_path):
    tone = sine(440, 1.0, SECOND)
    soundfile.write(tmp_path / "a.flac", tone, SECOND)
    data = bytearray((tmp_path / "a.flac").read_bytes())
    data[21] &= 0xF0  # the number of samples: 36 bits before the checksum of the header
    data[22:26] = bytes(4)
    (tmp_path / "a.flac").write_bytes(data)
    soundfile.write(tmp_path / "a.wav", tone, SECOND)
    data = (tmp_path / "a.wav").read_bytes()
    at = data.index(b"data") + 4
    (tmp_path / "a.wav").write_bytes(data[:at] + bytes(4) + data[at + 4 :])
    for name in ("a.flac", "a.wav"):
        waveform, rate = audio.load_audio(tmp_path / name)
        assert (waveform.shape[1], rate) == (SECOND, SECOND)
        assert (audio_decoding.audio_info(tmp_path / name).duration or 1.0) == pytest.approx(
            1.0, abs=0.01
        )


@pytest.mark.parametrize("size", [0, 0x7FFFF000, 0x80000000, 0xFFFFFFFF])
def test_a_wave_file_from_a_pipe_does_not_know_its_size_and_is_whole(tmp_path, size):
    soundfile.write(tmp_path / "a.wav", sine(440, 1.0, SECOND), SECOND)
    data = (tmp_path / "a.wav").read_bytes()
    at = data.index(b"data") + 4
    (tmp_path / "a.wav").write_bytes(data[:at] + size.to_bytes(4, "little") + data[at + 4 :])
    assert audio_decoding.truncation(tmp_path / "a.wav", 1.0) is None


def stated(path, size: int) -> None:
    """Let the WAV file say that its samples are of `size` bytes."""
    with path.open("rb+") as file:
        file.seek(file.read().index(b"data") + 4)
        file.write(size.to_bytes(4, "little"))


@pytest.mark.parametrize("size", [0x7FFFF000, 0xFFFFFFFF])
def test_a_wave_file_from_a_pipe_may_be_of_gigabytes(tmp_path, size):
    soundfile.write(tmp_path / "a.wav", sine(440, 1.0, SECOND), SECOND)
    stated(tmp_path / "a.wav", size)
    os.truncate(tmp_path / "a.wav", 44 + 0x7FFFF000)
    duration = audio_decoding.audio_info(tmp_path / "a.wav").duration
    assert duration == pytest.approx(0x7FFFF000 / 2 / SECOND)
    assert audio_decoding.truncation(tmp_path / "a.wav", duration) is None


@pytest.mark.parametrize("size", [6 * SECOND - 2**16, 50_000])  # its last bits, or unknown
def test_a_wave_file_longer_than_it_can_say_is_read_to_its_end(tmp_path, monkeypatch, size):
    monkeypatch.setattr(audio_decoding, "_LARGEST_WAV", 2**16)
    monkeypatch.setattr(audio_decoding, "_UNKNOWN_SIZES", {50_000})
    noise = np.random.default_rng(0).normal(0, 0.1, 3 * SECOND).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", noise, SECOND)
    stated(tmp_path / "a.wav", size)
    waveform, rate = audio.load_audio(tmp_path / "a.wav")
    assert rate == SECOND
    assert waveform[0].numpy() == pytest.approx(noise, abs=1e-4)
    assert audio_decoding.truncation(tmp_path / "a.wav", 3.0) is None
    assert audio_decoding.audio_info(tmp_path / "a.wav").duration in (None, 3.0)


@pytest.mark.parametrize("name", ["a.wav", "a.mkv"])
def test_channels_that_cancel_each_other_are_not_averaged(tmp_path, name):
    tone = sine(440, 1.0, 48_000)
    soundfile.write(tmp_path / "a.wav", np.stack([tone, -0.9 * tone], 1), 48_000, "FLOAT")
    if name == "a.mkv":
        import av

        with av.open(str(tmp_path / "a.wav")) as source, av.open(str(tmp_path / name), "w") as copy:
            stream = copy.add_stream("pcm_s16le", rate=48_000, layout="stereo")
            to_int = av.AudioResampler(format="s16", layout="stereo", rate=48_000)
            for frame in source.decode(audio=0):
                copy.mux([p for part in to_int.resample(frame) for p in stream.encode(part)])
    samples = audio.load_audio(tmp_path / name)[0][0].numpy()
    assert samples == pytest.approx(tone, abs=1e-3)


def test_where_channels_cancel_each_other_one_is_taken_for_the_whole_file(tmp_path):
    tone = sine(440, 3.0, SECOND)
    fading = np.linspace(0.9, 1.1, len(tone), dtype=np.float32)  # the other is louder in the end
    soundfile.write(tmp_path / "a.wav", np.stack([tone, -fading * tone], 1), SECOND, "FLOAT")
    samples = np.concatenate(list(audio.decode_blocks(tmp_path / "a.wav", block_seconds=0.5)))
    assert samples == pytest.approx(tone)


def test_bytes_that_are_no_sound_are_refused_whatever_their_suffix(tmp_path):
    for seed in range(5):
        (tmp_path / "a.aac").write_bytes(np.random.default_rng(seed).bytes(40_000))
        with pytest.raises(ValueError, match=r"a\.aac: not an audio file that can be decoded"):
            audio.load_audio(tmp_path / "a.aac")


def test_a_codec_that_nobody_knows_is_refused_by_the_file_s_name(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, sine(440, 1.0, 16_000), 16_000)
    content = bytearray(path.read_bytes())
    content[20:22] = (0x1234).to_bytes(2, "little")  # the format tag
    path.write_bytes(content)
    for read in (audio_decoding.audio_info, audio.load_audio):
        with pytest.raises(ValueError, match=r"a\.wav: not an audio .* \(unknown codec\)"):
            read(path)


def test_saving_keeps_the_wave_and_scales_what_would_clip(tmp_path):
    tone = sine(440, 0.5, SECOND)
    audio.save_audio(tmp_path / "a.wav", tone, SECOND)
    assert soundfile.info(tmp_path / "a.wav").subtype == "PCM_16"
    assert audio.load_audio(tmp_path / "a.wav")[0][0].numpy() == pytest.approx(tone, abs=1e-4)
    audio.save_audio(tmp_path / "b.flac", 4 * tone, SECOND)
    loud = audio.load_audio(tmp_path / "b.flac")[0][0].numpy()
    assert loud == pytest.approx(2 * tone, abs=1e-3)
    with pytest.raises(ValueError, match="unknown audio format"):
        audio.save_audio(tmp_path / "a.xyz", tone, SECOND)


@pytest.mark.parametrize("shape", [(2, 500), (500, 1), (1, 1, 500), ()])
def test_what_is_not_one_channel_is_refused(tmp_path, shape):
    waveform = np.full(shape, 0.5, np.float32)
    with pytest.raises(ValueError, match=rf"shape {re.escape(str(list(shape)))}; \[1, N\] or"):
        audio.save_audio(tmp_path / "a.wav", waveform, SECOND)
    refused = pytest.raises(ValueError, match="shape")
    with refused, audio.audio_writer(tmp_path / "a.wav", SECOND) as write:
        write(waveform)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sample", [np.nan, np.inf])
def test_what_is_not_finite_is_not_saved(tmp_path, sample):
    waveform = np.array([[0.1, sample, 0.5]], np.float32)
    with pytest.raises(ValueError, match=r"a\.wav: .* not finite"):
        audio.save_audio(tmp_path / "a.wav", waveform, SECOND)
    refused = pytest.raises(ValueError, match=r"a\.wav: .* not finite")
    with refused, audio.audio_writer(tmp_path / "a.wav", SECOND) as write:
        write(waveform[:, :1])
        write(waveform)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_os_error_and_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise soundfile.LibsndfileError(2)

    monkeypatch.setattr(soundfile.SoundFile, "write", fail)
    with pytest.raises(OSError, match=r"a\.wav: can't be written; is the disk full\?"):
        audio.save_audio(tmp_path / "a.wav", np.zeros(10), SECOND)
    assert not list(tmp_path.iterdir())


def test_loudness_and_true_peak_agree_with_the_standard():
    assert audio.loudness(sine(997, 2, 48_000, 1.0), 48_000) == pytest.approx(-3.01, abs=0.05)
    assert audio.loudness(np.zeros(48_000, np.float32), 48_000) == float("-inf")
    # A sine at a quarter of the rate, sampled beside its crests: 3 dB are between the samples.
    between = np.sin(np.pi / 2 * np.arange(48_000) + np.pi / 4).astype(np.float32)
    assert np.abs(between).max() == pytest.approx(0.7071, abs=1e-3)
    assert audio.true_peak(between[100:-100], 48_000) == pytest.approx(0.0, abs=0.3)


@pytest.mark.parametrize("seconds", [0.2, 3.0])
@pytest.mark.parametrize("amplitude", [0.002, 0.9])
def test_levelled_speech_has_the_target_loudness(seconds, amplitude):
    samples, done = audio.normalize_loudness(sine(300, seconds, 44_100, amplitude), 44_100)
    assert audio.loudness(samples, 44_100) == pytest.approx(-23, abs=0.15)
    assert done.loudness == pytest.approx(-23, abs=0.01)
    assert not done.limited
    assert (done.gain > 0) == (amplitude < 0.1)


def test_gain_is_held_back_where_peaks_would_pass_the_ceiling():
    clicks = np.zeros(88_200, np.float32)
    clicks[::22_050] = 0.5
    samples, done = audio.normalize_loudness(clicks, 44_100)
    assert done.limited
    assert audio.true_peak(samples, 44_100) <= -0.99
    again, _ = audio.normalize_loudness(clicks / 4, 44_100)
    assert samples == pytest.approx(again, abs=1e-4)  # the shape is untouched


def test_an_offset_goes_and_silence_stays_silent():
    tone = sine(300, 3, 44_100, 0.2)
    assert abs(audio.normalize_loudness(tone + 0.1, 44_100)[0].mean()) < 1e-4
    # Offset in the voice only, as synthesisers make it: the silence must not inherit it.
    voice = np.concatenate([np.zeros(44_100, np.float32), tone + 0.02 * (tone != 0)])
    samples, done = audio.normalize_loudness(voice, 44_100)
    assert done.offset == pytest.approx(0.015, abs=1e-3)
    assert np.abs(samples[:33_000]).max() < 1e-4
    silence, done = audio.normalize_loudness(np.zeros(100, np.float32), 44_100)
    assert not silence.any()
    assert done.gain == 0


@pytest.mark.parametrize("suffix", [".wav", ".ogg"])
def test_audio_saved_while_it_is_made_is_whole_and_clipped_at_full_scale(tmp_path, suffix):
    tone = (2 * np.sin(np.arange(44100) * 0.03)).astype(np.float32)
    with audio.audio_writer(tmp_path / f"a{suffix}", 44100) as write:
        for part in np.split(tone, 9):
            write(part)
    samples, _ = audio.load_audio(tmp_path / f"a{suffix}")
    assert samples.shape == (1, 44100)
    assert 0.95 < samples.abs().max() < 1.3  # a lossy format swings over the edges


@pytest.mark.parametrize("bits", [16, 24])
def test_a_wav_file_grows_beyond_what_its_sizes_can_tell(tmp_path, monkeypatch, bits):
    monkeypatch.setattr(audio, "_LARGEST_WAV", 20_000)
    parts = np.random.default_rng(0).uniform(-1, 1, (9, 4_000)).astype(np.float32)
    for count, kind in ((20_000 * 8 // bits // 4_000, b"RIFF"), (9, b"RF64")):
        with audio.audio_writer(tmp_path / "a.wav", SECOND, bits=bits) as write:
            for part in parts[:count]:
                write(part)
        assert (tmp_path / "a.wav").read_bytes()[:4] == kind
        assert soundfile.info(tmp_path / "a.wav").subtype == f"PCM_{bits}"
        waveform, _ = audio.load_audio(tmp_path / "a.wav")
        assert waveform[0].numpy() == pytest.approx(parts[:count].reshape(-1), abs=2 ** (1 - bits))
        assert audio_decoding.truncation(tmp_path / "a.wav", count * 4_000 / SECOND) is None
    assert len(list(tmp_path.iterdir())) == 1


def test_audio_that_breaks_off_while_it_is_made_leaves_what_was_there(tmp_path):
    (tmp_path / "a.wav").write_text("before")
    with suppress(KeyboardInterrupt), audio.audio_writer(tmp_path / "a.wav", 44100) as write:
        write(np.zeros(100))
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]
    assert (tmp_path / "a.wav").read_text() == "before"


def test_a_sample_that_is_no_number_is_named(tmp_path):
    samples = np.zeros(1000, np.float32)
    samples[500] = np.nan
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    with pytest.raises(ValueError, match=r"a\.wav: damaged audio .*no numbers"):
        list(audio.decode_blocks(tmp_path / "a.wav"))
