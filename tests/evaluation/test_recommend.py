"""The recommendation for planted good, bad and identical checkpoints."""

from dataclasses import replace

import numpy as np
import pytest

from fish_speech.evaluation.intervals import estimate
from fish_speech.evaluation.leaderboard import EvalSample, ModelRow, SampleResult
from fish_speech.evaluation.recommend import Commands, recommend

TEXT = "one two three four five six seven eight nine ten"
COMMANDS = Commands("merge {path}", "more steps", "speak with the base")


def board(*models, samples=12, texts=12, loss=None):
    """Rows and samples of models given as (word error rate, similarity), the base first.

    Sentences vary far more than models do, as they really do.
    """
    rng = np.random.default_rng(0)
    hard, unlike = rng.uniform(0, 0.2, samples), rng.normal(0, 0.05, samples)
    rows = [ModelRow("base", 0, "base")]
    rows += [ModelRow(f"step_{step}", step, f"{step}.ckpt") for step in range(1, len(models))]
    listed = [EvalSample(f"{i:04d}", f"{TEXT} {i % texts}", False) for i in range(samples)]
    for row, (wer, similarity) in zip(rows, models, strict=True):
        for i, sample in enumerate(listed):
            jitter = rng.normal(0, 0.005, 2)
            sample.spoken[row.name] = SampleResult(
                None,
                wer and wer + hard[i] + jitter[0],
                None,
                similarity and similarity + unlike[i] + jitter[1],
            )
        spoken = [sample.spoken[row.name] for sample in listed]
        for name in ("wer", "similarity"):
            row.figures[name] = estimate([v for s in spoken if (v := getattr(s, name)) is not None])
        if loss:
            row.figures["held_out_loss"] = estimate([loss[len(row.name) > 4 and row.step]])
    return rows, listed


def verdict(*models, **more):
    found = recommend(*board(*models, **more), COMMANDS)
    return found.verdict, found.step


BASE = (0.1, 0.6)


def test_one_text_spoken_often_is_one_text():
    assert verdict(BASE, (0.1, 0.8)) == ("use", 1)
    assert verdict(BASE, (0.1, 0.8), texts=3) == ("use", 1)
    assert verdict(BASE, (0.1, 0.8), texts=2) == ("keep the base", 0)


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        ([BASE, (0.1, 0.8)], ("use", 1)),
        ([BASE, (0.1, 0.7), (0.1, 0.8)], ("use", 2)),
        ([BASE, (0.1, 0.8), (0.1, 0.8)], ("use", 1)),  # no better: the earliest
        ([BASE, (0.1, 0.8), (0.1, 0.7)], ("use", 1)),
        ([BASE, (0.1, 0.75), (0.9, 0.9)], ("use", 1)),  # more like it, but not understood
        ([BASE, (0.9, 0.9), (0.1, 0.75)], ("use", 2)),
        ([BASE, (0.02, 0.75), (0.1, 0.75)], ("use", 1)),
        ([BASE, (0.9, 0.8)], ("keep the base", 0)),
        ([BASE, (0.1, 0.5), (0.1, 0.4)], ("keep the base", 0)),
        ([BASE, BASE], ("keep the base", 0)),
        ([BASE, (0.1, 0.608)], ("keep the base", 0)),  # surely more, but nobody hears it
        ([(None, 0.6), (None, 0.8)], ("use", 1)),  # without a recogniser
        ([(0.5, None), (0.1, None)], ("use", 1)),  # without a voice to compare with
        ([(None, None), (None, None)], ("keep the base", 0)),
    ],
)
def test_the_planted_best_is_found(models, expected):
    assert verdict(*models) == expected


def test_without_a_gain_yet_it_depends_on_the_held_out_loss():
    assert verdict(BASE, BASE, BASE, loss=[5, 4, 3]) == ("train longer", None)
    assert verdict(BASE, BASE, BASE, loss=[5, 3, 4]) == ("keep the base", 0)
    assert verdict(BASE, BASE, (0.9, 0.6), loss=[5, 4, 3]) == ("keep the base", 0)


def test_a_row_that_is_the_base_itself_is_never_better():
    rows, samples = board(BASE, BASE)
    for sample in samples:
        sample.spoken["step_1"] = sample.spoken["base"]
    assert recommend(rows, samples, COMMANDS).verdict == "keep the base"


@pytest.mark.parametrize(("texts", "steps"), [(3, 1), (3, 10), (12, 10)])
def test_of_many_useless_checkpoints_none_is_taken_for_better(texts, steps):
    rng = np.random.default_rng(0)
    rows = [
        ModelRow("base", 0, "base"),
        *(ModelRow(f"step_{s}", s, "ckpt") for s in range(1, steps + 1)),
    ]

    def useless():
        heard = [[SampleResult(None, 0.1, None, each) for each in rng.normal(0.6, 0.03, len(rows))]
                 for _ in range(texts)]  # fmt: skip
        names = [row.name for row in rows]
        samples = [
            EvalSample(f"{i}", f"{TEXT} {i}", False, None, dict(zip(names, each, strict=True)))
            for i, each in enumerate(heard)
        ]
        return recommend(rows, samples, COMMANDS)

    assert sum(useless().verdict == "use" for _ in range(100)) <= 7  # 2.5 are to be expected


