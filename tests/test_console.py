"""No console's encoding stops a program."""

from __future__ import annotations

import io
import sys

import pytest

import cli_tts
import finetune_tts
import prepare_dataset


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
