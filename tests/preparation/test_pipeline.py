"""Recordings in, a dataset out: the same one however the work was done, every second accounted."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from fish_speech import files
from fish_speech.audio import save_audio
from fish_speech.datasets.spans import recorded_spans
from fish_speech.files import file_digest
from fish_speech.preparation import transcribe
from fish_speech.preparation.align import Word
from fish_speech.preparation.check import describe
from fish_speech.preparation.options import Thresholds
from fish_speech.preparation.pipeline import _make_jobs, prepare, prepare_recording
from fish_speech.preparation.plan import make_plan
from fish_speech.preparation.sources import Recording
from fish_speech.preparation.transcribe import Transcription

REPOSITORY = Path(__file__).resolve().parents[2]


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_folder_with_transcripts_becomes_a_data_set(folder, options, utterances):
    source = folder(3)
    summary = prepare(replace(options, input=str(source)))
    wav = options.output / "Me" / "take_1_0001.wav"
    info = soundfile.info(wav)
    assert (info.samplerate, info.channels, info.subtype) == (44_100, 1, "PCM_16")
    assert wav.with_suffix(".lab").read_text() == utterances[1].text
    written = json.loads((options.output / "dataset_summary.json").read_text())
    assert written == summary.as_json()
    assert written["total_files"] == 3
    assert written["total_duration_minutes"] == pytest.approx(10 / 60, abs=0.05)
    assert written["speakers"] == ["Me"]
    clip = written["clips"][1]
    assert (clip["file"], clip["speaker"], clip["flags"]) == ("Me/take_1_0001.wav", "Me", [])
    assert clip["source"].endswith("recordings/take 1.wav")
    assert clip["loudness"] == pytest.approx(-23, abs=0.2)
    assert 0 <= clip["start"] < clip["end"] <= utterances[1].duration + 1e-3
    assert recorded_spans(options.output)["Me/take_1_0001"] == [
        [file_digest(source / "take 1.wav"), clip["start"], clip["end"]]
    ]
    assert summary.failed == 0


def test_without_options_the_recording_is_kept_as_it_is(folder, options, utterances):
    source = folder(1)
    prepare(replace(options, input=str(source), normalize=False, split_long=False))
    samples, _ = soundfile.read(options.output / "Me" / "take_0_0001.wav", dtype="float32")
    assert len(samples) / 44_100 == pytest.approx(utterances[0].duration, abs=1e-3)
    assert np.abs(samples).max() == pytest.approx(np.abs(utterances[0].samples).max(), abs=0.02)


def test_the_second_speaker_is_added(folder, options):
    prepare(replace(options, input=str(folder(2))))
    summary = prepare(replace(options, input=str(folder(3, "others")), speaker="Other"))
    assert summary.speakers == ["Me", "Other"]
    assert len(summary.clips) == 5
    assert len(list(options.output.glob("*/*.wav"))) == 5


def test_nothing_is_done_twice(folder, options):
    options = replace(options, input=str(folder(2)))
    prepare(options)
    before = {path: path.stat().st_mtime_ns for path in options.output.rglob("*.wav")}
    said = []
    prepare(options, say=said.append)
    assert said == ["prepared before: 2 of 2 recordings"]
    assert {path: path.stat().st_mtime_ns for path in options.output.rglob("*.wav")} == before


def test_changed_options_and_recordings_redo_what_they_change(folder, take, options):
    recording = take(8)
    recording.path.with_suffix(".txt").write_text("\n".join(recording.texts))
    options = replace(options, input=str(recording.path.parent), segment_duration=4.0)
    first = prepare(options)
    again = prepare(replace(options, segment_duration=8.0))
    assert len(again.clips) < len(first.clips)
    assert len(list(options.output.glob("Me/*.wav"))) == len(again.clips)  # none of the old is left
    texts = list(reversed(recording.texts))
    recording.path.with_suffix(".txt").write_text(" ".join(texts))
    assert prepare(options).clips[0]["text"] == texts[0]


def test_a_recording_that_breaks_off_is_used_and_named(folder, options):
    source = folder(1)
    path = source / "take 0.wav"
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    summary = prepare(replace(options, input=str(source)))
    assert "breaks_off" in summary.clips[0]["flags"]
    (entry,) = summary.skipped
    assert entry["reason"].startswith("breaks off after 2.")
    assert entry["reason"].endswith("; what is there is used")
    assert summary.failed == 0


def test_any_exception_is_the_failure_of_its_file(folder, options, monkeypatch):
    def fail(job, *args):
        if "take 0" in job.recording.source:
            raise RuntimeError("no kernel for this")
        return make_plan(job, *args)

    monkeypatch.setattr("fish_speech.preparation.recording.make_plan", fail)
    summary = prepare(replace(options, input=str(folder(2)), num_workers=1))
    assert len(summary.clips) == 1
    assert summary.skipped[0]["reason"] == "RuntimeError: no kernel for this"
    assert summary.recordings[0]["left_out"] == summary.recordings[0]["duration"] > 2


def test_names_that_are_not_utf_8_are_no_trouble(folder, options):
    source = os.fsencode(folder(1))
    for name, keep_text in ((b"caf\xe9", True), (b"th\xe9", False)):
        for suffix in (b".wav", b".txt"):
            content = Path(os.fsdecode(source + b"/take 0" + suffix)).read_bytes()
            if suffix == b".wav" or keep_text:
                Path(os.fsdecode(source + b"/" + name + suffix)).write_bytes(content + b" ")
    options = replace(options, input=os.fsdecode(source))
    summary = prepare(options)
    assert {clip["file"] for clip in summary.clips} == {"Me/take_0_0001.wav", "Me/caf_0001.wav"}
    (entry,) = summary.skipped
    assert entry["source"].endswith("recordings/th\ufffd.wav")
    assert "has no transcript" in entry["reason"]
    Path(os.fsdecode(source + b"/th\xe9.wav")).unlink()
    assert prepare(options).skipped == []


def test_a_deleted_clip_stays_away_when_its_recording_is_renamed(folder, options):
    source = folder(2)
    options = replace(options, input=str(source))
    first, second = prepare(options).clips
    for suffix in (".wav", ".lab"):
        (options.output / first["file"]).with_suffix(suffix).unlink()
    for suffix in (".wav", ".txt"):
        (source / f"take 0{suffix}").rename(source / f"renamed{suffix}")
    for _ in range(3):
        assert [clip["file"] for clip in prepare(options).clips] == [second["file"]]


def test_recordings_whose_clips_were_deleted_are_nobody_elses(folder, options):
    options, said = replace(options, input=str(folder(2))), []
    prepare(replace(options, speaker="Anna"))
    options = replace(
        options,
        speaker="Ben",
        input=str(Path(options.input).rename(options.output / "../../moved")),
    )
    prepare(options, say=said.append)
    assert "as spoken by Anna and by Ben" in said[-1]
    shutil.rmtree(options.output / "Anna")
    said.clear()
    prepare(options, say=said.append)
    assert not [line for line in said if "as spoken by" in line]


def test_what_is_odd_about_recordings_is_said(folder, options):
    source = folder(2)
    prepare(replace(options, input=str(source), speaker="Anna"))
    (source / "take 1.txt").write_bytes("Caf\xe9 au lait.".encode("cp1252"))
    said = []
    summary = prepare(replace(options, input=str(source), speaker="Ben"), say=said.append)
    assert "take 1.wav: the text is not UTF-8 and was read as cp1252" in said[0]
    assert "take 0.wav" in said[1]
    assert "in this dataset as spoken by Anna and by Ben" in said[1]
    assert [account.get("encoding") for account in summary.recordings] == [
        None,
        None,
        None,
        "cp1252",
    ]


@pytest.mark.slow
def test_any_number_of_workers_makes_the_same(folder, options, tmp_path):
    options = replace(options, input=str(folder(4)))
    prepare(replace(options, num_workers=1))
    others = replace(options, output=tmp_path / "two" / "voice", num_workers=2)
    prepare(others)
    assert tree(options.output) == tree(others.output)


KILLED = """
import os, signal, sys
replace, left = os.replace, [int(sys.argv[1])]
def dying(*args):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*args)
os.replace = dying
import prepare_dataset
prepare_dataset.main(sys.argv[2:])
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(folder, options, tmp_path):
    options = replace(options, input=str(folder(4)), num_workers=1)
    prepare(options)
    expected = tree(options.output)
    output = tmp_path / "killed" / "voice"
    command = ["--input", options.input, "--output", str(output), "--speaker", "Me"]
    command += ["--normalize", "--split-long", "--num-workers", "1"]
    for writes in (1, 5):
        result = subprocess.run(
            [sys.executable, "-c", KILLED, str(writes), *command], cwd=REPOSITORY
        )
        assert result.returncode == -signal.SIGKILL
        assert not (output / "dataset_summary.json").exists()
    assert (output / "Me").is_dir()
    prepare(replace(options, output=output))
    assert tree(output) == expected


