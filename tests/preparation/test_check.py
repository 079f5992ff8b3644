"""A look at a dataset finds what would spoil a voice, whoever made the dataset."""

from __future__ import annotations

from dataclasses import fields
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile

from fish_speech.preparation import check
from fish_speech.preparation.options import Options, Thresholds
from fish_speech.preparation.pipeline import prepare
from fish_speech.preparation.report import write_report
from fish_speech.preparation.summary import Summary
from fish_speech.preparation.transcribe import Transcription


@pytest.fixture
def by_hand(tmp_path, utterances):
    """A dataset laid out by hand, without a summary."""
    for index, utterance in enumerate(utterances[:4]):
        path = tmp_path / "voice" / "Anna" / f"audio_{index}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, utterance.samples, 16_000)
        path.with_suffix(".lab").write_text(utterance.text)
    return tmp_path / "voice"


def look(folder, **options) -> Summary:
    return check.check(Options(input=str(folder), output=folder, num_workers=1, **options))


def test_a_good_data_set_is_fit(by_hand):
    before = {path: path.stat().st_mtime_ns for path in by_hand.rglob("*")}
    summary = look(by_hand)
    text = check.describe(summary)
    assert not check.has_blocking_flags(summary)
    assert "Files: 4" in text
    assert "Speakers: Anna" in text
    assert "3-5 s     3 █" in text
    assert "Verdict: fit to train on" in text
    assert {path: path.stat().st_mtime_ns for path in by_hand.rglob("*")} == before


def test_a_data_set_of_one_sentence_is_no_more_than_that(by_hand, utterances):
    anna, verdicts = by_hand / "Anna", []
    for number in range(5):
        soundfile.write(
            anna / f"z_{number}.wav", (0.9 - 0.1 * number) * utterances[0].samples, 16_000
        )
        (anna / f"z_{number}.lab").write_text(utterances[0].text)
        verdicts.append(check.describe(look(by_hand)).splitlines()[-1])
    assert set(verdicts[:4]) == {"Verdict: fit to train on"}
    repeats = "but 5 of 9 clips say again what another one says"
    assert verdicts[4] == f"Verdict: fit to train on, {repeats}"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "cp1252"])
def test_texts_that_training_can_not_read_are_named_with_the_remedy(by_hand, tmp_path, encoding):
    label = by_hand / "Anna" / "audio_0.lab"
    text = f"{label.read_text()} Café."
    label.write_bytes(text.encode(encoding))
    (entry,) = look(by_hand).skipped
    assert "audio_0.lab: not UTF-8 text" in entry["reason"]
    assert entry["reason"].endswith("save it as UTF-8, or let prepare_dataset.py --input read it")
    options = Options(input=str(by_hand), output=tmp_path / "anew", num_workers=1)
    clips = {clip["file"]: clip["text"] for clip in prepare(options).clips}
    assert clips["Anna/audio_0_0001.wav"] == text
    assert not look(tmp_path / "anew").skipped


def test_everything_that_is_wrong_is_named(by_hand, utterances):
    anna = by_hand / "Anna"
    (anna / "audio_0.lab").rename(anna / "audio_0.txt")
    (anna / "audio_1.lab").write_text(" \n")
    (anna / "alone.lab").write_text("Nobody says this.")
    (anna / "audio_2.wav").write_text("no sound")
    soundfile.write(anna / "silent.wav", np.zeros(32_000), 16_000)
    (anna / "silent.lab").write_text("Hush.")
    soundfile.write(anna / "loud.wav", np.clip(20 * utterances[5].samples, -1, 1), 16_000)
    (anna / "loud.lab").write_text(utterances[5].text)
    summary = look(by_hand)
    reasons = {entry["source"].split("/")[-1]: entry["reason"] for entry in summary.skipped}
    there = "only audio_0.txt: prepare it, with --input"
    assert reasons["audio_0.wav"] == f"has no transcript audio_0.lab, {there}"
    assert reasons["audio_1.wav"] == "its transcript audio_1.lab is empty"
    assert reasons["alone.lab"] == "has no recording"
    assert reasons["audio_2.wav"].startswith("not an audio file")
    assert "clipping" in next(c for c in summary.clips if "loud" in c["file"])["flags"]
    assert check.has_blocking_flags(summary)
    text = check.describe(summary)
    assert "alone.lab: has no recording" in text
    assert "Anna/loud.wav: clipping" in text
    assert summary.failed == 4
    assert "little_speech" in next(c for c in summary.clips if "silent" in c["file"])["flags"]
    assert "spoil training" in text


