"""prepare_dataset.py as its users call it: the guide's commands, bad input, exit codes."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile

import prepare_dataset
from fish_speech.preparation.transcribe import Transcription

REPOSITORY = Path(prepare_dataset.__file__).parent
SAMPLES = sorted((REPOSITORY / "samples").glob("*.flac"))
RATE = 16_000

GUIDE = """
--input samples --output training_data/note_lm --normalize --split-long --auto-transcribe
--input "https://youtube.com/watch?v=VIDEO_ID" --output training_data/youtube_voice --speaker "YouTuber_Name" --youtube --auto-transcribe --whisper-model medium --segment-duration 10
--input "https://youtube.com/watch?v=VIDEO_ID" --output training_data/youtube_voice --speaker "YouTuber_Name" --youtube --auto-transcribe --whisper-model medium --max-duration 20
--input "https://youtube.com/watch?v=PODCAST_ID" --output training_data/podcast_host --speaker "PodcastHost" --youtube --auto-transcribe --whisper-model large --split-long
--input my_voice/recordings --output training_data/my_voice --speaker "MyVoice" --normalize --split-long
--input training_data/ --output check_data/ --auto-transcribe
"""  # noqa: E501


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder to work in, with samples/ of one recording."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "*")
    add(tmp_path / "samples" / "first.flac")
    return tmp_path


def add(path: Path, samples: np.ndarray | None = None, text: str | None = None, **options) -> Path:
    """Write a recording with a transcript: speech, unless `samples` are given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if samples is None:
        samples, _ = soundfile.read(SAMPLES[0])
        text = SAMPLES[0].with_suffix(".txt").read_text() if text is None else text
    soundfile.write(path, samples, options.pop("rate", RATE), **options)
    if text is not None:
        path.with_name(path.stem + ".txt").write_text(text)
    return path


def run(*words: str) -> int:
    return prepare_dataset.main([*words, "--num-workers", "1"])


def test_the_guides_commands_are_understood():
    import shlex

    for line in GUIDE.strip().splitlines():
        options = prepare_dataset.make_options(
            prepare_dataset.build_parser().parse_args(shlex.split(line))
        )
        assert options.auto_transcribe == ("--auto-transcribe" in line)
        assert options.youtube == ("--youtube" in line)


def test_the_guides_first_command(home, capsys):
    words = "--input samples --output training_data/note_lm --normalize --split-long"
    assert run(*words.split(), "--auto-transcribe") == 0
    clip = home / "training_data" / "note_lm" / "note_lm" / "first_0001.wav"
    assert soundfile.info(clip).samplerate == 44_100
    assert (
        clip.with_suffix(".lab").read_text() == SAMPLES[0].with_suffix(".txt").read_text().strip()
    )
    printed = capsys.readouterr().out
    assert printed.strip().endswith("training_data/note_lm: 1 clip, 0.06 minutes")
    assert "fit to train on" in printed


def test_the_guides_check_commands(home, capsys, monkeypatch):
    def offline(*_, **__):
        raise ValueError("no model")

    monkeypatch.setattr("fish_speech.preparation.pipeline.load_recogniser", offline)
    assert run("--input", "samples", "--output", "training_data/voice", "--speaker", "Anna") == 0
    assert run("--input", "training_data/", "--output", "check_data/", "--auto-transcribe") == 0
    printed = capsys.readouterr()
    assert "no model; going on without it" in printed.err
    assert "Speakers: Anna" in printed.out
    assert run("--check", "training_data/voice", "--report") == 0
    assert "report.html" in capsys.readouterr().out
    assert (home / "training_data" / "voice" / "report.html").is_file()
    (home / "training_data" / "voice" / "Anna" / "first_0001.lab").unlink()
    assert run("--check", "training_data/voice") == 1
    assert "first_0001.wav: has no transcript" in capsys.readouterr().out


def test_a_data_set_that_would_spoil_training_is_a_problem(home, capsys):
    add(home / "samples" / "second.flac", text="far too many words for a sentence so short " * 9)
    assert run("--input", "samples", "--output", "training_data/voice") == 0
    assert "some of this would spoil training" in capsys.readouterr().out
    assert run("--check", "training_data/voice") == 1
    assert run("--input", "training_data", "--output", "check_data") == 1
    assert "fast_text" in capsys.readouterr().out