def test_a_killed_run_with_other_options_leaves_no_stray_clips(take, options, monkeypatch):
    recording = take(8)
    recording.path.with_suffix(".txt").write_text(" ".join(recording.texts))
    options = replace(options, input=str(recording.path.parent), segment_duration=4.0)

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    monkeypatch.setattr("fish_speech.preparation.records.RecordStore.commit", die)
    with pytest.raises(Killed):
        prepare(options)
    monkeypatch.undo()
    assert len(list(options.output.rglob("*.wav"))) > 4
    summary = prepare(replace(options, segment_duration=20.0))
    assert len(list(options.output.rglob("*.wav"))) == len(summary.clips) < 4


def test_a_full_disk_keeps_what_is_finished(folder, options, monkeypatch, tmp_path):
    options = replace(options, input=str(folder(3)), num_workers=1)
    count = []

    def full(path, *args):
        count.append(path)
        if len(count) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save_audio(path, *args)

    monkeypatch.setattr("fish_speech.preparation.recording.save_audio", full)
    with pytest.raises(OSError, match="No space left"):
        prepare(options)
    monkeypatch.undo()
    assert len(list(options.output.rglob("*.lab"))) == 2
    said = []
    prepare(options, say=said.append)
    assert said == ["prepared before: 2 of 3 recordings"]
    whole = replace(options, output=tmp_path / "whole" / "voice")
    prepare(whole)
    assert tree(options.output) == tree(whole.output)