def test_only_the_folder_of_rejected_clips_is_not_looked_at(by_hand):
    for folder in (by_hand / "rejected", by_hand / "Anna" / "rejected"):
        folder.mkdir()
        (folder / "alone.lab").write_text("Nobody says this.")
    (entry,) = look(by_hand).skipped
    assert entry["source"].endswith("Anna/rejected/alone.lab")
    assert entry["reason"] == "has no recording"


def test_transcripts_are_compared_where_a_recogniser_is_there(by_hand, monkeypatch, utterances):
    texts = [utterances[0].text, utterances[1].text.upper(), "Wrong.", utterances[3].text]

    class Reader:
        def transcribe(self, samples):
            return Transcription(texts.pop(0))

    monkeypatch.setattr(check, "recogniser_for", lambda *_, **__: Reader())
    summary = look(by_hand, auto_transcribe=True)
    assert [clip["flags"] for clip in summary.clips] == [[], [], ["disagreement"], []]
    assert "Character error rate against the recogniser: 2" in check.describe(summary)
    assert check.has_blocking_flags(summary)


def test_a_clip_in_which_nothing_is_heard_is_flagged(by_hand, monkeypatch):
    class Deaf:
        identity = "deaf"

        def transcribe(self, samples):
            return Transcription("")

    monkeypatch.setattr(check, "recogniser_for", lambda options: Deaf())
    summary = look(by_hand, auto_transcribe=True)
    assert all("disagreement" in clip["flags"] for clip in summary.clips)
    assert check.has_blocking_flags(summary)
    assert "100" in next(line for line in check.describe(summary).splitlines() if "rate" in line)


def test_the_shortest_clip_of_use_is_what_was_said(by_hand):
    assert all("too_short" in clip["flags"] for clip in look(by_hand, min_duration=6.0).clips)


@pytest.mark.parametrize(
    "name", sorted({field.name for field in fields(Thresholds)} - {"max_edge"})
)
def test_every_threshold_is_heeded(by_hand, name):  # no edge is judged that may be noise
    limit = 1e9 if name.startswith("min_") else -1e9
    summary = look(by_hand, thresholds=Thresholds(**{name: limit}))
    assert any(clip["flags"] for clip in summary.clips)


def test_without_a_model_it_is_said_that_nothing_is_compared(by_hand, monkeypatch):
    def offline(*_, **__):
        raise ValueError("no model here")

    monkeypatch.setattr(check, "recogniser_for", offline)
    said = []
    options = Options(input=str(by_hand), output=by_hand, auto_transcribe=True, num_workers=1)
    assert len(check.check(options, say=said.append).clips) == 4
    assert said == ["transcripts are not compared: no model here"]


class Page(HTMLParser):
    """Every tag of a page, and where it refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_the_report_plays_every_clip_shows_flags_first_and_escapes_everything(by_hand):
    (by_hand / "Anna" / "audio_3.lab").write_text("<script>alert('x')</script> & more")
    odd = by_hand / "Anna" / 'it\'s <b>"odd"#1.wav'
    (by_hand / "Anna" / "audio_2.wav").rename(odd)
    (by_hand / "Anna" / "audio_2.lab").rename(odd.with_suffix(".lab"))
    summary = look(by_hand)
    summary.clips[2]["flags"] = ["noisy"]
    summary.skipped.append({"source": "<i>gone</i>.wav", "reason": "is <silent>"})
    page = Page(write_report(summary, by_hand).read_text())
    assert "script" not in page.tags
    assert "i" not in page.tags
    assert page.tags.count("audio") == 4
    assert page.tags.count("polygon") == 4
    assert page.tags.count("rect") > 4
    assert page.links[0] == "Anna/audio_3.wav"  # the flagged one
    assert "Anna/it%27s%20%3Cb%3E%22odd%22%231.wav" in page.links
    assert all(not link.startswith(("http", "/")) for link in page.links)
    assert "<script>alert('x')</script> & more" in page.text
    assert "<i>gone</i>.wav: is <silent>" in page.text
