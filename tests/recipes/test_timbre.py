"""The experiment behind the training defaults: settings that exist, and the table of it."""

import pytest

from fish_speech.evaluation.leaderboard import Estimate, Leaderboard, ModelRow, Recommendation
from fish_speech.training.config import compose_config
from recipes import timbre


@pytest.mark.parametrize("name", timbre.SETTINGS)
def test_settings_are_such_as_training_knows(name):
    rate, overrides, steps = timbre.SETTINGS[name]
    config = compose_config(["project=p", *overrides], {"optimizer.learning_rate": rate})
    plain = compose_config(["project=p"], {"optimizer.learning_rate": rate})
    assert (config != plain) == bool(overrides)
    assert all(step % config.train.save_every == 0 for step in steps)  # each has a checkpoint


def test_the_table_has_a_row_for_all_that_was_measured(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    figures = {"similarity": Estimate(0.8, 0.75, 0.85, 12), "wer": Estimate(0.5, 0.4, 0.6, 12)}
    rows = [ModelRow(name, step, figures=figures) for name, step in (("base", 0), ("b", 300))]
    advice = Recommendation("base", 0, "keep the base", "", "")
    board = Leaderboard("t", None, "", None, {}, advice, rows)
    folder = tmp_path / "results" / "timbre-guide" / "evaluation"
    folder.mkdir(parents=True)
    board.write(folder)
    lines = timbre.table().splitlines()
    cell = "0.80 ± 0.05, 50%"
    assert lines[2:] == [f"| `guide` | {cell} |  | {cell} |  |"]
    assert len({line.count("|") for line in lines}) == 1
