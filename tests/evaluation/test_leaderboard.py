"""The file that evaluation leaves: what is written is what is read."""

import json

import pytest

from fish_speech.evaluation.leaderboard import (
    Estimate,
    EvalSample,
    Leaderboard,
    ModelRow,
    Recommendation,
    SampleResult,
)


def test_a_leaderboard_is_read_as_it_was_written(tmp_path):
    board = Leaderboard(
        title="demo",
        recogniser=None,
        normalisation="lower case",
        speaker_encoder=None,
        settings={"samples": 2},
        recommendation=Recommendation("base", 0, "keep the base", "why", "what next"),
        rows=[
            ModelRow("base", 0, "base", None, {"wer": Estimate(0.1, 0.0, 0.2, 2), "cer": None}),
            ModelRow("step_000000100", 100, "x.ckpt", "damaged"),
        ],
        scale=[ModelRow("recording", figures={"wer": Estimate(0.05, 0.0, 0.1, 2)})],
        samples=[
            EvalSample(
                "0001", "Hé.", True, None, {"base": SampleResult("audio/base/0001.wav", 0.5)}
            )
        ],
    )
    path = board.write(tmp_path)
    assert json.loads(path.read_text("utf-8"))["rows"][0]["figures"]["wer"]["high"] == 0.2
    assert Leaderboard.read(path) == board


@pytest.mark.parametrize("text", ["{}", "[1]", '{"rows": [{"x": 1}], "recommendation": {}}', "{"])
def test_what_is_no_leaderboard_is_named(tmp_path, text):
    file = tmp_path / "leaderboard.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"leaderboard\.json: not a"):
        Leaderboard.read(file)
