"""Planted models through the whole of it: speaking, listening, figures, recommendation."""

import json

import numpy as np
import pytest
import torch

from fish_speech.audio_decoding import audio_info
from fish_speech.evaluation import resynthesis
from fish_speech.evaluation.leaderboard import Leaderboard
from fish_speech.evaluation.measure import measure
from fish_speech.evaluation.recommend import Commands
from fish_speech.evaluation.resynthesis import Resynthesis
from fish_speech.evaluation.scoring import ClipScores, SpeakerProfile
from fish_speech.evaluation.synthesis import Candidate, Line, RealClip, plan_lines
from tests.conftest import ROOT
from tests.evaluation.conftest import CLIPS, STRANGER, planted, text_of, waveform_of

TINY = ROOT / "checkpoints" / "tiny"
COMMANDS = Commands("merge", "more steps", "keep")
HELD_OUT = {text_of(clip): clip for clip in CLIPS[:4]}
REAL = [RealClip(clip, text_of(clip)) for clip in CLIPS[4:8]]


def good(text, seed):
    return waveform_of(HELD_OUT[text])


def stranger(text, seed):
    """Another voice, whose words nobody knows."""
    start = 8000 * list(HELD_OUT).index(text)
    return waveform_of(STRANGER)[:, start : start + 32_000]


def noise(text, seed):
    generator = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(1, 24_000, generator=generator)


@pytest.fixture
def run(tmp_path, scorer):
    """`run(candidates...)` measures them on four texts, said once without a reference."""
    texts = [
        Line("", text, voice="rms", recording=RealClip(clip, text))
        for text, clip in HELD_OUT.items()
    ]

    def run(*candidates, references=None, **more):
        return measure(
            candidates,
            plan_lines(texts, 4, references or {}),
            {"rms": REAL},
            tmp_path,
            title="t",
            scorer=scorer,
            commands=COMMANDS,
            strangers=[STRANGER],
            **more,
        )

    return run


def test_planted_models_get_the_figures_that_they_deserve(run, tmp_path):
    models = {"base": stranger, "step_1": noise, "step_2": good, "step_3": good}
    rows = [planted(name, speak, step)[0] for step, (name, speak) in enumerate(models.items())]
    said = []
    board = run(*rows, say=said.append)
    base, bad, best, same = board.rows
    assert best.figures["wer"].mean == 0
    assert base.figures["wer"].mean == bad.figures["wer"].mean == 1
    assert best.figures["similarity"].low > base.figures["similarity"].high
    assert best.figures == same.figures
    assert board.recommendation.choice == "step_2"
    assert board.recommendation.verdict == "use"
    for row in board.rows:
        for found in filter(None, row.figures.values()):
            assert found.low <= found.mean <= found.high
            assert found.n == 4
    recording, within, across = (row for row in board.scale if any(row.figures.values()))
    assert recording.figures["wer"].mean == 0
    assert within.figures["similarity"].low > across.figures["similarity"].high
    assert within.figures["similarity"].high > best.figures["similarity"].mean > 0.8
    assert best.figures["pitch_median"].mean == pytest.approx(
        recording.figures["pitch_median"].mean, rel=0.05
    )
    assert bad.figures["pitch_median"] is None
    assert 8 < best.figures["speaking_rate"].mean < 25
    assert len(said) == 4
    assert "step_2: word error rate 0%" in said[2]
    spoken = board.samples[0].spoken["step_2"]
    assert (tmp_path / spoken.audio).is_file()
    assert spoken.heard == board.samples[0].text
    assert board.samples[0].recording == str(CLIPS[0])
    assert Leaderboard.read(board.write(tmp_path)) == board


def test_silence_and_endless_speech_are_counted(run):
    base, _ = planted("base", good)
    mute, _ = planted("mute", lambda text, seed: None if "tide" in text else good(text, seed))
    endless, _ = planted("endless", good, runaway=True)
    rows = run(base, mute, endless).rows
    assert [row.figures["empty"].mean for row in rows] == [0, 0.25, 0]
    assert [row.figures["runaways"].mean for row in rows] == [0, 0, 1]
    assert rows[1].figures["wer"].mean == pytest.approx(12 / 42)  # its words are missing
    assert rows[1].figures["similarity"].n == 3


def test_a_candidate_that_fails_has_a_row_and_the_rest_goes_on(run):
    def broken():
        raise ValueError("x.ckpt: damaged")

    base, _ = planted("base", stranger)
    fine, _ = planted("step_2", good, 2)
    said = []
    board = run(base, Candidate("step_1", ROOT, "d", broken, 1), fine, say=said.append)
    assert [row.error for row in board.rows] == [None, "x.ckpt: damaged", None]
    assert board.rows[1].figures == {}
    assert "could not be measured: x.ckpt: damaged" in said[1]
    assert board.recommendation.choice == "step_2"


def test_running_out_of_memory_ends_it_with_the_remedy(run):
    def full():
        raise RuntimeError("CUDA out of memory")

    with pytest.raises(MemoryError, match="--device cpu"):
        run(Candidate("base", ROOT, "d", full))


