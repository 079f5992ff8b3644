"""Files are whole or absent, names are safe, and a folder has one writer."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from fish_speech import files


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "deep" / "a.json"
    files.write_json(path, {"voice": "Zoë"})
    with pytest.raises(TypeError):
        files.write_json(path, {"voice": object()})

    def fail() -> None:
        with files.atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert files.read_json(path) == {"voice": "Zoë"}
    assert [item.name for item in path.parent.iterdir()] == ["a.json"]


def test_a_write_that_fails_names_the_file_and_not_what_was_beside_it(tmp_path):
    full = errno.ENOSPC, os.strerror(errno.ENOSPC)
    for known in (False, True):
        writing = files.atomic_path(tmp_path / "a.json")
        with pytest.raises(OSError, match=r"a\.json'$") as caught, writing as temporary:
            raise OSError(*full, *[str(temporary)] * known)
        assert caught.value.filename == str(tmp_path / "a.json")
    copying = files.atomic_path(tmp_path / "a.json")
    with pytest.raises(OSError, match=r"a\.json'$"), copying as temporary:
        raise OSError(*full, "what is copied", None, str(temporary))


def test_a_name_as_long_as_the_file_system_allows_can_be_written(tmp_path):
    path = tmp_path / ("n" * 251 + ".wav")
    files.write_bytes(path, b"x")
    assert path.read_bytes() == b"x"


def test_what_a_killed_run_left_is_removed(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".tmp-123-0123456789abcdef.wav").write_text("half")
    for kept in ("whole.wav", ".tmp-theirs.wav", ".tmp-123-abc.wav"):
        (tmp_path / "a" / kept).write_text("whole")
    (tmp_path / "a" / ".tmp-x").mkdir()
    files.remove_temporaries(tmp_path)
    left = {path.name for path in (tmp_path / "a").iterdir()}
    assert left == {"whole.wav", ".tmp-theirs.wav", ".tmp-123-abc.wav", ".tmp-x"}


def test_a_folder_that_is_being_written_is_not_another_ones_leftover(tmp_path):
    left = tmp_path / ".tmp-123-old-me"
    left.mkdir()
    with files.atomic_folder(tmp_path / "demo-me") as first:
        with files.atomic_folder(tmp_path / "me") as second:
            (second / "b").touch()
        (first / "a").touch()
    assert {path.name for path in tmp_path.iterdir()} == {"demo-me", "me"}
    assert (tmp_path / "demo-me" / "a").is_file()


def test_a_folder_behind_a_link_is_replaced_where_it_is(tmp_path):
    real = tmp_path / "disk" / "voice"
    real.mkdir(parents=True)
    (tmp_path / "voice").symlink_to(real)
    with files.atomic_folder(tmp_path / "voice") as new:
        (new / "a").touch()
    assert (tmp_path / "voice").is_symlink()
    assert [path.name for path in real.iterdir()] == ["a"]
    assert {path.name for path in tmp_path.iterdir()} == {"disk", "voice"}


def test_a_folder_survives_an_interruption_at_any_moment(tmp_path, monkeypatch):
    (tmp_path / "voice").mkdir()
    (tmp_path / "voice" / "a").write_text("before")
    rename, names = Path.rename, []

    def interrupted(self, target):
        names.append(self.name)
        if len(names) == 2:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), files.atomic_folder(tmp_path / "voice") as new:
        (new / "a").write_text("after")
    assert (tmp_path / "voice" / "a").read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 1


def test_who_may_not_write_is_told_so_and_does_not_wait(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(files.FileLock, "acquire", refused)
    said, lock = r"can't be written to \(permission denied\)", files.exclusive(tmp_path, "the data")
    with pytest.raises(ValueError, match=said) as caught, lock:
        pass
    assert not isinstance(caught.value, files.InUseError)


def test_a_file_in_the_place_of_a_folder_is_left_alone(tmp_path):
    (tmp_path / "voice").write_text("notes")
    place = files.atomic_folder(tmp_path / "voice")
    with pytest.raises(ValueError, match=r"voice: a file is in the place"), place:
        pass
    assert (tmp_path / "voice").read_text() == "notes"


def test_among_the_files_of_others_only_named_ones_are_cleaned_up(tmp_path):
    for name in ("mine.wav", "theirs.wav", "deep/mine.wav"):
        with files.atomic_path(tmp_path / name) as temporary:
            temporary.touch()
        temporary.write_text("half")
    files.remove_temporaries(tmp_path, ["mine.wav"])
    assert len(list(tmp_path.glob(".tmp-*"))) == 1
    assert len(list((tmp_path / "deep").glob(".tmp-*"))) == 1


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_text_is_utf_8_or_its_file_is_named(tmp_path, mark):
    file = tmp_path / "a.lab"
    files.write_text(file, f"{mark}Größe")
    assert files.read_text(file) == "Größe"
    file.write_bytes("Größe".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.lab: not UTF-8 text .* save it as UTF-8"):
        files.read_text(file)


@pytest.mark.parametrize("content", [b"", b"{", b'"caf\xe9"', b"[" * 100_000])
def test_a_broken_json_file_is_named(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json: not a JSON file .*put back a copy"):
        files.read_json(tmp_path / "a.json")


def test_json_may_have_a_byte_order_mark(tmp_path):
    (tmp_path / "a.json").write_text('\ufeff{"a": 1}', encoding="utf-8")
    assert files.read_json(tmp_path / "a.json") == {"a": 1}


def test_audio_is_listed_sorted_without_hidden_files_and_loops(tmp_path):
    for name in ("b/2.WAV", "a/1.mp3", "a/notes.txt", ".hidden/3.wav", "a/.4.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b" / "loop").symlink_to(tmp_path, target_is_directory=True)
    found = [path.relative_to(tmp_path).as_posix() for path in files.list_audio(tmp_path)]
    assert found == ["a/1.mp3", "b/2.WAV"]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("../../x", "x"),
        ("My  voice: take 1", "My_voice_take_1"),
        ("-rf", "rf"),
        ("😀", "unnamed"),
        ("Ölfaß", "Ölfaß"),
        ("", "unnamed"),
        ("a/b\\c", "a_b_c"),
        ("सीता", "सीता"),
        ("I ❤️ you 1️⃣", "I_you_1"),
        ("Nul.", "Nul_"),
        ("aux.wav", "aux_.wav"),
        ("con.con", "con_.con"),
        ("com1", "com1_"),
        ("Connie, com10 & lpt", "Connie_com10_lpt"),
        ("falcon.con", "falcon.con"),
    ],
)
def test_safe_names(text, name):
    assert files.safe_name(text) == name


def test_safe_names_are_short_in_bytes_too():
    assert len(files.safe_name("語" * 300).encode()) <= 200


def test_a_folder_has_one_writer(tmp_path):
    first, second = (files.exclusive(tmp_path, "dataset x") for _ in range(2))
    with first, pytest.raises(ValueError, match=r"dataset x is in use by process \d+"):
        second.__enter__()
    with files.exclusive(tmp_path, "dataset x"):
        assert (tmp_path / ".lock-holder").exists()


def test_a_writer_that_can_not_be_named_is_one_all_the_same(tmp_path):
    holder = tmp_path / ".lock-holder"
    with files.exclusive(tmp_path, "dataset x"):
        holder.unlink()
        holder.mkdir()  # as where it goes away between two looks: there, and not to be read
        with pytest.raises(files.InUseError, match="in use by another process"):
            files.exclusive(tmp_path, "dataset x").__enter__()
        holder.rmdir()


@pytest.mark.parametrize("below", ["", "data"])
def test_no_folder_can_be_where_a_file_is(tmp_path, below):
    (tmp_path / "voice").write_text("mine")
    said = r"voice: is a file, .* choose another name"
    with pytest.raises(ValueError, match=said), files.exclusive(tmp_path / "voice" / below, "x"):
        pass
