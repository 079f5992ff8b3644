"""No console's encoding stops a program, nor that it has none, and Ctrl+C always does."""

from __future__ import annotations

import io
import signal
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


def process(code, *, cwd=ROOT, **streams):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=cwd, text=True, **streams
    )


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("program", ["prepare_dataset", "finetune_tts", "cli_tts"])
def test_ctrl_c_while_a_program_is_imported_shows_no_traceback(program, name, tmp_path):
    """`argparse` is the first that all three import; this one takes its time."""
    (tmp_path / "argparse.py").write_text(
        "import time\nprint('importing', flush=True)\ntime.sleep(20)"
    )
    code = f"import runpy; runpy.run_path({str(ROOT / program)!r} + '.py', run_name='__main__')"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with process(code, cwd=tmp_path, **pipes) as importing:
        assert importing.stdout.readline() == "importing\n"
        importing.send_signal(getattr(signal, name))
        assert importing.communicate(timeout=10)[1] == ""
    assert importing.returncode == 130


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_ctrl_c_in_an_import_waits_until_it_is_over(tmp_path, name):
    """NumPy and others make another error of it, or none. (`sh` has Ctrl+C ignored by what it
    starts in the background.)"""
    (tmp_path / "heavy.py").write_text(
        "import os, signal\n"
        f"try:\n    os.kill(os.getpid(), signal.{name})\nexcept BaseException:\n    pass\n"
    )
    program = f"""
        import signal, sys, time
        from fish_speech.signals import interrupt_on_termination

        if "{name}" != "SIGINT":
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        interrupt_on_termination()
        sys.path.insert(0, sys.argv[1])
        try:
            import heavy
            print("imported")
            time.sleep(20)
        except KeyboardInterrupt:
            print("stopped")
    """
    command = [sys.executable, "-c", textwrap.dedent(program), tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("imported\nstopped\n", "", 0)


def test_ctrl_c_is_told_from_the_errors_that_a_library_makes_of_it(monkeypatch, tmp_path, capsys):
    def parser_of_settings(_):
        try:
            raise KeyboardInterrupt
        finally:
            [].pop()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("finetune_tts.run_stages", parser_of_settings)
    assert finetune_tts.main(["--project", "p", "--list-checkpoints"]) == 130
    assert capsys.readouterr().err.startswith("interrupted; ")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_closed_stream_is_no_error(stream, tmp_path):
    """As `2>&-` closes it, or a program without a console."""
    closed = {"stdout": "1>&-", "stderr": "2>&-"}[stream]
    command = f'"{sys.executable}" cli_tts.py "Hi." -o "{tmp_path}/a.wav" --model-path tiny'
    done = subprocess.run(
        f"{command} --retries 0 --max-new-tokens 2 {closed}",
        shell=True, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stdout == ("" if stream == "stdout" else f"{tmp_path}/a.wav\n")
    assert (tmp_path / "a.wav").is_file()


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