def test_what_was_spoken_is_not_spoken_again_until_something_changes(run, tmp_path):
    def stops_at_third(text, seed):
        if voice.said == 3:
            raise KeyboardInterrupt
        return good(text, seed)

    candidate, voice = planted("base", stops_at_third)
    with pytest.raises(KeyboardInterrupt):
        run(candidate)
    candidate, again = planted("base", good)
    first = run(candidate)
    assert again.said == 2
    (tmp_path / "audio/base/0001.wav").unlink()
    (tmp_path / "audio/base/0002.json").write_text("{")
    assert run(candidate) == first
    assert again.said == 4
    other = Candidate("base", ROOT, "other weights", candidate.load)
    run(other)
    assert again.said == 8


def test_what_is_there_in_part_is_spoken_again(run, tmp_path):
    candidate, voice = planted("base", good)
    first, folder = run(candidate), tmp_path / "audio/base"
    whole = (folder / "0001.wav").read_bytes()
    (folder / "0001.wav").write_bytes(whole[:20_000])
    (folder / "0002.wav").write_bytes(b"")
    for number, change in ((3, {"runaway": 0}), (4, {"empty": None})):
        record = json.loads((folder / f"000{number}.json").read_text())
        (folder / f"000{number}.json").write_text(json.dumps({**record, **change}))
    (folder / "0004.wav").unlink()
    assert run(candidate) == first
    assert voice.said == 8
    assert (folder / "0001.wav").read_bytes() == whole
    record = json.loads((folder / "0003.json").read_text())
    del record["runaway"]
    (folder / "0003.json").write_text(json.dumps(record))
    (folder / "0004.json").write_text("null")
    assert run(candidate) == first
    assert voice.said == 10


def test_a_cached_candidate_is_not_even_loaded(run):
    candidate, _ = planted("base", good)
    run(candidate)

    def not_again():
        raise AssertionError

    assert run(Candidate("base", ROOT, "base", not_again)).rows[0].error is None


def test_with_and_without_a_reference(run):
    candidate, voice = planted("base", good)
    board = run(candidate, references={"rms": REAL[0]})
    assert voice.said == 8
    assert [sample.referenced for sample in board.samples] == [False, True] * 4
    assert len({sample.name for sample in board.samples}) == 8
    figures = board.rows[0].figures
    assert figures["similarity_referenced"].n == figures["similarity"].n == 4
    assert figures["runaways"].n == 4  # a text with and without one is one sample


def test_a_damaged_recording_is_left_out_and_named(tmp_path, scorer):
    bad = tmp_path / "bad.wav"
    bad.write_bytes(b"RIFF....")
    said = []
    candidate, _ = planted("base", good)
    lines = plan_lines([Line("", next(iter(HELD_OUT)), voice="rms")], 1, {})
    board = measure(
        [candidate], lines, {"rms": [*REAL[:2], RealClip(bad, "x")]}, tmp_path, title="t",
        scorer=scorer, commands=COMMANDS, say=said.append,
    )  # fmt: skip
    assert "bad.wav" in said[0]
    within = next(row for row in board.scale if row.name == "recording against recording")
    assert within.figures["similarity"].n == 2


def test_what_the_codec_leaves_of_a_recording_is_on_the_scale(run, tmp_path):
    made = Resynthesis(TINY, tmp_path, "cpu").of({"rms": [*REAL, RealClip(tmp_path / "no", "x")]})
    assert [clip.text for clip in made["rms"]] == [clip.text for clip in REAL]
    for clip, real in zip(made["rms"], REAL, strict=True):
        seconds = [audio_info(each.audio).duration for each in (clip, real)]
        assert seconds[0] == pytest.approx(seconds[1], abs=0.05)  # a frame
    board = run(planted("base", good)[0], resynthesised=made)
    scale = {row.name: row.figures for row in board.scale}
    coded, within = (
        scale[name]["similarity"]
        for name in ("recording through the codec", "recording against recording")
    )
    assert coded.n == len(REAL)
    assert coded.high < within.low
    assert scale["recording through the codec"]["wer"].mean == 1  # which nobody planted


def test_a_recording_goes_through_the_codec_once(tmp_path, monkeypatch):
    first = Resynthesis(TINY, tmp_path, "cpu").of({"rms": REAL[:1]})
    (copy,) = first["rms"]
    whole = copy.audio.read_bytes()
    copy.audio.write_bytes(whole[:20_000])
    assert Resynthesis(TINY, tmp_path, "cpu").of({"rms": REAL[:1]}) == first
    assert copy.audio.read_bytes() == whole
    monkeypatch.setattr(resynthesis, "load_codec", None)
    assert Resynthesis(TINY, tmp_path, "cpu").of({"rms": REAL[:1]}) == first


def test_a_real_clip_is_compared_with_the_others_only():
    clips = [ClipScores(1.0, 1, embedding=vector) for vector in np.eye(3, dtype=np.float32)]
    assert SpeakerProfile(clips).leave_one_out() == [0, 0, 0]
    assert SpeakerProfile(clips).similarity(clips[0]) == pytest.approx(3**-0.5)
    assert SpeakerProfile(clips[:1]).leave_one_out() == SpeakerProfile([]).leave_one_out() == []