def test_a_long_recording_gets_its_script_from_a_recogniser(take, options, reader):
    recording = take(12, (0.4, 0.7))
    recording.path.with_suffix(".txt").write_text("\n\n".join(recording.texts))
    options = replace(options, input=str(recording.path.parent), auto_transcribe=True)
    listener = reader(recording, mishear={"the": "a", "river": "liver"})
    summary = prepare(options, recogniser=listener)
    check_texts(summary, recording)
    assert any(0 < clip["disagreement"] < 0.3 for clip in summary.clips)
    assert all("estimated" not in clip for clip in summary.clips)
    asked = listener.asked
    prepare(replace(options, normalize=False), recogniser=listener)  # transcribed before
    assert listener.asked == asked > 0


def test_the_text_of_a_recording_that_stays_whole_is_no_estimate(options):
    recording = REPOSITORY / "samples" / "rms_001.flac"
    options = replace(options, input=str(recording), segment_duration=2.0)
    (clip,) = prepare(options).clips
    assert clip["text"] == recording.with_suffix(".txt").read_text().strip()
    assert "estimated" not in clip


def test_a_long_recording_gets_its_script_without_a_recogniser(take, options, reader):
    recording = take(16, (0.4, 0.7, 0.3))
    recording.path.with_suffix(".lab").write_text(" ".join(recording.texts))
    summary = prepare(replace(options, input=str(recording.path)))
    check_texts(summary, recording)
    assert all(clip["estimated"] for clip in summary.clips)
    count = len(summary.clips)
    assert f"\nEstimated: the text of {count} of {count} clips is what should" in describe(summary)
    (recording.path.parent / "long.lab").unlink()
    with_words = replace(options, input=str(recording.path), auto_transcribe=True)
    heard = prepare(with_words, recogniser=reader(recording))
    assert "Estimated" not in describe(heard)