def test_two_speakers_in_one_data_set(home, capsys):
    add(home / "others" / "second.wav")
    assert run("--input", "samples/", "--output", "data", "--speaker", "Speaker1") == 0
    assert run("--input", "others/", "--output", "data", "--speaker", "Speaker2") == 0
    assert "Speakers: Speaker1, Speaker2" in capsys.readouterr().out


NOISE = np.random.default_rng(0).normal(0, 0.1, 3 * RATE)


@pytest.mark.parametrize(
    ("name", "samples", "text", "reason"),
    [
        ("silent.wav", np.zeros(RATE), "Hush.", "is silent"),
        ("noise.wav", 0.01 * NOISE, "Nothing is said.", "has no speech in it"),
        ("nothing.wav", np.zeros(0), "Nothing.", "holds no audio"),
        ("bare.wav", NOISE, None, "has no transcript: put one beside it (bare.txt)"),
        ("empty.wav", NOISE, " ", "its transcript empty.txt is empty"),
        ("dots.wav", NOISE, "...", "its transcript dots.txt has no letter in it"),
    ],
)
def test_what_cannot_be_used_is_named_and_the_rest_is_done(
    home, capsys, name, samples, text, reason
):
    add(home / "samples" / name, samples, text)
    assert run("--input", "samples", "--output", "data") == 1
    printed = capsys.readouterr()
    assert f"samples/{name}: {reason}" in printed.out
    assert printed.out.strip().splitlines()[-1].startswith("data: 1 clip,")
    assert "1 input failed" in printed.out.strip().splitlines()[-1]
    assert "Traceback" not in printed.err


def test_broken_files_are_named(home, capsys):
    (home / "samples" / "zero.wav").touch()
    (home / "samples" / "text.wav").write_text("Dear diary, this is no recording.")
    cut = add(home / "samples" / "cut.flac", NOISE, "Cut off.")
    cut.write_bytes(cut.read_bytes()[:30_000])
    (home / "samples" / "gone.wav").symlink_to(home / "nowhere.wav")
    for name in ("zero", "text", "gone"):
        (home / "samples" / f"{name}.txt").write_text("Words.")
    assert run("--input", "samples", "--output", "data") == 1
    printed = capsys.readouterr().out
    assert "samples/zero.wav: the file is empty" in printed
    assert "samples/text.wav: not an audio file" in printed
    assert "samples/cut.flac: damaged audio" in printed
    assert "samples/gone.wav: cannot be read" in printed
    assert "4 inputs failed" in printed


@pytest.mark.parametrize(
    ("rate", "channels", "subtype"),
    [(8_000, 1, "PCM_U8"), (44_100, 2, "PCM_24"), (48_000, 6, "FLOAT"), (192_000, 1, "PCM_16")],
)
def test_any_kind_of_sound_becomes_44_khz_mono(home, rate, channels, subtype):
    import soxr

    voice, _ = soundfile.read(SAMPLES[1])
    voice = soxr.resample(voice, RATE, rate)
    text = SAMPLES[1].with_suffix(".txt").read_text()
    add(home / "in" / "a.wav", np.stack([voice] * channels, 1), text, rate=rate, subtype=subtype)
    assert run("--input", "in", "--output", "data", "--normalize") == 0
    info = soundfile.info(home / "data" / "data" / "a_0001.wav")
    assert (info.samplerate, info.channels, info.subtype) == (44_100, 1, "PCM_16")
    assert info.duration == pytest.approx(len(voice) / rate, abs=0.01)


def test_a_truncated_recording_is_used_as_far_as_it_goes_and_named(home, capsys):
    cut = add(home / "samples" / "cut.wav")
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    assert run("--input", "samples", "--output", "data") == 0
    printed = capsys.readouterr().out
    assert "samples/cut.wav: breaks off after 1.7 of 3.5 s; what is there is used" in printed
    assert "would spoil training" in printed
    assert "data: 2 clips" in printed


