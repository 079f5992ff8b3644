"""What became of every recording is recorded, and what people corrected by hand stays."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from fish_speech.preparation.options import Thresholds
from fish_speech.preparation.pipeline import prepare
from fish_speech.preparation.sources import InputFile


def test_corrections_in_labels_are_kept_and_count(folder, options):
    options = replace(options, input=str(folder(2)))
    prepare(options)
    (options.output / "Me" / "take_0_0001.lab").write_text("Corrected by hand.")
    assert prepare(options).clips[0]["text"] == "Corrected by hand."


def test_what_cannot_be_done_again_keeps_its_clips(folder, options):
    options = replace(options, input=str(folder(2)))
    prepare(options)
    before = contents(options.output / "Me")
    Path(options.input, "take 0.txt").unlink()
    Path(options.input, "take 1.wav").write_bytes(b"broken since")
    summary = prepare(replace(options, normalize=False))
    assert contents(options.output / "Me") == before
    assert (len(summary.clips), summary.failed) == (2, 2)
    reasons = [entry["reason"] for entry in summary.skipped]
    assert all(reason.endswith("; its clips from before are kept") for reason in reasons)
    assert "has no transcript" in reasons[0]
    Path(options.input, "take 0.txt").write_text("Here again.")
    assert prepare(replace(options, normalize=False)).failed == 1


def test_a_deleted_label_comes_back_and_a_deleted_clip_stays_away(folder, options, utterances):
    options = replace(options, input=str(folder(2)))
    prepare(options)
    label = options.output / "Me" / "take_0_0001.lab"
    label.unlink()
    prepare(options)
    assert label.read_text() == utterances[0].text
    for path in (options.output / "Me").glob("take_1*"):
        path.unlink()
    others = replace(options, input=str(folder(1, "others")), speaker="Other")
    for again in (options, others, options):
        summary = prepare(again)
        files = {clip["file"] for clip in summary.clips}
        assert files - {"Other/take_0_0001.wav"} == {"Me/take_0_0001.wav"}
        assert "its clip Me/take_1_0001.wav was deleted" in [s["reason"] for s in summary.skipped]
    Path(options.input, "take 1.wav").unlink()
    assert [s["source"] for s in prepare(others).skipped] == []
    for path in options.output.glob("*/*.wav"):
        path.unlink()
    assert len(prepare(options).clips) == 1  # all are gone: from the beginning


def test_a_deleted_clip_stays_away_when_the_others_are_made_anew(take, options):
    recording = take(6, (0.8,))
    recording.path.with_suffix(".txt").write_text(" ".join(recording.texts))
    options = replace(options, input=str(recording.path), segment_duration=4.0)
    before = prepare(options).clips
    assert len(before) > 2
    (options.output / before[1]["file"]).unlink()
    after = prepare(replace(options, normalize=False))
    spans = [(clip["start"], clip["end"]) for clip in before]
    assert [(clip["start"], clip["end"]) for clip in after.clips] == [spans[0], *spans[2:]]
    assert f"its clip {before[1]['file']} was deleted" in [s["reason"] for s in after.skipped]
    assert prepare(replace(options, normalize=False)) == after


def test_a_deleted_clip_that_is_put_back_stays_and_stops_nothing(take, options):
    recording = take(6, (0.8,))
    recording.path.with_suffix(".txt").write_text(" ".join(recording.texts))
    options = replace(options, input=str(recording.path), segment_duration=4.0)
    clips = prepare(options).clips
    deleted = options.output / clips[1]["file"]
    content = deleted.read_bytes()
    deleted.unlink()
    prepare(options)
    deleted.write_bytes(content)
    after = prepare(replace(options, normalize=False))
    assert len(after.clips) == len(clips) - 1
    assert not [entry for entry in after.skipped if "take the place" in entry["reason"]]
    assert deleted.read_bytes() == content


@pytest.mark.parametrize("replaced", [0, 1, 4])
def test_a_deleted_clip_stays_away_after_a_crash_too(take, options, monkeypatch, replaced):
    recording = take(6, (0.8,))
    recording.path.with_suffix(".txt").write_text(" ".join(recording.texts))
    options = replace(options, input=str(recording.path), segment_duration=4.0)
    others = replace(options, output=options.output.with_name("others"))
    for output in (options.output, others.output):
        before = prepare(replace(options, output=output)).clips
        (output / before[1]["file"]).unlink()
    expected = prepare(replace(others, normalize=False))
    left = [replaced]

    class Killed(BaseException):
        pass

    def dying(*paths):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        os.replace(*paths)

    monkeypatch.setattr("fish_speech.preparation.records.os", SimpleNamespace(replace=dying))
    with pytest.raises(Killed):  # while old and new clips change places
        prepare(replace(options, normalize=False))
    monkeypatch.undo()
    assert prepare(replace(options, normalize=False)) == expected
    assert len(expected.clips) == len(before) - 1
    trees = [
        {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        for folder in (options.output, others.output)
    ]
    assert trees[0] == trees[1]


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_clips_that_were_made_by_hand_stay(folder, options, suffix):
    options = replace(options, input=str(folder(2)))
    (speaker := options.output / "Me").mkdir(parents=True)
    for name in (f"take_0_0001{suffix}", "take_0_0001.lab", "take_0_0007.wav", "take_0_0007.lab"):
        (speaker / name).write_text(f"{name}, by hand")
    by_hand = contents(speaker)
    for normalize in (True, False):
        summary = prepare(replace(options, normalize=normalize))
        assert by_hand.items() <= contents(speaker).items()
        assert [clip["file"] for clip in summary.clips] == ["Me/take_1_0001.wav"]
        assert summary.failed == 1
        (entry,) = summary.skipped
        assert f"Me/take_0_0001{suffix}" in entry["reason"]
    for path in speaker.glob("take_0_0001*"):
        path.rename(path.with_stem("mine"))
    made = set(speaker.glob("take_1*"))
    by_hand = {path: data for path, data in contents(speaker).items() if path not in made}
    for normalize in (True, False):
        summary = prepare(replace(options, normalize=normalize))
        assert (len(summary.clips), summary.failed) == (2, 0)
        assert by_hand.items() <= contents(speaker).items()


def test_a_speaker_in_capitals_is_the_same_one(folder, options):
    options = replace(options, input=str(folder(2)))
    prepare(options)
    for name in ("ME", "Me"):
        summary = prepare(replace(options, speaker=name, normalize=False))
        prepare(replace(options, speaker=name))
        assert (len(summary.clips), summary.speakers, summary.failed) == (2, [name], 0)
        assert len(list(options.output.glob("*/*.wav"))) == 2


def test_corrections_survive_rejection(folder, options):
    options = replace(options, input=str(folder(2)))
    prepare(options)
    label = options.output / "Me" / "take_0_0001.lab"
    label.write_text("Corrected by hand.")
    strict = replace(options, drop_flagged=True, thresholds=Thresholds(min_snr=99))
    for _ in range(2):
        assert prepare(strict).clips == []
    assert prepare(options).clips[0]["text"] == "Corrected by hand."
    assert label.read_text() == "Corrected by hand."


def test_corrections_survive_other_options_where_they_fit(take, options, monkeypatch):
    recording = take(8)
    script = recording.path.with_suffix(".txt")
    script.write_text(" ".join(recording.texts))
    options = replace(options, input=str(recording.path), segment_duration=4.0)
    label = options.output / "Me" / "long_0002.lab"
    old = prepare(options).clips[1]["text"]
    label.write_text(old.upper())
    said = []
    louder = replace(options, normalize=False)

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    monkeypatch.setattr("fish_speech.preparation.records.RecordStore._apply_corrections", die)
    with pytest.raises(Killed):  # between the old clips and the new ones
        prepare(louder)
    monkeypatch.undo()
    assert prepare(louder, say=said.append).clips[1]["text"] == old.upper()
    assert said == []
    prepare(replace(options, segment_duration=20.0), say=said.append)
    (message,) = said
    assert old.upper()[:60] in message
    (kept,) = json.loads((options.output / "corrections.json").read_text())
    assert str(options.output / "corrections.json") in message
    assert (kept["text"], kept["instead_of"]) == (old.upper(), old)
    assert prepare(options).clips[1]["text"] == old.upper()
    label.write_text(old)  # not to be corrected any more
    assert prepare(louder).clips[1]["text"] == old


def test_a_correction_stays_where_only_the_silence_is_cut_off(folder, options):
    options = replace(options, input=str(folder(2)), split_long=False)
    prepare(options)
    label = options.output / "Me" / "take_0_0001.lab"
    label.write_text("Corrected by hand.")
    trimmed = replace(options, split_long=True)
    assert prepare(trimmed).clips[0]["text"] == "Corrected by hand."
    label.write_text(Path(options.input, "take 0.txt").read_text())
    assert prepare(options).clips[0]["text"] != "Corrected by hand."
    assert prepare(trimmed).clips[0]["text"] != "Corrected by hand."


def test_corrections_of_recognised_texts_stay_whoever_recognises(take, options, reader):
    recording = take(6)
    options = replace(options, input=str(recording.path), auto_transcribe=True)
    prepare(options, recogniser=reader(recording))
    (options.output / "Me" / "long_0001.lab").write_text("Corrected by hand.")
    other = reader(recording, mishear={"The": "A", "the": "a"})
    other.identity = "other"
    summary = prepare(options, recogniser=other)
    assert summary.clips[0]["text"] == "Corrected by hand."
    assert " a " in summary.clips[1]["text"]


def test_a_new_transcript_wins_over_an_old_correction(folder, options):
    options = replace(options, input=str(folder(1)))
    prepare(options)
    (options.output / "Me" / "take_0_0001.lab").write_text("Corrected by hand.")
    Path(options.input, "take 0.txt").write_text("What was really said.")
    said = []
    assert prepare(options, say=said.append).clips[0]["text"] == "What was really said."
    assert "'Corrected by hand.'" in said[0]


def test_a_record_with_a_key_of_another_version_counts(folder, options):
    options = replace(options, input=str(folder(1)))
    prepare(options)
    record = options.output / ".prepared" / "Me" / "take_0.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "mood": "calm"}))
    said = []
    prepare(options, say=said.append)
    assert said == ["prepared before: 1 of 1 recording"]


def damage(record: Path, how: str) -> None:
    values = json.loads(record.read_text())
    if how == "a clip lacks a key":
        del values["clips"][0]["speech_share"]
    elif how == "its clips are elsewhere":
        values["clips"][0]["file"] = "../../precious.wav"
    elif how == "another type":
        values["skipped"] = "none"
    record.write_text("" if how == "empty" else json.dumps([] if how == "a list" else values))


@pytest.mark.parametrize(
    "how", ["empty", "a list", "another type", "a clip lacks a key", "its clips are elsewhere"]
)
def test_a_damaged_record_is_named_and_costs_no_correction(folder, options, how, utterances):
    options = replace(options, input=str(folder(2)))
    prepare(options)
    label = options.output / "Me" / "take_0_0001.lab"
    label.write_text("Corrected by hand.")
    (precious := options.output.parent.parent / "precious.wav").touch()
    record = options.output / ".prepared" / "Me" / "take_0.json"
    damage(record, how)
    said = []
    other = replace(options, segment_duration=9.0)  # which cuts these clips alike
    summary = prepare(other, say=said.append)
    assert [clip["text"] for clip in summary.clips] == ["Corrected by hand.", utterances[1].text]
    assert summary.failed == 0
    assert str(record) in said[0]
    assert said[1:] == [
        "the text 'Corrected by hand.' of Me/take_0_0001.wav is kept, as corrected by hand"
    ]
    assert label.read_text() == "Corrected by hand."
    assert precious.exists()
    assert len(prepare(replace(other, normalize=False)).clips) == 2
    assert label.read_text() == "Corrected by hand."


def test_a_damaged_record_with_other_cuts_loses_no_text(take, options):
    recording = take(8)
    recording.path.with_suffix(".txt").write_text(" ".join(recording.texts))
    options = replace(options, input=str(recording.path), segment_duration=4.0)
    prepare(options)
    record = options.output / ".prepared" / "Me" / "long.json"
    record.write_text("{")
    before = contents(options.output / "Me")
    summary = prepare(replace(options, segment_duration=20.0))
    assert summary.failed == 1
    assert "long.json: not a JSON file" not in str(summary.skipped)
    assert "take those of before" in summary.skipped[0]["reason"]
    assert contents(options.output / "Me") == before
    assert prepare(options).failed == 0
    assert contents(options.output / "Me") == before


@pytest.mark.parametrize("damaged", ["not UTF-8", "a folder"])
@pytest.mark.parametrize("anew", [False, True])
def test_a_text_that_cannot_be_read_is_one_failure(folder, options, damaged, anew):
    options = replace(options, input=str(folder(2)))
    prepare(options)
    label = options.output / "Me" / "take_0_0001.lab"
    if damaged == "a folder":
        label.unlink()
        label.mkdir()
    else:
        label.write_bytes(b"caf\xe9")
    folder(3)
    said = []
    summary = prepare(replace(options, normalize=not anew), say=said.append)
    assert [clip["file"][:9] for clip in summary.clips] == ["Me/take_1", "Me/take_2"]
    assert summary.failed == 1 + anew  # the recording, too, where it was to be prepared anew
    assert all("take_0_0001.lab" in entry["reason"] for entry in summary.skipped)
    assert "Me/take_0_0001.wav can't be used" in summary.skipped[-1]["reason"]
    assert not [line for line in said if "added by hand" in line]
    assert label.is_dir() or label.read_bytes() == b"caf\xe9"


@pytest.mark.parametrize("anew", [False, True])
def test_an_emptied_text_is_no_correction(folder, options, anew, utterances):
    options = replace(options, input=str(folder(1)))
    prepare(options)
    label = options.output / "Me" / "take_0_0001.lab"
    label.write_text(" ...\n")
    said = []
    (clip,) = prepare(replace(options, normalize=not anew), say=said.append).clips
    assert clip["text"] == label.read_text() == utterances[0].text
    assert f"{label}: has no letter in it; the text from before is put back" in said
    assert not (options.output / "corrections.json").exists()


@pytest.mark.parametrize("size", [0, 44, 100_000])
def test_a_clip_that_breaks_off_is_made_again_or_named(folder, options, size):
    options = replace(options, input=str(folder(2)))
    prepare(options)
    clip = options.output / "Me" / "take_0_0001.wav"
    whole = clip.read_bytes()
    clip.write_bytes(whole[:size])
    others = replace(options, input=str(folder(1, "others")), speaker="Other")
    summary = prepare(others)
    assert [entry["file"] for entry in summary.clips] == [
        "Me/take_1_0001.wav", "Other/take_0_0001.wav",
    ]  # fmt: skip
    assert summary.failed == 1
    assert "Me/take_0_0001.wav can't be used: it breaks off" in summary.skipped[0]["reason"]
    assert len(prepare(options).clips) == 3
    assert clip.read_bytes() == whole


def test_the_note_of_a_rejected_clip_that_is_none_is_named(folder, options):
    options = replace(options, input=str(folder(1)), drop_flagged=True)
    strict = replace(options, thresholds=Thresholds(min_snr=99))
    prepare(strict)
    (options.output / "rejected" / "Me" / "take_0_0001.json").write_text("[]")
    summary = prepare(strict)
    assert summary.failed == 1
    assert "take_0_0001.json: not the note of a rejected clip" in summary.skipped[0]["reason"]


def test_seconds_of_recordings_that_fail_are_left_out(folder, options, utterances):
    source = folder(1, texts=False)
    (account,) = prepare(replace(options, input=str(source))).recordings
    assert account["duration"] == pytest.approx(utterances[0].duration, abs=0.01)
    assert account["left_out"] == account["duration"]
    assert account["silence"] == account["in_clips"] == 0


def test_flagged_clips_are_moved_with_the_reason_and_come_back(folder, options):
    options = replace(options, input=str(folder(3)), drop_flagged=True)
    summary = prepare(replace(options, thresholds=Thresholds(max_rate=12.0)))
    assert 0 < len(summary.clips) < 3
    (away, *_) = summary.rejected
    assert away["reason"] == "fast_text"
    path = options.output / away["file"]
    assert path.is_file()
    assert not (options.output / Path(away["file"]).relative_to("rejected")).exists()
    assert json.loads(path.with_suffix(".json").read_text())["reason"] == "fast_text"
    assert not list((options.output / "rejected").rglob("*.lab"))  # nothing to train on by accident
    labels = len(list(options.output.rglob("*.lab")))
    assert labels == len(summary.clips)
    assert len(prepare(options).clips) == 3
    assert not list((options.output / "rejected").rglob("*.*"))


def test_every_second_is_accounted_for(take, options, reader):
    recording = take(8, (0.6, 2.5))
    listener = reader(recording)
    listener.words = [word for word in listener.words if not 10 < word.start < 20]  # heard nothing
    options = replace(
        options, input=str(recording.path), auto_transcribe=True, segment_duration=4.0
    )
    summary = prepare(options, recogniser=listener)
    assert any(part["reason"] == "no words were recognised" for part in summary.skipped)
    (account,) = summary.recordings
    total = account["in_clips"] + account["left_out"] + account["silence"]
    assert total == pytest.approx(account["duration"], abs=0.01)
    assert account["left_out"] > 3
    assert account["silence"] > 1
    assert summary.failed == 0


def test_a_failure_that_was_mended_is_forgotten(folder, options):
    source = folder(2, texts=False)
    (source / "take 1.txt").write_text("Now there is one.")
    assert len(prepare(replace(options, input=str(source))).skipped) == 1
    (source / "take 0.wav").unlink()
    assert prepare(replace(options, input=str(source))).skipped == []


def test_a_download_that_failed_under_another_title_is_forgotten_when_it_succeeds(
    folder, options, monkeypatch
):
    path = folder(1) / "take 0.wav"
    origin = {"url": "https://example.org/3", "title": "entry 3"}
    found = [InputFile(path.with_name("none"), "Me", origin=origin, problem="timed out")]
    monkeypatch.setattr("fish_speech.preparation.youtube.fetch", lambda *_, **__: found)
    options = replace(options, input="https://example.org", youtube=True, auto_transcribe=True)
    assert [entry["reason"] for entry in prepare(options).skipped] == ["timed out"]
    found[:] = [InputFile(path, "Me", origin={**origin, "title": "The third"})]
    summary = prepare(options)
    assert [clip["file"] for clip in summary.clips] == ["Me/The_third_0001.wav"]
    assert summary.skipped == []
    assert len(summary.recordings) == 1


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.iterdir()}