@pytest.mark.parametrize(
    ("model", "language", "detected", "hint"),
    [
        ("base", None, "de", True),
        ("base", None, "en", False),
        ("base", "de", "de", False),
        ("medium", None, "de", False),
    ],
)
def test_a_small_model_that_takes_speech_for_another_language_is_told(
    folder, options, model, language, detected, hint
):
    class Listener:
        identity = "listener"

        def __init__(self, language=None):
            self.language = language

        def detect_language(self, samples):
            return detected

        def with_language(self, language):
            return Listener(language)

        def transcribe(self, samples):
            return Transcription("Das Boot liegt am Strand und das Meer ist weit.")

    options = replace(
        options, input=str(folder(1, texts=False)), auto_transcribe=True, whisper_model=model,
        language=language,
    )  # fmt: skip
    said = []
    prepare(options, recogniser=Listener(language), say=said.append)
    assert [line.startswith("whisper base took speech for de: if that") for line in said] == (
        [True] * hint
    )


def test_a_script_that_is_read_without_a_pause_is_cut_and_flagged(tmp_path, options, utterances):
    voiced = [u.samples[np.abs(u.samples) > 0.003] for u in utterances]
    soundfile.write(tmp_path / "a.flac", np.concatenate(voiced)[: 60 * 16_000], 16_000)
    (tmp_path / "a.txt").write_text(script := " ".join(u.text for u in utterances))
    options = replace(options, segment_duration=5.0, normalize=False)
    summary = prepare(replace(options, input=str(tmp_path / "a.flac")))
    seconds = [clip["duration"] for clip in summary.clips]
    assert max(seconds) < sum(seconds) / 2
    assert " ".join(clip["text"] for clip in summary.clips).split() == script.split()
    forced = [clip for clip in summary.clips if clip.get("cut_in_speech")]
    assert forced
    assert all(clip["flags"] for clip in forced)


@pytest.mark.slow
def test_real_recognition_of_real_speech_puts_no_word_into_a_wrong_clip(take, options):
    pocketsphinx = pytest.importorskip("pocketsphinx")

    class Sphinx:
        identity = "pocketsphinx"
        decoder = pocketsphinx.Decoder(samprate=16_000, loglevel="FATAL")

        def transcribe(self, samples):
            self.decoder.start_utt()
            sound = (32767 * np.clip(samples, -1, 1)).astype("<i2").tobytes()
            self.decoder.process_raw(sound, full_utt=True)
            self.decoder.end_utt()
            words = tuple(
                Word(part.word.split("(")[0], part.start_frame / 100, part.end_frame / 100)
                for part in self.decoder.seg()
                if part.word[0] not in "<["
            )
            return Transcription(" ".join(word.text for word in words), words)

    recording = take(7, (0.35, 0.6))
    recording.path.with_suffix(".txt").write_text(" ".join(recording.texts))
    options = replace(options, input=str(recording.path), auto_transcribe=True)
    summary = prepare(replace(options, segment_duration=5.0), recogniser=Sphinx())
    check_texts(summary, recording)
    assert np.mean([clip["disagreement"] for clip in summary.clips]) < 0.25


def check_texts(summary, recording) -> None:
    assert len(summary.clips) > 3
    assert " ".join(clip["text"] for clip in summary.clips) == " ".join(recording.texts)
    for clip in summary.clips:
        inside = [
            text
            for (start, end), text in zip(recording.spans, recording.texts, strict=True)
            if start + 0.2 > clip["start"] and end - 0.2 < clip["end"]
        ]
        assert clip["text"] == " ".join(inside)