def test_a_folder_that_cannot_be_read_is_named_and_the_rest_is_done(home, capsys, monkeypatch):
    add(home / "samples" / "closed" / "second.wav")
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert run("--input", "samples", "--output", "data") == 1
    printed = capsys.readouterr().out
    assert "samples/closed: cannot be read (Permission denied)" in printed
    assert "data: 1 clip," in printed


def test_a_clip_that_is_all_clipping_is_flagged_and_dropped(home, capsys):
    voice, _ = soundfile.read(SAMPLES[2])
    add(
        home / "samples" / "loud.wav",
        0.5 * np.clip(50 * voice, -1, 1),
        SAMPLES[2].stem + " is loud.",
    )
    assert run("--input", "samples", "--output", "data", "--drop-flagged") == 0
    assert "data: 1 clip," in capsys.readouterr().out
    entry = json.loads((home / "data" / "rejected" / "data" / "loud_0001.json").read_text())
    assert "clipping" in entry["reason"].split(", ")


@pytest.mark.parametrize(
    "stem",
    ["with space", 'it\'s "so"', "😀 smile", "-rf", "--help", "n" * 240, "a\\b", "tab\there"],
)
def test_awkward_file_names_are_no_trouble(home, capsys, stem):
    add(home / "in" / f"{stem}.wav")
    assert run("--input", "in", "--output", "data") == 0
    (clip,) = (home / "data" / "data").glob("*.wav")
    assert re.fullmatch(r"[\w.][\w.-]*_0001\.wav", clip.name)


def test_two_inputs_of_one_stem_are_two_clips(home, capsys):
    second, _ = soundfile.read(SAMPLES[3])
    add(home / "samples" / "first.wav", second, SAMPLES[0].with_suffix(".txt").read_text())
    assert run("--input", "samples", "--output", "data") == 0
    assert len(list((home / "data" / "data").glob("first*_0001.wav"))) == 2


