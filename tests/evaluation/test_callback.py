"""`--eval-every`: figures and audio between the steps, and a training that does not notice."""

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import finetune_tts
from fish_speech.evaluation.callback import EvaluateDuringTraining
from fish_speech.training.lit_module import TextToSemantic
from fish_speech.training.runs import Run
from tests.evaluation.conftest import Hearing
from tests.evaluation.test_project import project, trained  # noqa: F401 (fixtures)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning")
FLAGS = [
    *("--data-dir", "training_data/p", "--train", "--max-steps", "3", "--learning-rate", "1e-3"),
    *("--override", "data.validation_share=0.34", "--pretrained-ckpt-path", "base"),
]


def test_figures_and_audio_are_logged_and_the_adapters_are_the_same(
    project, monkeypatch  # noqa: F811
):  # fmt: skip
    monkeypatch.setattr(
        "fish_speech.evaluation.project.choose_recogniser", lambda *a: (Hearing(), None)
    )
    assert finetune_tts.main(["--project", "plain", *FLAGS]) == 0
    assert finetune_tts.main(["--project", "heard", *FLAGS, "--eval-every", "2"]) == 0
    states = [Run.of(name).checkpoint().read()["state_dict"] for name in ("plain", "heard")]
    torch.testing.assert_close(*states, atol=0, rtol=0)
    events = EventAccumulator("results/heard/logs/run_001").Reload()
    assert [each.step for each in events.Scalars("evaluation/wer")] == [1]
    assert len(events.Tags()["audio"]) == 8
    audio = events.Audio(events.Tags()["audio"][0])[0]
    assert (audio.step, audio.sample_rate) == (2, 8000)
    assert not (project / "results/heard/evaluation").exists()


def test_without_held_out_clips_it_says_so_before_training(project, capsys):  # noqa: F811
    flags = [*FLAGS, "--eval-every", "2", "--override", "data.validation_share=0"]
    assert finetune_tts.main(["--project", "q", *flags]) == 2
    assert "no clip is held out" in capsys.readouterr().err
    assert not Run.of("q").checkpoints()


@pytest.mark.parametrize("behind", [0, 1])
def test_adapters_that_a_step_has_spoiled_are_not_heard(project, monkeypatch, capsys, behind):  # noqa: F811
    def spoil(module):
        if module.global_step == 1:
            next(p for p in module.parameters() if p.grad is not None).grad.fill_(torch.inf)

    def heard(*_):
        raise AssertionError("spoke with adapters that are NaN")

    monkeypatch.setattr(
        "fish_speech.evaluation.project.choose_recogniser", lambda *a: (Hearing(), None)
    )
    monkeypatch.setattr(TextToSemantic, "_deferred_steps", lambda module: behind)
    monkeypatch.setattr(TextToSemantic, "on_after_backward", spoil)
    monkeypatch.setattr(EvaluateDuringTraining, "_evaluate", heard)
    assert finetune_tts.main(["--project", "spoiled", *FLAGS, "--eval-every", "2"]) != 0
    assert "the gradient is" in capsys.readouterr().err
