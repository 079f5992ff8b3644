"""Every recording is found, named once and for all, and has the transcript that lies beside it."""

from __future__ import annotations

import codecs
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from fish_speech.preparation import sources
from fish_speech.preparation.sources import InputFile, find_local, name_recordings, read_transcript

TEXT = "Grüße aus Köln, schöne Straße – für alle Gäste übrigens heute geöffnet."


def put(path, data: bytes = b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def names(found: list[InputFile], owners=None) -> list[str]:
    return [recording.name for recording in name_recordings(found, owners or {})]


@pytest.mark.parametrize(
    "data",
    [
        TEXT.encode(),
        codecs.BOM_UTF8 + TEXT.encode(),
        TEXT.encode("utf-16"),
        codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
        TEXT.encode("utf-16-le"),
        TEXT.encode("utf-32"),
        TEXT.replace(" ", "\r\n", 3).encode(),
        TEXT.encode("cp1252"),
    ],
    ids=["utf-8", "bom", "utf-16", "utf-16-be", "no-mark", "utf-32", "crlf", "cp1252"],
)
def test_transcripts_are_read_in_any_encoding(tmp_path, data):
    put(tmp_path / "a.txt", data)
    assert read_transcript(tmp_path / "a.wav")[0] == TEXT


def test_a_label_wins_over_a_text_and_none_is_none(tmp_path):
    assert read_transcript(tmp_path / "a.wav") == (None, None)
    put(tmp_path / "a.TXT", b"shouted")
    assert read_transcript(tmp_path / "a.wav") == ("shouted", None)
    put(tmp_path / "a.txt", b"draft")
    put(tmp_path / "a.lab", b"final")
    assert read_transcript(tmp_path / "a.wav") == ("final", None)


@pytest.mark.parametrize(("data", "reason"), [(b" \r\n", "is empty"), (b"... !", "no letter")])
def test_a_transcript_that_says_nothing_is_a_problem(tmp_path, data, reason):
    put(tmp_path / "a.wav")
    put(tmp_path / "a.txt", data)
    (recording,) = name_recordings([InputFile(tmp_path / "a.wav", "me")], {})
    assert "its transcript a.txt" in recording.problem
    assert reason in recording.problem


def test_recordings_may_be_on_another_drive_of_windows(tmp_path, monkeypatch):
    def other_drive(*_):
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    monkeypatch.setattr("os.path.relpath", other_drive)
    (recording,) = name_recordings([InputFile(put(tmp_path / "a.wav"), "me")], {})
    assert (recording.source, recording.problem) == ((tmp_path / "a.wav").as_posix(), None)


@pytest.mark.parametrize(
    ("address", "path"),
    [
        ("file:///D:/my%20voice/a.wav", "D:\\my voice\\a.wav"),
        ("file://nas/voices/a.wav", "\\\\nas\\voices\\a.wav"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_recordings_on_drives_and_shares_of_windows_have_not_vanished(monkeypatch, address, path):
    import nturl2path

    monkeypatch.setattr(sources, "url2pathname", nturl2path.url2pathname)
    monkeypatch.setattr(os.path, "lexists", lambda looked_for: looked_for == path)
    monkeypatch.setattr(os, "name", "nt")
    vanished = sources.has_vanished(address)
    monkeypatch.undo()
    assert not vanished


def test_folders_that_are_taken_for_one_speaker_are_said(tmp_path):
    for folder in ("सीता", "सोता", "Anna Maria", "Anna_Maria", "Bob"):
        put(tmp_path / folder / "a.wav")
    said = []
    found = find_local(tmp_path, None, "voice", say=said.append)
    assert {item.speaker for item in found} == {"सीता", "सोता", "Anna_Maria", "Bob"}
    (message,) = said
    assert "one speaker, Anna_Maria: the folders Anna Maria, Anna_Maria;" in message
    find_local(tmp_path, "Zoe", "voice", say=said.append)
    assert len(said) == 1


def test_the_first_subfolder_is_the_speaker_unless_one_is_given(tmp_path):
    for name in ("b.wav", "Anna Maria/a.wav", "Bob/day 1/c.wav"):
        put(tmp_path / name)
    found = find_local(tmp_path, None, "voice")
    assert [item.speaker for item in found] == ["Anna_Maria", "Bob", "voice"]
    assert {item.speaker for item in find_local(tmp_path, "Zoe", "voice")} == {"Zoe"}


def test_in_a_prepared_data_set_speakers_are_its_folders_and_rejected_clips_stay_out(tmp_path):
    put(tmp_path / "my_voice" / sources.SUMMARY_NAME)
    for name in ("Anna/a_0001.wav", "Anna/a_0001.lab", "rejected/Anna/b_0001.wav"):
        put(tmp_path / "my_voice" / name)
    for root in (tmp_path, tmp_path / "my_voice"):
        (found,) = find_local(root, None, "voice")
        assert found.speaker == "Anna"
        assert found.is_clip


def test_a_file_that_is_no_sound_needs_no_transcript(tmp_path):
    (tmp_path / "README.md").write_text("# Words")
    (found,) = find_local(tmp_path / "README.md", None, "x")
    assert "not an audio file that can be decoded" in found.problem
    soundfile.write(tmp_path / "sound.wav", np.zeros(800), 8000)
    (tmp_path / "sound.wav").rename(tmp_path / "sound")
    (found,) = find_local(tmp_path / "sound", None, "x")
    assert found.problem is None


def test_nothing_to_prepare_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="--youtube"):
        find_local("https://youtube.com/watch?v=x", None, "voice")
    with pytest.raises(ValueError, match=r"no audio in this folder.*\.flac"):
        find_local(tmp_path, None, "voice")


def test_symlink_loops_end(tmp_path):
    put(tmp_path / "a" / "a.wav")
    (tmp_path / "a" / "again").symlink_to(tmp_path, target_is_directory=True)
    assert len(find_local(tmp_path, None, "voice")) == 1


def test_files_of_one_stem_get_names_of_their_own_and_keep_them(tmp_path):
    found = [
        InputFile(put(tmp_path / name, name.encode()), "me")
        for name in ("a.flac", "a.wav", "A.ogg")
    ]
    first = names(found)
    assert len({name.casefold() for name in first}) == 3
    owners = {
        ("me", recording.name.casefold()): (recording.address, recording.digest, recording.name)
        for recording in name_recordings(found, {})
    }
    newcomer = InputFile(put(tmp_path / "a.aac", b"new"), "me")
    assert names([newcomer, *found], owners)[:3] == first
    assert len(set(names([newcomer, *found], owners))) == 4


def test_a_moved_recording_keeps_its_name_and_a_copy_is_a_problem(tmp_path):
    old = put(tmp_path / "old" / "a.wav", b"same")
    (before,) = name_recordings([InputFile(old, "me")], {})
    moved = put(tmp_path / "new" / "a.wav", b"same")
    owners = {("me", "a"): (before.address, before.digest, "a")}
    assert names([InputFile(moved, "me")], owners) == ["a"]
    one, two = name_recordings([InputFile(moved, "me"), InputFile(old, "me")], {})
    assert one.problem is None
    assert two.problem == f"has the same bytes as {one.source}"
    one, two = name_recordings([InputFile(moved, "me"), InputFile(old, "me")], owners)
    assert (one.path, one.name, one.problem) == (old, "a", None)  # the one that was there before
    assert two.problem == f"has the same bytes as {one.source}"


def test_a_recording_keeps_the_name_that_an_earlier_version_gave_it(tmp_path):
    path = put(tmp_path / "सीता.wav")
    (recording,) = name_recordings([InputFile(path, "me")], {})
    assert recording.name == "सीता"
    owners = {("me", "स_त"): (recording.address, recording.digest, "स_त")}
    assert names([InputFile(path, "me")], owners) == ["स_त"]


def test_a_renamed_recording_keeps_its_name(tmp_path):
    old = put(tmp_path / "Take.wav", b"same")
    (before,) = name_recordings([InputFile(old, "me")], {})
    owners = {("me", "take"): (before.address, before.digest, "Take")}
    new = old.rename(tmp_path / "Better name.wav")
    assert names([InputFile(new, "me")], owners) == ["Take"]
    put(old, b"other")
    both = names([InputFile(new, "me"), InputFile(old, "me")], owners)
    assert len({name.casefold() for name in both}) == 2
    assert names([InputFile(new, "you")], owners) == ["Better_name"]


def test_texts_that_belong_to_no_recording_are_named(tmp_path):
    put(tmp_path / "session_01.flac")
    for name in ("session_1.txt", "session_01.txt", "other.lab"):
        put(tmp_path / name, b"Some words.")
    said = []
    find_local(tmp_path, None, "voice", say=said.append)
    assert len(said) == 1
    assert said[0].startswith("no recording has the name of these texts: ")
    assert all(name in said[0] for name in ("session_1.txt", "other.lab"))
    assert "session_01.txt" not in said[0]


def test_a_text_that_another_one_of_its_name_keeps_out_is_named(tmp_path):
    for name in ("a.flac", "a.lab", "a.txt"):
        put(tmp_path / name, b"Some words.")
    said = []
    find_local(tmp_path, None, "voice", say=said.append)
    assert len(said) == 1
    assert said[0].startswith("these texts are not used, for one in another format has their name")
    assert "a.txt" in said[0]


def test_a_text_is_used_in_whatever_case_the_file_system_finds_it(tmp_path, monkeypatch):
    listed = [put(tmp_path / name) for name in ("a.flac", "a.TXT", "b.flac", "b.txt", "B.txt")]
    os.link(tmp_path / "a.TXT", tmp_path / "a.txt")  # it tells no cases apart: one file, two names
    monkeypatch.setattr(sources, "list_files", lambda *_: listed)
    said = []
    find_local(tmp_path, None, "voice", say=said.append)
    (message,) = said
    assert "B.txt" in message  # this one does
    assert "a.TXT" not in message


def test_a_recording_that_cannot_be_used_has_no_copies(tmp_path):
    bare = InputFile(put(tmp_path / "1" / "a.wav", b"same"), "me", problem="is broken")
    whole = InputFile(put(tmp_path / "2" / "a.wav", b"same"), "me")
    one, two = name_recordings([bare, whole], {})
    assert (one.problem, two.problem) == ("is broken", None)


def test_one_path_seen_from_two_folders_is_two_recordings(tmp_path, monkeypatch):
    owners = {}
    for name in ("monday", "tuesday", "friday"):
        put(tmp_path / name / "in" / "take.flac", name.encode())
        monkeypatch.chdir(tmp_path / name)
        (recording,) = name_recordings([InputFile(Path("in", "take.flac"), "me")], owners)
        assert recording.source == "in/take.flac"
        owners["me", recording.name] = (recording.address, recording.digest, recording.name)
    assert len(owners) == 3
    monkeypatch.chdir(tmp_path)
    (again,) = name_recordings([InputFile(Path("monday/in/take.flac"), "me")], owners)
    assert again.name == "take"


@pytest.mark.parametrize(
    "stem", ['it\'s "me"', "- rf *", "😀", "n" * 251, "../x".replace("/", "\\")]
)
def test_awkward_names_become_safe_ones(tmp_path, stem):
    (name,) = names([InputFile(put(tmp_path / f"{stem}.wav"), "me")])
    assert name == name.strip(".-_ ")
    assert len(name) <= 80
    assert not set(name) & set("/\\'\" *")


def test_speakers_are_folders_not_paths():
    assert sources.speaker_name("../../x") == "x"
    assert sources.speaker_name("YouTuber_Name") == "YouTuber_Name"
    for bad in ("", "../..", "rejected"):
        with pytest.raises(ValueError, match="--speaker"):
            sources.speaker_name(bad)


def test_a_data_set_is_not_prepared_from_itself(tmp_path):
    with pytest.raises(ValueError, match="--check"):
        sources.refuse_overlap(str(tmp_path), tmp_path)
    (tmp_path / "raw").mkdir()
    with pytest.raises(ValueError, match="another folder"):
        sources.refuse_overlap(str(tmp_path / "raw"), tmp_path)
    sources.refuse_overlap(str(tmp_path), tmp_path / "data")


def test_what_was_prepared_below_the_input_is_no_input(tmp_path):
    put(tmp_path / "a.wav")
    put(tmp_path / "data" / "me" / "a_0001.wav")
    (found,) = find_local(tmp_path, None, "me", exclude=tmp_path / "data")
    assert found.path.name == "a.wav"


def test_data_sets_among_raw_recordings_are_no_input(tmp_path):
    put(tmp_path / "a.wav")
    put(tmp_path / "done" / sources.SUMMARY_NAME)
    put(tmp_path / "done" / "Anna" / "b_0001.wav")
    put(tmp_path / "done" / "Anna" / "b_0001.lab")
    put(tmp_path / "killed" / ".prepared" / "Anna" / "c.json")
    put(tmp_path / "killed" / "Anna" / "c_0001.wav")
    said = []
    (found,) = sources.drop_prepared_clips(find_local(tmp_path, None, "me"), said.append)
    assert found.path.name == "a.wav"
    (message,) = said
    assert str(tmp_path / "done") in message
    assert str(tmp_path / "killed") in message
    put(tmp_path / "a.lab")  # a clip that was laid out by hand
    put(tmp_path / "killed" / "Anna" / "c_0001.lab")
    assert len(sources.drop_prepared_clips(find_local(tmp_path, None, "me"))) == 3


def test_a_folder_named_rejected_is_no_speaker_unless_one_is_given(tmp_path):
    put(tmp_path / "rejected" / "raw" / "Rejected" / "a.wav")  # its own place doesn't matter
    put(tmp_path / "rejected" / "raw" / "Anna" / "rejected" / "b.wav")
    root = tmp_path / "rejected" / "raw"
    first, second = find_local(root, None, "me")
    assert (first.speaker, first.problem) == ("Anna", None)
    assert "rename it, or give --speaker" in second.problem
    assert [item.problem for item in find_local(root, "Zoe", "me")] == [None, None]


def test_a_pipe_is_no_recording(tmp_path):
    os.mkfifo(tmp_path / "a.wav")
    (recording,) = name_recordings(find_local(tmp_path, None, "me"), {})
    assert "a pipe" in recording.problem


def test_what_is_not_looked_at_is_said(tmp_path):
    for name in ("a.wav", "a.txt", "b.pdf", "c.PDF", "Makefile", ".hidden", "voice/n.docx"):
        put(tmp_path / name)
    said = []
    find_local(tmp_path, None, "me", say=said.append)
    (message,) = said
    assert message == "not looked at, by their suffixes: 2 .pdf, 1 no suffix, 1 .docx"


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    put(tmp_path / "a.wav")
    closed = put(tmp_path / "closed" / "b.wav").parent
    scan = os.scandir

    def refuse(path):
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = find_local(tmp_path, None, "me")
    assert [(item.path, item.problem) for item in found][1:] == [
        (closed, "cannot be read (Permission denied)")
    ]
    (found,) = find_local(closed, None, "me")
    assert "Permission denied" in found.problem