def test_recordings_without_transcripts_are_recognised(take, options, reader):
    recording = take(6)
    options = replace(options, input=str(recording.path), auto_transcribe=True)
    summary = prepare(options, recogniser=reader(recording))
    assert " ".join(clip["text"] for clip in summary.clips) == " ".join(recording.texts)


def test_a_recording_has_one_language(take, options, reader, monkeypatch):
    recording = take(6, (0.8,))
    listener, asked = reader(recording), []

    class Model:
        def __init__(self, *_, **__):
            pass

        def transcribe(self, samples, language=None, word_timestamps=False, **_):
            asked.append(language)
            short = len(samples) < 20 * 16_000
            chances = [("cy", 0.9), ("en", 0.1)] if short else [("en", 0.7), ("cy", 0.3)]
            info = SimpleNamespace(all_language_probs=None if language else chances)
            if not word_timestamps:
                return iter([]), info
            result = listener.transcribe(samples)
            text = result.text if (language or chances[0][0]) == "en" else "Mae hi'n braf heddiw."
            words = [SimpleNamespace(word=w.text, start=w.start, end=w.end) for w in result.words]
            part = SimpleNamespace(text=text, words=words, no_speech_prob=0.0, avg_logprob=-0.1)
            return iter([part]), info

    monkeypatch.setitem(sys.modules, "faster_whisper", SimpleNamespace(WhisperModel=Model))
    monkeypatch.setattr(transcribe, "find_spec", lambda name: name)
    options = replace(options, input=str(recording.path), auto_transcribe=True, device="cpu")
    options = replace(options, segment_duration=5.0)
    for _ in range(2):
        summary = prepare(options)
        assert " ".join(clip["text"] for clip in summary.clips) == " ".join(recording.texts)
        assert summary.recordings[0]["language"] == "en"
        done = len(asked)
        options = replace(options, normalize=False)  # what was transcribed is kept
    assert len(asked) == done > len(summary.clips)
    prepare(replace(options, language="en", normalize=True))  # as it was detected to be
    assert len(asked) == done


def test_texts_that_may_be_hallucinations_or_lack_words_are_flagged(take, options, reader):
    recording = take(6)
    options = replace(options, input=str(recording.path), auto_transcribe=True)
    listener = reader(recording)
    listener.words = [word for word in listener.words if not 4 < word.start < 9]
    transcribe = listener.transcribe

    def doubting(samples):
        result = transcribe(samples)
        return replace(result, no_speech=0.85) if listener.asked == 2 else result

    listener.transcribe = doubting
    first, second, *others = prepare(options, recogniser=listener).clips
    assert (first["flags"], second["flags"]) == (["unheard"], ["doubted"])
    assert (first["unheard"] > 3, second["no_speech"]) == (True, 0.85)
    assert not any(clip["flags"] for clip in others)


def test_clips_of_a_data_set_are_compared_with_the_recogniser(folder, options, tmp_path):
    class Deaf:
        identity = "deaf"

        def transcribe(self, samples):
            return Transcription("Something else entirely.")

    prepare(replace(options, input=str(folder(2))))
    copy = replace(options, input=str(tmp_path / "data"), output=tmp_path / "check_data")
    copy = replace(copy, speaker=None, auto_transcribe=True)
    summary = prepare(copy, recogniser=Deaf())
    assert [clip["flags"] for clip in summary.clips] == [["disagreement"]] * 2
    assert summary.clips[0]["text"] != "Something else entirely."
    assert summary.speakers == ["Me"]


