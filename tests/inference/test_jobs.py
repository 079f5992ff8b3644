"""Which files are written, and which are there already."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from fish_speech.audio import save_audio
from fish_speech.files import atomic_path, write_text
from fish_speech.inference.jobs import BatchState, default_output, plan, run_pending_jobs


def names(jobs):
    return [os.fspath(job.output) for job in jobs]


def test_one_text_is_one_file():
    (job,) = plan("Hello.\nWorld.", Path("out/a.flac"), seed=4)
    assert (job.text, job.seed, job.output) == ("Hello.\nWorld.", 4, Path("out/a.flac"))


def test_several_takes_are_numbered_and_have_seeds_in_a_row():
    jobs = plan("Hello.", Path("a.wav"), seed=4, takes=3)
    assert names(jobs) == ["a_1.wav", "a_2.wav", "a_3.wav"]
    assert [job.seed for job in jobs] == [4, 5, 6]


def test_the_lines_of_a_batch_keep_their_numbers(tmp_path):
    text = "One.\n\n😀\nFour."
    assert names(plan(text, Path("takes"), batch=True)) == ["takes/0001.wav", "takes/0004.wav"]
    assert names(plan(text, Path("b.mp3"), batch=True)) == ["b_0001.mp3", "b_0004.mp3"]
    assert [job.output for job in plan(text, None, batch=True)] == [None, None]
    pages = "One page.\fThe next.\r\nA line.\u2028The same.\rThree.\n"
    assert names(plan(pages, Path("p"), batch=True)) == [f"p/000{n}.wav" for n in (1, 2, 3)]
    (job, _) = plan(text, tmp_path, batch=True)
    assert job.output == tmp_path / "0001.wav"


def test_the_default_is_named_by_the_first_words():
    text = "Hello, World! " + "and so on " * 20
    name = default_output(text, batch=False)
    assert name.match("output/Hello_World_and_so_on_and_so_on_and_so_o-??????.wav")
    assert default_output(text + ".", batch=False) != name
    assert default_output(text, batch=False) == name
    parts = [f"The history of the lighthouse by the sea{rest}" for rest in (", one.", ", two.")]
    assert len({default_output(part, batch=False) for part in parts}) == 2  # cut at a space
    assert default_output("../x", batch=True) == Path("output/x")


@pytest.mark.parametrize("text", ["", "\n\n", "😀\n..."])
@pytest.mark.parametrize("batch", [False, True])
def test_nothing_to_speak_is_refused(text, batch):
    with pytest.raises(ValueError, match="nothing to speak"):
        plan(text, None, batch=batch)


def test_outputs_that_cannot_be_are_refused_before_anything_is_made(tmp_path):
    write_text(tmp_path / "file", "")
    with pytest.raises(ValueError, match=r"unknown audio format '.xyz'; use one of .wav"):
        plan("Hi.", tmp_path / "a.xyz")
    with pytest.raises(ValueError, match=r"unknown audio format '.m4a'; use one of .wav"):
        plan("Hi.", tmp_path / "takes.m4a", batch=True)
    with pytest.raises(ValueError, match="a folder; give a file name"):
        plan("Hi.", _folder(tmp_path / "a.wav"))
    with pytest.raises(ValueError, match="file is no folder that you may write to"):
        plan("Hi.", tmp_path / "file" / "deep" / "a.wav")
    with pytest.raises(ValueError, match="the name is not UTF-8"):
        plan("Hi.", tmp_path / "a\udcff.wav")
    assert sorted(os.listdir(tmp_path)) == ["a.wav", "file"]


def _folder(path):
    path.mkdir()
    return path


def make(job):
    """A short speech in the file of a job."""
    save_audio(job.output, np.random.default_rng(0).normal(0, 0.1, 8000), 8000)
    return True


def test_a_file_is_done_while_nothing_that_made_it_has_changed(tmp_path):
    old, other = plan("One.\nTwo.", tmp_path, batch=True)
    (changed, _) = plan("One!\nTwo.", tmp_path, batch=True)
    BatchState(tmp_path, ["model", 0.7]).mark_done(old)
    assert not BatchState(tmp_path, ["model", 0.7]).is_done(old)  # the file itself is not there
    make(old)
    state = BatchState(tmp_path, ["model", 0.7])
    assert state.is_done(old)
    assert not state.is_done(other)
    assert not state.is_done(changed)
    assert not BatchState(tmp_path, ["model", 0.8]).is_done(old)


@pytest.mark.parametrize("content", ["[]", "{", "\x00"])
def test_a_record_that_is_none_is_named_with_the_remedy(tmp_path, content):
    write_text(tmp_path / "batch.json", content)
    with pytest.raises(ValueError, match=r"batch\.json: damaged, .* remove it"):
        BatchState(tmp_path, None)


def test_what_a_killed_batch_left_of_its_own_files_is_removed(tmp_path):
    jobs = plan("One.\nTwo.", tmp_path, batch=True)
    for output in (jobs[0].output, tmp_path / "of_another.wav"):
        with atomic_path(output) as left:
            left.touch()
        left.write_text("half")
        output.unlink()
    assert run_pending_jobs(jobs, None, lambda job: True) == (2, 0, 0, [])
    assert [file.name for file in tmp_path.glob(".tmp-*")] == [left.name]


def test_what_fails_is_no_part_of_the_record(tmp_path):
    jobs = plan("One.\nTwo.\nThree.", tmp_path, batch=True)
    assert run_pending_jobs(jobs, None, lambda job: "Two" not in job.text and make(job)) == (
        *(2, 0, 1),
        [],
    )
    assert run_pending_jobs(jobs, None, make) == (1, 2, 0, [])


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3"])
def test_a_file_that_is_not_whole_is_made_again(tmp_path, suffix):
    jobs = plan("One.\nTwo.\nThree.", tmp_path / f"_{suffix}", batch=True)
    assert run_pending_jobs(jobs, None, make) == (3, 0, 0, [])
    assert run_pending_jobs(jobs, None, make) == (0, 3, 0, [])
    one, two, _ = (job.output for job in jobs)
    one.write_bytes(b"")
    two.write_bytes((whole := two.read_bytes())[: len(whole) // 2])
    assert run_pending_jobs(jobs, None, make) == (2, 1, 0, [])


def test_files_of_earlier_batches_that_are_none_of_this_one_are_told(tmp_path):
    run_pending_jobs(plan("One.\nTwo.\nThree.", tmp_path, batch=True), None, make)
    (tmp_path / "0002.wav").unlink()
    (tmp_path / "mine.wav").touch()
    found = run_pending_jobs(plan("One.", tmp_path, batch=True), None, make)
    assert found == (0, 1, 0, [tmp_path / "0003.wav"])


@pytest.mark.parametrize(
    ("lines", "spoken"),
    [
        ("New.\nOne.\nTwo.\nThree.", ["New."]),
        ("Two.\nOne.\nThree.", []),
        ("Three.\nOne.\n\nOne.", []),
        ("Two.", []),
    ],
)
def test_a_line_that_has_another_number_is_not_spoken_again(tmp_path, lines, spoken):
    def speak(job):
        heard.append(job.text)
        job.output.write_bytes(wav + job.text.encode())
        return True

    heard = []
    save_audio(tmp_path / "a.wav", np.full(800, 0.1), 8000)
    wav = (tmp_path / "a.wav").read_bytes()
    folder = tmp_path / "takes"
    run_pending_jobs(plan("One.\nTwo.\nThree.", folder, batch=True), None, speak)
    heard.clear()
    jobs = plan(lines, folder, batch=True)
    run_pending_jobs(jobs, None, speak)
    assert heard == spoken
    for job in jobs:
        assert job.output.read_bytes() == wav + job.text.encode()
    assert run_pending_jobs(jobs, None, speak)[:2] == (0, len(jobs))
    assert run_pending_jobs(plan(lines, folder / "_.mp3", batch=True), None, speak)[1] == 0


def test_two_batches_in_one_folder_take_nothing_from_each_other(tmp_path):
    first = plan("One.\nThank you.", tmp_path / "a.wav", batch=True)
    second = plan("Two.\nThank you.", tmp_path / "b.wav", batch=True)
    run_pending_jobs(first, None, make)
    assert run_pending_jobs(second, None, make)[:2] == (1, 1)
    assert run_pending_jobs(first, None, make)[:2] == (0, 2)


def test_a_disk_that_is_full_while_files_get_other_names_costs_no_speech(tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, "no space left", str(target))

    run_pending_jobs(before := plan("One.\nTwo.", tmp_path, batch=True), None, make)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfile", full)
        with pytest.raises(OSError, match="no space left"):
            run_pending_jobs(plan("New.\nOne.\nTwo.", tmp_path, batch=True), None, make)
    assert run_pending_jobs(before, None, make)[:2] == (0, 2)


def test_a_batch_killed_while_files_get_other_names_never_mixes_them_up(tmp_path, monkeypatch):
    run_pending_jobs(before := plan("One.\nTwo.", tmp_path, batch=True), None, make)
    replace = os.replace

    def killed(source, target):
        if Path(target).name == "0001.wav":  # the other has its new name then
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        run_pending_jobs(plan("Two.\nOne.", tmp_path, batch=True), None, make)
    monkeypatch.undo()
    assert run_pending_jobs(before, None, make)[:2] == (2, 0)


def test_speech_that_may_only_be_heard_needs_no_place_to_write_to(tmp_path):
    write_text(tmp_path / "output", "a file in the way")
    jobs = plan("Hi.", tmp_path / "output" / "Hi.wav", takes=2, playback_only=True)
    assert [job.output.name for job in jobs] == ["Hi_1.wav", "Hi_2.wav"]


@pytest.mark.parametrize("name", ["_hello.wav", "take_.wav", "_.wav"])
def test_a_single_file_keeps_the_name_that_was_asked_for(tmp_path, name):
    (job,) = plan("Hello.", tmp_path / name)
    assert job.output == tmp_path / name
