"""`finetune_tts.py --evaluate` on a small random model and a few real clips."""

import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
import soundfile
import torch

import finetune_tts
from fish_speech.datasets.shards import read_manifest
from fish_speech.evaluation.asr import choose_recogniser
from fish_speech.evaluation.held_out import HeldOut
from fish_speech.evaluation.leaderboard import Leaderboard, Recommendation
from fish_speech.evaluation.project import _commands
from fish_speech.models.text2semantic import load_model
from fish_speech.tokenizer import FishTokenizer
from fish_speech.training.runs import Run
from tests.conftest import ROOT
from tests.evaluation.conftest import CLIPS, Hearing, text_of
from tests.random_voice import make_voice
from tests.tiny_whisper import SENTENCE, make_whisper

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning")
FOLDER = "results/p/evaluation"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a base, six clips in training_data/p and a run of four steps, untouched."""
    folder = tmp_path_factory.mktemp("trained")
    make_voice(folder / "base")
    (folder / "training_data/p/rms").mkdir(parents=True)
    for clip in CLIPS[:6]:
        shutil.copy(clip, folder / "training_data/p/rms")
        (folder / "training_data/p/rms" / f"{clip.stem}.lab").write_text(text_of(clip))
    before = os.getcwd()
    os.chdir(folder)
    try:
        assert finetune(
            "--data-dir", "training_data/p", "--train", "--max-steps", 4, "--save-every", 2,
            "--learning-rate", "0.05", "--override", "data.validation_share=0.34",
            "--pretrained-ckpt-path", "base", "--precision", "fp32",
        ) == 0  # fmt: skip
    finally:
        os.chdir(before)
    return folder


def finetune(*flags):
    return finetune_tts.main(["--project", "p", *map(str, flags)])


@pytest.fixture
def project(trained, tmp_path, monkeypatch):
    """A copy of it to work in; the recogniser is one that takes no time."""
    folder = tmp_path / "copy"
    shutil.copytree(trained, folder)
    monkeypatch.chdir(folder)
    for checkpoint in Run.of("p").checkpoints():
        move(checkpoint.path, trained, folder)
    monkeypatch.setattr(
        "fish_speech.evaluation.project.choose_recogniser", lambda *a: (Hearing(), None)
    )
    # A random model never ends by itself: let it be half a second.
    monkeypatch.setattr("fish_speech.inference.synthesize.max_speech_seconds", lambda text: 0.5)
    return folder


def move(checkpoint, old, new):
    """A checkpoint remembers where its data and its base are."""
    content = torch.load(checkpoint, weights_only=True)
    for key in ("base", "data_dir"):
        content["run"][key] = content["run"][key].replace(str(old.resolve()), str(new.resolve()))
    torch.save(content, checkpoint)


def last_error(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_the_base_and_every_checkpoint_are_measured(project, capsys):
    assert finetune("--evaluate", "--eval-samples", 4) == 0
    said = capsys.readouterr()
    board = Leaderboard.read(f"{FOLDER}/leaderboard.json")
    assert [(row.name, row.step) for row in board.rows] == [
        ("base", 0), ("step_000000002", 2), ("step_000000004", 4),
    ]  # fmt: skip
    assert all(row.error is None for row in board.rows)
    losses = [row.figures["held_out_loss"].mean for row in board.rows]
    logged = Run.of("p").logged("validation/loss")
    assert losses[1:] == pytest.approx([logged[2], logged[4]], rel=2e-3)
    assert board.rows[0].figures["training_loss"] is None
    assert board.rows[2].figures["training_loss"].n == 4
    held_out = json.loads((project / "training_data/p/protos/manifest.json").read_text())
    texts = {text_of(ROOT / "samples" / f"{name.split('/')[1]}.flac")
             for name in held_out["validation"]}  # fmt: skip
    assert {sample.text for sample in board.samples} == texts
    assert len(board.samples) == 8  # four, with and without a reference
    for name in ("runaways", "empty"):
        assert board.rows[0].figures[name].n == len(texts)
    assert "3 texts for 4 samples: --texts FILE gives more" in said.err
    assert said.out.splitlines()[0].split(":")[0] in ("train longer", "keep the base") or (
        said.out.startswith("use step ")
    )
    for sample in board.samples:
        spoken = [sample.spoken[row.name] for row in board.rows]
        assert all(soundfile.info(f"{FOLDER}/{each.audio}").frames for each in spoken)
        assert len({soundfile.read(f"{FOLDER}/{each.audio}")[0].tobytes() for each in spoken}) > 1
    assert not list((project / "results/p").rglob("model.pth"))


def test_the_training_that_costs_fewer_words_is_a_command_that_works(project, monkeypatch):
    made = []

    def remember(*arguments):
        made.append(_commands(*arguments))
        return made[-1]

    monkeypatch.setattr("fish_speech.evaluation.project._commands", remember)
    assert finetune("--evaluate", "--eval-samples", 1) == 0
    program, *flags = shlex.split(made.pop().fewer_word_errors)
    assert program == "finetune_tts.py"
    short = ("--max-steps", "1", "--no-evaluate", "--precision", "fp32")
    assert finetune_tts.main([*flags, *short, "--override", "data.validation_share=0.34"]) == 0
    assert finetune_tts.main(["--project", "p-timbre", "--evaluate", "--eval-samples", "1"]) == 0
    assert made.pop().fewer_word_errors is None


def test_again_and_with_one_more_step_only_what_is_new_is_spoken(project, monkeypatch):
    from fish_speech.inference import TextToSpeech

    said = []
    pieces = TextToSpeech.pieces
    monkeypatch.setattr(
        TextToSpeech,
        "pieces",
        lambda self, text, *more: said.append(text) or pieces(self, text, *more),
    )
    assert finetune("--evaluate", "--eval-samples", 1, "--checkpoint-step", 2) == 0
    assert len(said) == 4
    first = Leaderboard.read(f"{FOLDER}/leaderboard.json")
    assert [row.step for row in first.rows] == [0, 2]
    for name, damage in (("base", {"losses": None}), ("step_000000002", {"frames": []})):
        file = Path(FOLDER, "audio", name, "loss.json")
        file.write_text(json.dumps({**json.loads(file.read_text()), **damage}))
    assert finetune("--evaluate", "--eval-samples", 1) == 0
    assert len(said) == 6
    second = Leaderboard.read(f"{FOLDER}/leaderboard.json")
    assert second.rows[:2] == first.rows


def test_a_damaged_checkpoint_has_a_row_and_one_over_another_base_too(project, capsys):
    folder = project / "results/p/checkpoints"
    damaged, strange = folder / "step_000000001.ckpt", folder / "step_000000003.ckpt"
    newest = max(folder.glob("*.ckpt"))
    for file in (damaged, newest):
        file.write_bytes(b"PK nothing")
    content = torch.load(folder / "step_000000002.ckpt", weights_only=True)
    torch.save({**content, "run": {**content["run"], "base_digest": "other"}}, strange)
    assert finetune("--evaluate", "--eval-samples", 1, "--checkpoint-step", 1, 2, 3, 4) == 1
    board = Leaderboard.read(f"{FOLDER}/leaderboard.json")
    errors = [row.error for row in board.rows]
    assert [error is None for error in errors] == [True, False, True, False, False]
    assert "step_000000001.ckpt: damaged" in errors[1]
    assert f"{newest.name}: damaged" in errors[4]
    assert "has changed since" in errors[3]
    assert "step_000000001: could not be measured" in capsys.readouterr().err


def test_a_project_that_was_moved_with_its_data_finds_them(project, capsys):
    for checkpoint in Run.of("p").checkpoints():
        move(checkpoint.path, project, Path("/gone"))
    flags = ("--eval-samples", 1, "--checkpoint-step", 2)
    assert finetune("--evaluate", *flags) == 2
    assert "give its place with --pretrained-ckpt-path" in last_error(capsys)
    flags += ("--pretrained-ckpt-path", "base")
    assert finetune("--evaluate", *flags) == 0
    said = "/gone/training_data/p is not there any more: training_data/p is taken for it"
    assert said in capsys.readouterr().err
    Path("training_data").rename("data")
    assert finetune("--evaluate", *flags) == 2
    assert "give its place with --data-dir" in capsys.readouterr().err


def test_further_texts_are_spoken_too(project):
    (project / "more.txt").write_text("Hello there.\n\n?\nGood bye.\n", encoding="utf-8")
    flags = ("--evaluate", "--eval-samples", 3, "--texts", "more.txt")
    assert finetune(*flags, "--checkpoint-step", 2) == 0
    board = Leaderboard.read(f"{FOLDER}/leaderboard.json")
    texts = [sample.text for sample in board.samples if not sample.referenced]
    assert texts[:2] == ["Hello there.", "Good bye."]
    assert [sample.recording is None for sample in board.samples[::2]] == [True, True, False]


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_other_instruments_listen_where_they_are_named(project, monkeypatch, xvector_folder):
    whisper = make_whisper(project / "one sentence.pt")
    monkeypatch.setattr("fish_speech.evaluation.project.choose_recogniser", choose_recogniser)
    (project / "more.txt").write_text(SENTENCE, encoding="utf-8")
    flags = ("--evaluate", "--eval-samples", 2, "--texts", "more.txt", "--checkpoint-step", 2)
    flags += ("--whisper-model", whisper, "--speaker-encoder", xvector_folder)
    assert finetune(*flags) == 0
    board = Leaderboard.read(f"{FOLDER}/leaderboard.json")
    assert board.recogniser.startswith("openai ")
    assert board.speaker_encoder == "small-sv"
    told = [sample for sample in board.samples if sample.text == SENTENCE]
    results = [result for sample in told for result in sample.spoken.values()]
    assert [(result.heard, result.wer) for result in results] == [(SENTENCE, 0.0)] * 4
    assert all(-1 <= row.estimate("similarity").mean <= 1 for row in board.rows)


def test_too_few_texts_are_said_before_they_are_spoken_and_spoken_once(project, capsys):
    for name in HeldOut(Path("training_data/p")).held[1:]:
        Path("training_data/p", f"{name}.lab").unlink()
    assert finetune("--evaluate", "--eval-samples", 4) == 0
    said = capsys.readouterr().err
    warning = "too few different texts to tell (1): each is spoken once"
    assert 0 < said.index(warning) < said.index("base: ")
    board = Leaderboard.read(f"{FOLDER}/leaderboard.json")
    assert [sample.referenced for sample in board.samples] == [False, True]


def test_what_only_an_interruption_left_is_not_measured(project, capsys):
    """The latest is, wherever training was stopped."""
    folder = Run.of("p").checkpoint_folder
    shutil.copy(folder / "step_000000002.ckpt", folder / "step_000000001.ckpt")
    shutil.copy(folder / "step_000000004.ckpt", folder / "step_000000005.ckpt")
    assert finetune("--evaluate", "--eval-samples", 1) == 0
    board = Leaderboard.read(f"{FOLDER}/leaderboard.json")
    assert [row.step for row in board.rows] == [0, 2, 4, 5]
    assert "not measured: step 1, left by an interruption" in capsys.readouterr().err
    assert finetune("--evaluate", "--eval-samples", 1, "--checkpoint-step", 1) == 0
    assert [row.step for row in Leaderboard.read(f"{FOLDER}/leaderboard.json").rows] == [0, 1]


def test_where_nothing_is_recommended_nothing_is_merged_and_the_reason_is_said(project, capsys):
    assert finetune("--evaluate", "--eval-samples", 1) == 0
    assert finetune("--merge-best", "--eval-samples", 1) == 2
    why = "nothing is merged: keep the base: too few different texts to tell: 1"
    assert why in last_error(capsys)


def always_step_2(rows, samples, commands):
    return Recommendation("step_000000002", 2, "use", "it is", commands.use)


def test_the_command_that_is_named_merges_the_best_and_speaks_nothing_again(
    project, monkeypatch, capsys
):
    monkeypatch.setattr("fish_speech.evaluation.measure.recommend", always_step_2)
    Path("my {texts}.txt").write_text("Hello there.", encoding="utf-8")
    Path("base").rename("moved")  # the command must say where
    flags = ("--eval-samples", 2, "--texts", "my {texts}.txt", "--pretrained-ckpt-path", "moved")
    assert finetune("--evaluate", *flags, "--checkpoint-step", 2, "--device", "cpu") == 0
    monkeypatch.setattr("fish_speech.evaluation.synthesis._speak", None)
    program, *command = shlex.split(capsys.readouterr().out.split("next: ")[1].format(path="x"))
    assert program == "finetune_tts.py"
    assert finetune_tts.main(command) == 0
    assert "merging results/p/checkpoints/step_000000002.ckpt" in capsys.readouterr().err
    assert (project / "checkpoints/p-merged/model.pth").is_file()


def correct_a_transcript():
    held = json.loads(Path("training_data/p/protos/manifest.json").read_text())["validation"]
    for name in held:
        Path("training_data/p", f"{name}.lab").write_text("Other words were said here.")


@pytest.mark.parametrize(
    ("before", "change", "flags"),
    [
        ((), correct_a_transcript, ()),
        ((), lambda: None, ("--checkpoint-step", 2)),
        (("--eval-samples", 1), lambda: None, ()),
    ],
)
def test_what_was_recommended_of_something_else_is_not_merged(
    project, monkeypatch, before, change, flags
):
    monkeypatch.setattr("fish_speech.evaluation.project.SAMPLES", 2)  # which tell nothing
    with monkeypatch.context() as patch:
        patch.setattr("fish_speech.evaluation.measure.recommend", always_step_2)
        assert finetune("--evaluate", *before) == 0
    change()
    assert finetune("--merge-best", *flags) == 2
    assert not Path("checkpoints/p-merged").exists()


def some_held_out_spans(count=1):
    manifest = read_manifest("training_data/p")
    assert len(manifest.validation) == 3
    return [span for name in manifest.validation[-count:] for span in manifest.spans[name]]


def test_held_out_clips_that_do_not_count_are_told(project, capsys):
    for checkpoint in Run.of("p").checkpoints():
        content = torch.load(checkpoint.path, weights_only=True)
        learned = [*json.loads(content["run"]["learned"]), *some_held_out_spans()]
        content["run"]["learned"] = json.dumps(learned)
        torch.save(content, checkpoint.path)
    assert finetune("--evaluate", "--eval-samples", 1, "--checkpoint-step", 2) == 0
    said = capsys.readouterr().err
    assert "left out: 1 held-out clip that a checkpoint may have learned" in said


def test_steps_are_measured_in_their_order_whatever_the_flag_says(project):
    assert finetune("--evaluate", "--eval-samples", 1, "--checkpoint-step", 4, 2, 4) == 0
    assert [row.step for row in Leaderboard.read(f"{FOLDER}/leaderboard.json").rows] == [0, 2, 4]


def test_speakers_of_the_data_take_the_place_of_the_bases(project, monkeypatch):
    config = json.loads(Path("base/config.json").read_text())
    Path("base/config.json").write_text(json.dumps({**config, "speakers": ["SLT", "KAL"]}))
    # As if there were several.
    monkeypatch.setattr("fish_speech.evaluation.held_out.HeldOut.name_speakers", True)
    assert finetune("--evaluate", "--eval-samples", 1) == 0
    board = Leaderboard.read(f"{FOLDER}/leaderboard.json")
    assert [row.error for row in board.rows] == [None] * 3


def test_what_a_checkpoint_was_trained_on_is_not_held_out_from_it(project):
    record, more = Run.of("p").checkpoint().read()["run"], json.dumps(some_held_out_spans(2))
    data = HeldOut(Path("training_data/p"), [record, {**record, "learned": more}])
    (held,) = data.held
    tokenizer = FishTokenizer.from_pretrained(Path("base"))
    assert len(data.losses(load_model(Path("base")), tokenizer)["losses"]) == 1
    assert [line.recording.text for line in data.plan([], 1, print)][:1] == [
        text_of(ROOT / "samples" / f"{held.split('/')[1]}.flac")
    ]


def test_codes_of_another_codec_are_refused(project, capsys):
    record = Path("training_data/p/codes.json")
    record.write_text(json.dumps({**json.loads(record.read_text()), "codec": "another"}))
    assert finetune("--evaluate") == 2
    assert "its codes are of another codec than that of base" in (said := last_error(capsys))
    assert finetune(*shlex.split(said.split(" --project p ")[1])) == 0
    assert finetune("--evaluate", "--eval-samples", 1) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--evaluate", "--checkpoint-step", 3), "no such step, only 2, 4"),
        (("--evaluate", "--texts", "none.txt"), "--texts none.txt: no such file"),
        (("--evaluate", "--texts", "base/model.pth"), "--texts base/model.pth: not UTF-8 text"),
        (("--evaluate", "--texts", "empty.txt"), "empty.txt: no line has a letter or a number"),
        (("--evaluate", "--eval-samples", 0), "--eval-samples 0: must be above 0"),
        (("--evaluate", "--pretrained-ckpt-path", "nowhere"), "nowhere: no such model directory"),
        (("--merge-weights", "--checkpoint-step", 2, 4), "one step can be merged"),
        (("--merge-best", "--merge-weights"), "--merge-best chooses by itself"),
    ],
)
def test_bad_input_is_one_line_with_the_remedy(project, capsys, flags, message):
    (project / "empty.txt").write_text("...\n")
    assert finetune(*flags) == 2
    said = last_error(capsys)
    assert said.startswith("error: ")
    assert message in said


def test_a_data_set_without_held_out_clips_or_that_is_gone_says_what_to_do(project, capsys):
    manifest = project / "training_data/p/protos/manifest.json"
    content = json.loads(manifest.read_text())
    shards = {name: sum_ for name, sum_ in content["shards"].items() if name.startswith("train")}
    manifest.write_text(json.dumps({**content, "validation": [], "shards": shards}))
    assert finetune("--evaluate") == 2
    said = last_error(capsys)
    assert "no clip is held out" in said
    assert "data.validation_share" in said
    assert "--texts" in said
    (project / "texts.txt").write_text("Hello there.")
    flags = ("--evaluate", "--eval-samples", 1, "--checkpoint-step", 2)
    assert finetune(*flags, "--texts", "texts.txt") == 0
    manifest.unlink()
    assert finetune("--evaluate") == 2
    assert "--build-dataset" in last_error(capsys)
    (project / "training_data").rename(project / "moved")
    assert finetune("--evaluate") == 2
    assert "give its place with --data-dir" in last_error(capsys)


def test_data_that_moved_is_where_the_newest_checkpoint_saw_it(project):
    newest = Run.of("p").checkpoint().path
    content = torch.load(newest, weights_only=True)
    content["run"]["data_dir"] = str(project / "elsewhere")
    torch.save(content, newest)
    Path(project, "training_data", "p").rename(project / "elsewhere")
    assert finetune("--evaluate", "--eval-samples", 1) == 0


def test_nothing_trained_yet(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert finetune("--evaluate") == 2
    assert "no checkpoints; train first" in last_error(capsys)


def test_ctrl_c_is_clean_and_goes_on(project, monkeypatch, capsys):
    from fish_speech.evaluation import measure

    speak_line, spoken = measure.speak_line, []

    def interrupted(*arguments):
        if spoken:
            raise KeyboardInterrupt
        spoken.append(speak_line(*arguments))
        return spoken[-1]

    monkeypatch.setattr(measure, "speak_line", interrupted)
    flags = ("--evaluate", "--eval-samples", 1, "--checkpoint-step", 2)
    assert finetune(*flags) == 130
    assert "the same command goes on from there" in last_error(capsys)
    assert not (project / FOLDER / "leaderboard.json").exists()
    assert len(list((project / FOLDER / "audio/base").glob("*.wav"))) == 1
    monkeypatch.setattr(measure, "speak_line", speak_line)
    assert finetune(*flags) == 0


def test_the_whole_pipeline_evaluates_unless_told_not_to(project, monkeypatch, capsys):
    flags = ("--data-dir", "training_data/p", "--full-pipeline", "--max-steps", 4,
             "--eval-samples", 1)  # fmt: skip
    assert finetune(*flags, "--no-evaluate") == 0
    assert not (project / FOLDER).exists()
    assert finetune(*flags) == 0
    assert Leaderboard.read(f"{FOLDER}/leaderboard.json").title == "p"
    capsys.readouterr()
    assert finetune(*flags, "--texts", "none.txt") == 2
    assert "error: --texts none.txt: no such file" in capsys.readouterr().err

    def full(*arguments, **more):
        raise MemoryError("out of memory; try --device cpu")

    monkeypatch.setattr("fish_speech.evaluation.project.measure", full)
    assert finetune(*flags) == 1  # voices are not lost over a figure
    assert "not evaluated: out of memory; try --device cpu" in capsys.readouterr().err
    assert finetune("--evaluate") == 2


def test_data_in_another_language_has_no_error_rates(project, monkeypatch, capsys):
    monkeypatch.setattr("fish_speech.evaluation.project.choose_recogniser", choose_recogniser)
    monkeypatch.setenv("XDG_CACHE_HOME", str(project))  # no whisper model is there
    for label in (project / "training_data/p").rglob("*.lab"):
        label.write_text("Der Fuchs springt über den Hund, und die Katze schläft weiter.")
    flags = ("--evaluate", "--eval-samples", 1, "--checkpoint-step", 2)
    assert finetune(*flags) == 0
    assert "the texts are not English" in capsys.readouterr().err
    board = Leaderboard.read(f"{FOLDER}/leaderboard.json")
    assert board.recogniser is None
    assert board.rows[0].figures["wer"] is None
    assert board.rows[0].figures["held_out_loss"] is not None