def test_bad_input_ends_in_one_line(home, capsys):
    (home / "empty").mkdir()
    (home / "file").touch()
    for words, message in (
        (["--input", "nowhere", "--output", "data"], "nowhere: no such file or folder"),
        (["--input", "empty", "--output", "data"], "empty: no audio in this folder"),
        (["--input", "n" * 300, "--output", "data"], "no such file or folder"),
        (["--check", "n" * 300], "no such folder"),
        (["--input", "samples"], "--input needs --output"),
        (["--check", "nowhere"], "nowhere: no such folder"),
        (["--check", "samples", "--drop-flagged"], "--drop-flagged has no part in --check"),
        (["--check", "samples", "--output", "data"], "--output has no part in --check"),
        ([], "give either --input with --output, or --check"),
        (["--input", "samples", "--output", "samples"], "write to another folder"),
        (["--input", "samples", "--output", "d", "--speaker", "../.."], "needs a letter"),
        (["--input", "https://youtube.com/watch?v=x", "--output", "data"], "--youtube"),
        (["--input", "http://127.0.0.1:1/a", "--output", "d", "--youtube"],
         "a video has no transcript beside it; add --auto-transcribe"),
        (["--input", "samples", "--output", "d", "--max-duration", "-1"], "--max-duration -1"),
        (["--input", "samples", "--output", "d", "--min-snr", "nan"], "--min-snr nan"),
    ):  # fmt: skip
        assert run(*words) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ")
        assert message in error
        assert "\n" not in error
    assert run("--input", "nowhere", "--output", "data", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_speaker_is_a_folder_never_a_path(home, capsys):
    assert run("--input", "samples", "--output", "data", "--speaker", "../../x") == 0
    assert [path.name for path in (home / "data").iterdir() if path.name[0] not in ".d"] == ["x"]
    assert "the speaker '../../x' is written as x" in capsys.readouterr().err
    assert run("--input", "samples", "--output", "long", "--speaker", "n" * 300) == 0
    assert (home / "long" / ("n" * 80) / "first_0001.wav").is_file()


def test_an_output_that_cannot_be_written_is_said(home, capsys, monkeypatch):
    (home / "file").touch()
    assert run("--input", "samples", "--output", "file/data") == 2
    assert "file: is a file" in capsys.readouterr().err

    def full(path, *_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("fish_speech.preparation.recording.save_audio", full)
    assert run("--input", "samples", "--output", "data") == 2
    error = capsys.readouterr().err
    assert ": no space left on device; make room" in error
    assert "goes on from there" in error


def test_a_full_disk_is_one_line_that_names_a_file(home, capsys, monkeypatch):
    """Of files that are being written the system names none."""

    class Listener:
        identity = "listener"

        def transcribe(self, samples):
            return Transcription("The tide had gone out.")

    (home / "samples" / "first.txt").unlink()
    monkeypatch.setattr(
        "fish_speech.preparation.pipeline.load_recogniser", lambda *_, **__: Listener()
    )
    command = ("--input", "samples", "--output", "data", "--auto-transcribe")
    opened, full = Path.open, "heard.jsonl"

    def write(file, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def open_full(self, *words, **options):
        file = opened(self, *words, **options)
        if self.name == full:
            monkeypatch.setattr(file, "write", partial(write, file), raising=False)
        return file

    monkeypatch.setattr(Path, "open", open_full)
    goes_on = "make room, and the same command goes on from there"
    assert run(*command) == 2
    reason = f"no space left on device; {goes_on}"
    assert capsys.readouterr().err == f"error: data/.prepared/heard.jsonl: {reason}\n"
    full = ".lock-holder"
    assert run(*command) == 2
    assert capsys.readouterr().err == f"error: data/.lock-holder: {reason}\n"
    full = ""
    assert run(*command) == 0


class Terminal(io.StringIO):
    """A terminal of 80 columns."""

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        """What is on the screen: what was written at the start of a line covers what was there."""
        lines = []
        for written in self.getvalue().split("\n"):
            shown = ""
            for part in written.split("\r"):
                shown = part + shown[len(part) :]
            lines.append(shown.rstrip())
        return lines


def test_a_progress_bar_covers_no_message_and_is_not_shown_for_nothing(home, monkeypatch):
    assert run("--input", "samples", "--output", "data") == 0
    label = home / "data" / "data" / "first_0001.lab"
    label.write_text("...")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert run("--input", "samples", "--output", "data", "--normalize") == 0
    lines = terminal.lines()
    assert (
        "data/data/first_0001.lab: has no letter in it; the text from before is put back" in lines
    )
    bars = [line.split(":")[0] for line in lines if "[" in line]
    assert bars == ["preparing"]
    assert run("--input", "samples", "--output", "data", "--normalize") == 0
    assert terminal.lines()[len(lines) - 1 :] == ["prepared before: 1 of 1 recording", ""]


def test_ctrl_c_exits_with_130(home, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("fish_speech.preparation.pipeline.prepare_recording", interrupt)
    assert run("--input", "samples", "--output", "data") == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_who_reads_no_further_is_not_told_about_it(home):
    assert run("--input", "samples", "--output", "data") == 0
    program = subprocess.Popen(
        [sys.executable, REPOSITORY / "prepare_dataset.py", "--check", "data"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with program:
        program.stdout.close()
        assert program.stderr.read() == b""
    assert program.returncode == 1


def test_help_loads_nothing_heavy():
    code = "import sys, prepare_dataset as p; p.build_parser().format_help(); print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert not {"torch", "numpy", "whisper", "scipy"} & set(result.stdout.split())


def test_going_on_is_not_promised_where_the_same_would_happen_again(home, capsys, monkeypatch):
    def mistake(*_, **__):
        raise KeyError("speech")

    monkeypatch.setattr("fish_speech.preparation.pipeline.write_summary", mistake)
    assert run("--input", "samples", "--output", "data") == 2
    error = capsys.readouterr().err
    assert error == "error: KeyError: 'speech' (--debug shows where)\n"


def test_a_panic_of_rust_code_is_one_line(monkeypatch, capsys):
    class PanicException(BaseException):
        pass

    def panic(arguments):
        raise PanicException("index out of bounds")

    monkeypatch.setattr(prepare_dataset, "run", panic)
    assert prepare_dataset.main(["--input", "in", "--output", "out"]) == 2
    assert capsys.readouterr().err.startswith("error: PanicException: index out of bounds (")