def test_a_sure_gain_leaves_a_smaller_one_its_due():
    """As where later checkpoints are much more like the voice, and have lost words."""
    rows, samples = board(BASE, (0.1, 0.7), (0.9, 0.8), (0.9, 0.8))
    for i, sample in enumerate(samples):  # significant alone, and as one of three not
        gain = 0.02 + (0.028 if i % 2 else -0.028)
        sample.spoken["step_1"].similarity = sample.spoken["base"].similarity + gain
    assert recommend(rows, samples, COMMANDS).step == 1
    for sample in samples:
        for name in ("step_2", "step_3"):
            sample.spoken[name] = sample.spoken["base"]
    assert recommend(rows, samples, COMMANDS).verdict == "keep the base"


def test_the_reason_and_the_command_name_what_was_found():
    found = recommend(*board(BASE, (0.1, 0.8)), COMMANDS)
    assert found.reason.startswith(
        "more like the voice than the base (similarity 0.79 against 0.59, significant at 95%); "
        "word error rate 21% against 21%, not significantly worse; "
    )
    assert "only checkpoint" in found.reason
    assert found.next == "merge 1.ckpt"
    assert str(found).startswith("use step 1: more like")
    rising = recommend(*board(BASE, (0.1, 0.7), (0.1, 0.8)), COMMANDS)
    assert "still getting better" in rising.reason
    bad = recommend(*board(BASE, (0.9, 0.8)), COMMANDS)
    assert bad.reason == "every checkpoint makes significantly more word errors than the base"
    assert bad.next == "speak with the base"
    costly = recommend(*board(BASE, BASE, (0.9, 0.8)), COMMANDS)
    assert costly.reason == (
        "no checkpoint is significantly more like the voice than the base "
        "(except step 2: each makes significantly more word errors)"
    )
    assert "except" not in recommend(*board(BASE, BASE, (0.9, 0.6)), COMMANDS).reason


def test_a_slow_gain_is_a_gain_though_no_step_of_it_can_be_told():
    rows, samples = board(BASE, BASE, BASE)
    for i, sample in enumerate(samples):
        before = sample.spoken["base"].similarity
        sample.spoken["step_1"].similarity = before + 0.02 + (0.05 if i % 2 else -0.05)
        sample.spoken["step_2"].similarity = before + 0.04 + (0.01 if i % 3 else -0.02)
    assert recommend(rows[:2], samples, COMMANDS).verdict == "keep the base"
    assert recommend(rows, samples, COMMANDS).step == 2


def test_what_comes_after_a_gain_is_not_hidden():
    lost = recommend(*board(BASE, (0.1, 0.7), (0.1, 0.8), (0.9, 0.9)), COMMANDS)
    assert lost.step == 2
    assert "still getting better" not in lost.reason
    assert lost.reason.endswith(
        "; each later one makes significantly more word errors than the base"
    )


def test_too_few_samples_tell_nothing():
    found = recommend(*board(BASE, (0.1, 0.9), samples=2), COMMANDS)
    assert (found.verdict, found.choice) == ("keep the base", "base")
    assert "too few" in found.reason


def test_silence_and_endless_speech_count_as_errors_where_nobody_listens():
    rows, samples = board((None, 0.6), (None, 0.8))
    for sample in samples[:10]:
        sample.spoken["step_1"].runaway = True
    found = recommend(rows, samples, COMMANDS)
    assert found.verdict == "keep the base"
    assert "significantly more runaways and empty outputs" in found.reason


def test_rows_that_failed_are_passed_over():
    rows, samples = board(BASE, (0.1, 0.8), (0.1, 0.9))
    rows[2].error = "damaged"
    assert recommend(rows, samples, COMMANDS).step == 1
    rows[1].error = "damaged"
    assert "no checkpoint could be measured" in recommend(rows, samples, COMMANDS).reason
    rows[0].error = "damaged"
    assert "the base could not be measured" in recommend(rows, samples, COMMANDS).reason


def test_where_words_are_lost_the_training_with_fewer_errors_is_named():
    rows, samples = board(BASE, (0.9, 0.9))
    found = recommend(rows, samples, replace(COMMANDS, fewer_word_errors="train less of it"))
    assert (found.verdict, found.next) == ("keep the base", "train less of it")
    assert found.reason.endswith("; adapting the fast transformer alone costs fewer words")
    assert recommend(rows, samples, COMMANDS).next == "speak with the base"
    rows, samples = board(BASE, BASE)  # nothing is lost: the command is not needed
    found = recommend(rows, samples, replace(COMMANDS, fewer_word_errors="train less of it"))
    assert found.next == "speak with the base"