def test_transcripts_need_no_model(folder, options, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("fish_speech.preparation.pipeline.load_recogniser", refuse)
    summary = prepare(replace(options, input=str(folder(1)), auto_transcribe=True))
    assert len(summary.clips) == 1


def test_a_model_that_would_only_help_is_done_without(take, options, monkeypatch):
    def offline(*_, **__):
        raise ValueError("whisper model 'base' can't be downloaded")

    monkeypatch.setattr("fish_speech.preparation.pipeline.load_recogniser", offline)
    recording = take(6)
    options = replace(options, input=str(recording.path), auto_transcribe=True)
    with pytest.raises(ValueError, match="can't be downloaded"):
        prepare(options)
    recording.path.with_suffix(".txt").write_text(" ".join(recording.texts))
    said = []
    assert all(clip["estimated"] for clip in prepare(options, say=said.append).clips)
    assert said == ["whisper model 'base' can't be downloaded; going on without it"]


def test_without_a_model_what_has_its_text_is_prepared_and_the_rest_named(
    folder, options, monkeypatch
):
    def offline(*_, **__):
        raise ValueError("no network")

    monkeypatch.setattr("fish_speech.preparation.pipeline.load_recogniser", offline)
    source = folder(2)
    sorted(source.rglob("*.txt"))[0].unlink()
    said = []
    summary = prepare(replace(options, input=str(source), auto_transcribe=True), say=said.append)
    assert said == ["no network; going on without it"]
    assert len(summary.clips) == 1
    (left_out,) = summary.skipped
    assert "no text beside it" in left_out["reason"]


def test_many_recordings_without_a_model_are_named_soon(tmp_path, options, monkeypatch):
    def offline(*_, **__):
        raise ValueError("no network")

    monkeypatch.setattr("fish_speech.preparation.pipeline.load_recogniser", offline)
    options = replace(options, auto_transcribe=True, split_long=False)
    bare = Recording(tmp_path / "x.wav", "x.wav", "file:///x.wav", "Me", "x", "0")
    recordings = [replace(bare, digest=str(number)) for number in range(4000)]
    recordings.append(replace(bare, transcript="The only one with its text."))
    begun = time.process_time()
    jobs, *_ = _make_jobs(options, recordings, None, lambda message: None)
    assert time.process_time() - begun < 0.5
    assert [job.recording.problem is None for job in jobs] == [False] * 4000 + [True]


def test_clips_that_are_there_by_hand_are_named(folder, options):
    options = replace(options, input=str(folder(1)))
    said = []
    prepare(options, say=said.append)
    assert not said
    other = options.output / "Me" / "mine.wav"
    other.parent.mkdir(exist_ok=True)
    soundfile.write(other, np.zeros(8000), 16000)
    other.with_suffix(".lab").write_text("words")
    prepare(options, say=said.append)
    assert said[-1] == (f"also in this dataset (added by hand), and will be trained on: {other}")


def test_only_the_first_minutes_are_used(take, options, reader):
    recording = take(8)
    options = replace(options, input=str(recording.path), max_duration=9 / 60)
    summary = prepare(replace(options, auto_transcribe=True), recogniser=reader(recording))
    assert summary.recordings[0]["duration"] == 9
    assert max(clip["end"] for clip in summary.clips) <= 9
    recording.path.with_suffix(".txt").write_text(" ".join(recording.texts))
    summary = prepare(options)  # the script says more than these minutes
    assert "its transcript can't be cut with it" in summary.skipped[0]["reason"]
    assert summary.failed == 1
    assert len(prepare(replace(options, max_duration=60)).clips) > 2


def test_the_first_minutes_end_with_a_whole_word(take, options, reader):
    recording = take(8)
    limit = recording.spans[2][0] + 1.0
    options = replace(options, input=str(recording.path), auto_transcribe=True)
    options = replace(options, max_duration=limit / 60, segment_duration=4.0)
    summary = prepare(options, recogniser=reader(recording))
    assert not any(clip["flags"] for clip in summary.clips)
    assert summary.clips[-1]["end"] < limit - 0.2
    (entry,) = summary.skipped
    assert (entry["reason"], entry["end"]) == ("--max-duration ends in it", round(limit, 3))
    (account,) = summary.recordings
    assert account["duration"] == pytest.approx(limit, abs=1e-3)


def test_the_first_minutes_of_speech_without_a_pause_end_flagged(tmp_path, options, utterances):
    voiced = np.concatenate([u.samples[np.abs(u.samples) > 0.003] for u in utterances[:3]])
    soundfile.write(tmp_path / "a.wav", np.tile(voiced, 2), 16_000)
    options = replace(options, input=str(tmp_path / "a.wav"), auto_transcribe=True)

    class Listener:
        identity = "listener"

        def transcribe(self, samples):
            return Transcription("What was said in these few seconds of the recording.")

    options = replace(options, max_duration=3.0 / 60)
    (clip,) = prepare(options, recogniser=Listener()).clips
    assert "cut_in_speech" in clip["flags"]


def test_no_wanted_duration_makes_clips_that_are_too_long(take, options):
    recording = take(20)
    recording.path.with_suffix(".txt").write_text(" ".join(recording.texts))
    options = replace(options, input=str(recording.path), segment_duration=40.0)
    for longest in (30.0, 12.0):
        options = replace(options, thresholds=Thresholds(longest=longest))
        assert 8 < max(clip["duration"] for clip in prepare(options).clips) <= longest


def test_two_runs_on_one_data_set_exclude_each_other(folder, options):
    source = folder(1)
    with (
        files.exclusive(options.output, "x"),
        pytest.raises(ValueError, match="voice is in use by process"),
    ):
        prepare(replace(options, input=str(source)))


def test_what_others_are_writing_below_the_output_is_left_alone(folder, options):
    options = replace(options, input=str(folder(1)))
    prepare(options)
    name = ".tmp-999-0123456789abcdef.wav"
    ours = [options.output / ".prepared" / "Me" / name, options.output / "Me" / name]
    with files.atomic_path(options.output / "dataset_summary.json") as left:
        left.touch()
        ours.append(left.with_name(left.name.replace(str(os.getpid()), "999")))
    theirs = [
        options.output / "other" / "Me" / name, options.output / ".git" / ".tmp-x" / "file",
        options.output / name,
    ]  # fmt: skip
    for path in (*ours, *theirs):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    prepare(options)
    assert [path.exists() for path in (*ours, *theirs)] == [False] * 3 + [True] * 3


def test_a_folder_of_data_sets_is_not_made_one(folder, options):
    options = replace(options, input=str(folder(1)))
    prepare(options)
    with pytest.raises(ValueError, match=r"holds datasets already \(voice\); give the folder"):
        prepare(replace(options, output=options.output.parent))
    assert {path.name for path in options.output.parent.iterdir()} == {"voice"}


def test_strict_stops_at_the_first_failure(folder, options):
    source = folder(3)
    (source / "take 0.txt").unlink()
    summary = prepare(replace(options, input=str(source), strict=True, num_workers=1))
    assert (len(summary.clips), summary.failed) == (0, 1)
    assert len(prepare(replace(options, input=str(source))).clips) == 2


def test_no_worker_goes_on_when_the_summary_is_written(folder, options, monkeypatch):
    source, summaries = folder(3), []
    (source / "take 0.txt").unlink()

    def working(function, jobs, num_workers, desc):
        try:
            yield from map(prepare_recording, jobs)
        finally:
            summaries.append((options.output / "dataset_summary.json").exists())

    monkeypatch.setattr("fish_speech.preparation.pipeline.in_processes", working)
    assert prepare(replace(options, input=str(source), strict=True)).failed == 1
    assert summaries == [False]


@pytest.mark.parametrize(
    "change",
    [{"segment_duration": 0}, {"min_duration": 20}, {"max_duration": -1}, {"num_workers": -1}],
)
def test_impossible_values_are_refused(folder, options, change):
    flag = "--" + next(iter(change)).replace("_", "-")
    with pytest.raises(ValueError, match=flag):
        prepare(replace(options, input=str(folder(1)), **change))
