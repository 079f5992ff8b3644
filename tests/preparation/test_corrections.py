"""Corrections are found by what they are of, at once, and written only when there are others."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from fish_speech.preparation.corrections import Corrections


def clip(number: int, text: str = "as it was heard") -> dict[str, Any]:
    """The entry of a clip of nine seconds; twenty are of one recording."""
    recording, part = divmod(number, 20)
    file = f"me/session_{recording:03}_{part:04}.wav"
    span = {"start": 10.0 * part, "end": 10.0 * part + 9}
    return {"file": file, "source": f"{recording}.wav", **span, "text": text}


def texts_in(path: Path) -> list[str]:
    return [entry["text"] for entry in json.loads(path.read_text())]


def test_a_correction_is_found_wherever_its_clip_was_cut_and_only_in_its_recording(tmp_path):
    corrections = Corrections(tmp_path / "corrections.json")
    corrections.note(clip(25), "as it was said")
    corrections.note(clip(26), clip(26)["text"])
    corrections.save()
    corrections = Corrections(tmp_path / "corrections.json")
    other_cut = {**clip(25), "file": "ME/Session_001_0001.wav", "start": 55.0, "end": 70.0}
    assert corrections.find(other_cut)["text"] == "as it was said"
    assert corrections.find_exact(other_cut) is None
    assert corrections.find({**clip(25), "text": "another"}) is None
    assert corrections.find({**clip(25), "text": "another"}, any_text=True) is not None
    assert corrections.find(clip(5), any_text=True) is None  # the same seconds of another
    corrections.note(clip(25), clip(25)["text"])
    corrections.save()
    assert texts_in(tmp_path / "corrections.json") == []


def test_corrections_that_stay_as_they_are_are_not_written_again(tmp_path):
    path = tmp_path / "corrections.json"
    Corrections(path).save()
    assert not path.exists()
    corrections = Corrections(path)
    for number in (3, 1, 2):
        corrections.note(clip(number), f"text {number}")
    corrections.save()
    assert texts_in(path) == ["text 1", "text 2", "text 3"]
    before = path.stat().st_ino
    for number in (1, 2):
        corrections.note(clip(number), f"text {number}")
    corrections.note(clip(4), clip(4)["text"])
    corrections.save()
    assert path.stat().st_ino == before
    corrections.note(clip(2), "better")
    corrections.save()
    assert texts_in(path) == ["text 1", "better", "text 3"]


def test_many_corrections_do_not_hold_up_the_clips_without_any(tmp_path):
    corrections = Corrections(tmp_path / "corrections.json")
    begun = time.process_time()
    for number in range(400):
        corrections.note(clip(number), "as it was said")
    for number in range(400, 500):
        corrections.note(clip(number), clip(number)["text"])
    assert time.process_time() - begun < 0.5


@pytest.mark.parametrize("entries", [{}, [1], [{**clip(1), "instead_of": None}], [clip(1)]])
def test_what_holds_no_corrections_is_named(tmp_path, entries):
    path = tmp_path / "corrections.json"
    path.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=r"corrections\.json: not the corrections .* put back"):
        Corrections(path)


def test_a_text_without_words_is_no_correction(tmp_path):
    path = tmp_path / "corrections.json"
    path.write_text(json.dumps([{**clip(1), "text": "", "instead_of": clip(1)["text"]}]))
    assert Corrections(path).find(clip(1), any_text=True) is None
