"""No console's encoding stops a program, and Ctrl+C always does."""

from __future__ import annotations

import io
import subprocess
import sys
import textwrap

import pytest

import cli_tts
import finetune_tts
import prepare_dataset
from fish_speech.console import counted
from tests.conftest import ROOT


@pytest.mark.parametrize("program", [prepare_dataset, finetune_tts, cli_tts])
def test_what_a_console_cannot_show_is_replaced(program, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="cp1252") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    with pytest.raises(SystemExit):
        program.main(["--\N{OPEN FILE FOLDER}"])
    print("\N{OPEN FILE FOLDER} \N{FULL BLOCK} caf\N{LATIN SMALL LETTER E WITH ACUTE}", flush=True)
    assert streams[0].buffer.getvalue() == b"? ? caf\xe9\n"
    streams[1].flush()
    assert b": error: " in streams[1].buffer.getvalue()


def test_ctrl_c_in_a_destructor_is_not_lost(tmp_path):
    """Python only prints that it ignored it, there and in what a library in C calls."""
    program = """
        import os, signal, threading
        from fish_speech.signals import interrupt_on_termination

        class Interrupted:
            def __del__(self):
                os.kill(os.getpid(), signal.SIGINT)

        interrupt_on_termination()
        Interrupted()
        try:
            threading.Event().wait(20)
        except KeyboardInterrupt:
            print("stopped")
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("stopped\n", "", 0)


@pytest.mark.parametrize(
    ("program", "words", "flag"),
    [
        (prepare_dataset, ["--input", "", "--output", "data"], "--input"),
        (prepare_dataset, ["--input", "samples", "--output", ""], "--output"),
        (prepare_dataset, ["--input", "samples", "--output=--"], "--output"),
        (prepare_dataset, ["--input", "samples", "--output", "data", "--speaker="], "--speaker"),
        (finetune_tts, ["--project", "p", "--train", "--data-dir", ""], "--data-dir"),
        (finetune_tts, ["--project", "p", "--merge-weights", "--checkpoint-path="],
         "--checkpoint-path"),
        (cli_tts, ["Hello.", "--reference-audio", ""], "--reference-audio"),
        (cli_tts, ["Hello.", "-o", ""], "-o"),
    ],
)  # fmt: skip
def test_an_empty_value_is_refused_in_one_line(program, words, flag, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert program.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f": {flag} has no value; is a shell variable not set?")
    assert not list(tmp_path.iterdir())


def test_one_of_something_takes_no_s():
    assert [counted(number, "clip") for number in range(3)] == ["0 clips", "1 clip", "2 clips"]
