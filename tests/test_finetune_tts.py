"""finetune_tts.py as its users run it."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace

import pytest

import finetune_tts
from fish_speech import hub
from fish_speech.files import exclusive, file_digest
from tests.conftest import ROOT, golden_tensors
from tests.synthetic_data import make_data_set

PYTHON = sys.executable


def script(name, *arguments, cwd):
    return subprocess.run(
        [PYTHON, str(ROOT / f"{name}.py"), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_three_scripts_make_recordings_a_voice_that_speaks(tmp_path):
    """samples/ -> prepare -> extract -> pack -> train -> merge -> a WAV, on the embedded model."""
    prepared = script(
        "prepare_dataset", "--input", ROOT / "samples", "--output", "training_data/demo",
        "--speaker", "rms", "--normalize", "--split-long", cwd=tmp_path,
    )  # fmt: skip
    assert prepared.returncode == 0, prepared.stderr
    clips = list(tmp_path.glob("training_data/demo/rms/*.wav"))
    assert len(clips) == len(list((ROOT / "samples").glob("*.flac")))
    tuned = script(
        "finetune_tts", "--project", "demo", "--data-dir", "training_data/demo",
        "--model-version", "tiny", "--full-pipeline", "--max-steps", 4, "--save-every", 2,
        "--learning-rate", "1e-3", "--eval-samples", 2, cwd=tmp_path,
    )  # fmt: skip
    assert tuned.returncode == 0, tuned.stderr
    board = json.loads((tmp_path / "results/demo/evaluation/leaderboard.json").read_text())
    assert [row["step"] for row in board["rows"]] == [0, 2, 4]
    assert board["recogniser"].startswith("pocketsphinx")
    recording, coded, within, across = (row["figures"] for row in board["scale"])
    assert recording["wer"]["mean"] < 0.3 < board["rows"][0]["figures"]["wer"]["mean"]
    assert within["similarity"]["low"] > across["similarity"]["high"]
    assert within["similarity"]["low"] > coded["similarity"]["high"]
    assert coded["wer"]["mean"] > recording["wer"]["mean"]
    assert board["rows"][2]["figures"]["similarity"]["n"] == 2
    assert "next: " in tuned.stdout
    assert "validation loss" in tuned.stderr
    listed = script("finetune_tts", "--project", "demo", "--list-checkpoints", cwd=tmp_path)
    assert listed.stdout.splitlines()[-1] == "🎯 Latest: step_000000004.ckpt"
    spoken = script("cli_tts", "Hello there.", "-o", "hello.wav", cwd=tmp_path)
    assert spoken.returncode in (0, 1), spoken.stderr  # 1 where the small model rambles
    assert "demo-merged" in spoken.stderr
    import soundfile

    assert soundfile.info(tmp_path / "hello.wav").duration > 0.2


@pytest.fixture
def project(tmp_path, monkeypatch, base_dir):
    """`project(*flags)` runs the program in a folder with a small dataset; returns the status."""
    monkeypatch.chdir(tmp_path)
    make_data_set(tmp_path / "data", {"Ann": 6})

    def run(*flags, base=base_dir, name="p"):
        basics = ["--project", name, "--pretrained-ckpt-path", str(base)]
        return finetune_tts.main([*basics, *map(str, flags)])

    return run


TRAIN = ("--data-dir", "data", "--train", "--batch-size", 2, "--learning-rate", "1e-3")


def test_recordings_whose_clips_are_there_already_are_no_data_set(project, tmp_path, capsys):
    make_data_set(tmp_path / "training_data" / "p", {"Ann": 2})
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.wav").touch()
    assert project("--data-dir", "raw", "--train", "--max-steps", 1) == 2
    assert "--data-dir training_data/p" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert project("--data-dir", "empty", "--train", "--max-steps", 1) == 2
    assert "empty: no audio files" in capsys.readouterr().err


def test_the_guides_stages_one_after_the_other(project, tmp_path, capsys):
    # The made-up clips have made-up codes, so extraction comes from the flag of its own below.
    keep_codes(tmp_path)
    assert project("--data-dir", "data", "--build-dataset") == 0
    assert project(*TRAIN, "--max-steps", 4, "--save-every", 2) == 0
    assert project("--merge-weights", "--data-dir", "data") == 0
    assert (tmp_path / "checkpoints/p-merged/model.pth").is_file()
    capsys.readouterr()
    assert project("--list-checkpoints", "--data-dir", "data") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "🎯 Latest: step_000000004.ckpt"
    assert project("--merge-weights", "--checkpoint-step", 2) == 0
    assert project("--merge-weights", "--checkpoint-step", 3) == 2
    assert "only 2, 4" in capsys.readouterr().err


def keep_codes(tmp_path):
    """Make the clips as long as their made-up codes, so that extraction keeps these."""
    import numpy as np
    import soundfile

    for codes in (tmp_path / "data").rglob("*.npy"):
        frames = np.load(codes).shape[1]
        soundfile.write(codes.with_suffix(".wav"), np.zeros(frames * 2048 + 100), 44100)


def test_the_guides_three_stages_build_on_each_other(project, tmp_path, capsys):
    keep_codes(tmp_path)
    assert project(*TRAIN, "--max-steps", 2, name="stage1") == 0
    assert project(*TRAIN, "--max-steps", 2, "--resume-latest", name="stage2") == 0
    assert "newest trained on data" in capsys.readouterr().err
    path = "fish-speech/results/stage1/checkpoints/step_000000002.ckpt"
    assert project(*TRAIN, "--max-steps", 1, "--resume-from-checkpoint", path, name="exp1") == 0
    folder = "results/stage1/checkpoints/"
    assert project(*TRAIN, "--max-steps", 1, "--checkpoint-path", folder, name="exp2") == 0


def test_the_whole_pipeline_goes_on_where_it_was_and_does_nothing_twice(project, tmp_path, capsys):
    keep_codes(tmp_path)
    flags = ("--data-dir", "data", "--full-pipeline", "--no-evaluate", "--learning-rate", "1e-3")
    assert project(*flags, "--max-steps", 2) == 0
    assert project(*flags, "--max-steps", 4) == 0
    said = capsys.readouterr().err
    assert "6 up to date" in said
    assert "(unchanged)" in said
    assert "resuming from results/p/checkpoints/step_000000002.ckpt" in said


def test_recordings_are_evaluated_by_what_was_prepared_of_them(project, monkeypatch, capsys):
    os.mkdir("raw")
    for number in range(1, 4):
        for suffix in (".flac", ".txt"):
            shutil.copy(ROOT / f"samples/rms_00{number}{suffix}", "raw")
    asked = []

    def evaluate(run, request, say):
        asked.append(request)
        raise ValueError("enough")

    monkeypatch.setattr("fish_speech.evaluation.project.evaluate", evaluate)
    flags = ("--data-dir", "raw", "--full-pipeline", "--max-steps", 1, "--learning-rate", "1e-3")
    assert project(*flags) == 1
    assert [str(request.data_dir) for request in asked] == ["training_data/p"]
    assert "\nVerdict: fit to train on\n" in capsys.readouterr().out


def test_what_preparing_leaves_out_is_named(project, capsys, monkeypatch):
    def offline(*_, **__):
        raise ValueError("no model")

    monkeypatch.setattr("fish_speech.preparation.pipeline.load_recogniser", offline)
    os.mkdir("raw")
    shutil.copy(ROOT / "samples/rms_001.flac", "raw")
    shutil.copy(ROOT / "samples/rms_002.flac", "raw")
    shutil.copy(ROOT / "samples/rms_001.txt", "raw")
    assert project("--data-dir", "raw", "--prepare-data") == 1
    printed = capsys.readouterr().out
    assert "\n  raw/rms_002.flac: it has no text beside it, and the recogniser" in printed
    assert "\nVerdict: fit to train on, without what is left out\n" in printed


def test_a_resumed_run_says_that_its_data_is_another(project, tmp_path, capsys):
    keep_codes(tmp_path)
    assert project(*TRAIN, "--max-steps", 1) == 0
    assert project(*TRAIN, "--max-steps", 2) == 0
    changed = "the data has changed since results/p/checkpoints/step_000000002.ckpt"
    assert changed not in capsys.readouterr().err
    (tmp_path / "data/Ann/clip_0000.lab").write_text("Other words, many of them.")
    assert project(*TRAIN, "--max-steps", 3) == 0
    assert f"{changed}: going on with what data holds now" in capsys.readouterr().err


def test_another_base_is_refused_before_it_is_downloaded(project, tmp_path, monkeypatch, capsys):
    keep_codes(tmp_path)
    assert project(*TRAIN, "--max-steps", 1) == 0
    published = replace(hub.model_versions()["1.5"], directory=str(tmp_path / "fish-speech-1.5"))
    monkeypatch.setattr(hub, "model_versions", lambda root: {"1.5": published})
    monkeypatch.setattr(hub, "_download", lambda entry, place: pytest.fail("downloaded"))
    other = [*TRAIN, "--max-steps", 2, "--model-version", "1.5"]
    assert finetune_tts.main(["--project", "p", *map(str, other)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "project 'p' was trained over " in said
    assert said.endswith("fish-speech-1.5: choose another --project")


def test_what_is_no_dataset_is_said_before_a_model_is_downloaded(project, monkeypatch, capsys):
    monkeypatch.setattr(hub, "_missing_files", lambda entry, place: ["model.pth"])
    monkeypatch.setattr(hub, "_download", lambda entry, place: pytest.fail("downloaded"))
    assert finetune_tts.main(["--project", "p", "--data-dir", "nowhere", "--train"]) == 2
    assert "error: nowhere: no such dataset" in capsys.readouterr().err


def test_another_base_is_refused_before_its_codec_encodes_the_clips(
    project, tmp_path, base_dir, capsys
):
    keep_codes(tmp_path)
    assert project(*TRAIN, "--max-steps", 1) == 0
    capsys.readouterr()
    other = shutil.copytree(base_dir, tmp_path / "other")
    with next(other.glob("firefly-gan-vq-*.pth")).open("ab") as codec:
        codec.write(bytes(8))
    with (other / "model.pth").open("ab") as model:
        model.write(bytes(8))
    assert project(*TRAIN, "--max-steps", 2, base=other) == 2
    said = capsys.readouterr().err
    assert "which is not the same as" in said
    assert "codes:" not in said


@pytest.mark.parametrize(
    "flags",
    [
        ("--data-dir", "nowhere", "--train"),
        ("--data-dir", "data", "--train", "--override", "no.key=1"),
        ("--data-dir", "data", "--train", "--lora-config", "nothing"),
        ("--merge-weights",),
        ("--evaluate",),
    ],
)
def test_a_usage_error_does_not_wait_for_lightning(project, flags):
    program = (
        "import sys; from finetune_tts import main\n"
        "status = main(['--project', 'p', *sys.argv[1:]])\n"
        "print(status, 'lightning' in sys.modules)"
    )
    done = subprocess.run(
        [PYTHON, "-c", program, *flags],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["2", "False"], done.stderr


def test_its_own_base_is_downloaded_where_a_project_was_moved(
    project, tmp_path, monkeypatch, capsys, base_dir
):
    keep_codes(tmp_path)
    base = shutil.copytree(base_dir, tmp_path / "there/fish-speech-1.5")
    assert project(*TRAIN, "--max-steps", 1, base=base) == 0
    here = tmp_path / "here/fish-speech-1.5"
    published = replace(hub.model_versions()["1.5"], directory=str(here))
    published.files.clear()
    published.files["model.pth"] = 1
    monkeypatch.setattr(hub, "model_versions", lambda root: {"1.5": published})
    monkeypatch.setattr(
        hub, "_download", lambda entry, place: shutil.copytree(base, place, dirs_exist_ok=True)
    )
    other = [*TRAIN, "--max-steps", 2, "--model-version", "1.5"]
    assert finetune_tts.main(["--project", "p", *map(str, other)]) == 0
    assert "resuming from results/p/checkpoints/step_000000001.ckpt" in capsys.readouterr().err


def test_losses_that_cannot_be_drawn_cost_no_training(project, tmp_path, monkeypatch, capsys):
    keep_codes(tmp_path)

    def full(rows, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fish_speech.training.train.plot_losses", full)
    assert project(*TRAIN, "--max-steps", 1) == 0
    assert "loss.png: could not be drawn: [Errno 28]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "nothing to do: give a stage"),
        (("--train",), "--data-dir is missing"),
        ((*TRAIN, "--max-steps", 0), "train.max_steps is 0; it must be 1 to 1e+09"),
        (("--merge-weights", "--learning-rate", 1), "--learning-rate belongs to --train"),
        (
            (*TRAIN, "--model-version", "tiny", "--pretrained-ckpt-path", "base"),
            "--model-version and --pretrained-ckpt-path exclude each other",
        ),
        ((*TRAIN, "--max-steps", 0, "--prepare-data"), "train.max_steps is 0"),  # before it
        ((*TRAIN[:3], "--learning-rate", "nan"), "optimizer.learning_rate is nan"),
        ((*TRAIN[:3], "--override", "optimizer.learning_rate=-1"), "learning_rate is -1.0"),
        (
            (*TRAIN, "--lora-config", "r_9"),
            "one of fast_r_8_alpha_160, r_16_alpha_32, r_4_alpha_8, r_8_alpha_16",
        ),
        ((*TRAIN, "--override", "train.max_stepz=3"), "max_stepz"),
        ((*TRAIN[:3], "--override", "optimizer.learning_rate=fast"), "optimizer.learning_rate: "),
        ((*TRAIN, "--override", "train.max_steps=abc"), "abc"),
        ((*TRAIN, "--override", "train.save_every=0"), "train.save_every is 0"),
        ((*TRAIN[:3], "--override", "data.batch_size=0"), "data.batch_size is 0"),
        ((*TRAIN, "--override", "seed=null"), "seed"),
        ((*TRAIN, "--override", "train=3"), "config: "),
        ((*TRAIN, "--override", "lora.r=x"), "configs/text2semantic_finetune.yaml"),
        ((*TRAIN, "--override", "+train.foo=1"), "foo"),
        ((*TRAIN, "--override", "train.gradient_checkpointing=maybe"), "auto, true or false"),
        ((*TRAIN, "--override", "(("), "config: "),
        ((*TRAIN, "--device", "cpu:3"), "--device cpu:3: this machine has 1 of this kind"),
        ((*TRAIN, "--device", "cuda:abc"), "--device cuda:abc: unknown"),
        ((*TRAIN, "--strategy", "deepspeeed"), "deepspeeed"),
        ((*TRAIN, "--resume-latest", "--resume-from-checkpoint", "x"), "exclude each other"),
        ((*TRAIN, "--resume-latest"), "--resume-latest: no checkpoint"),
        ((*TRAIN, "--force-mps", "--device", "cpu"), "exclude each other"),
        ((*TRAIN, "--device", "tpu"), "--device tpu: unknown"),
        ((*TRAIN, "--precision", "int3"), "--precision int3: unknown"),
        ((*TRAIN, "--device", "cuda:0", "--devices", 2), "give --device cuda, or --devices 1"),
        (("--merge-weights",), "no checkpoints; train first"),
        (("--merge-weights", "--checkpoint-path", "x", "--checkpoint-step", 1), "what to merge"),
        (("--evaluate", "--checkpoint-path", "x"), "the project's own checkpoints"),
        (("--data-dir", "nowhere", "--train"), "nowhere: no such dataset"),
        (("--data-dir", "nowhere", "--full-pipeline"), "nowhere: no such folder"),
    ],
)
def test_bad_input_is_one_line_with_the_remedy(project, tmp_path, capsys, flags, message):
    keep_codes(tmp_path)
    assert project(*flags) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.gradient_clip=-1", "train.gradient_clip is -1.0; it must be 0 to 1e+09"),
        ("train.gradient_clip=nan", "train.gradient_clip is nan"),
        ("data.num_workers=-1", "data.num_workers is -1"),
        ("optimizer.warmup_steps=-1", "optimizer.warmup_steps is -1"),
        ("optimizer.eps=-1", "optimizer.eps is -1.0"),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay is -1.0"),
        ("optimizer.decay_share=2", "optimizer.decay_share is 2.0, not 0 to 1"),
        ("optimizer.final_share=-1", "optimizer.final_share is -1.0, not 0 to 1"),
        ("optimizer.schedule=linear", "'linear'; use one of constant, wsd, cosine"),
        ("optimizer.betas=[0.9,1]", "optimizer.betas is [0.9, 1.0]"),
        ("optimizer.betas=[0.9]", "optimizer.betas"),
        ("lora.dropout=1", "lora.dropout is 1.0; it must be from 0 to below 1"),
        ("train.dropout=-1", "train.dropout is -1.0; it must be from 0 to below 1"),
        ("lora.alpha=0", "lora.alpha is 0.0; it must be above 0"),
        ("train.strategy=dpp", "train.strategy is 'dpp', none of Lightning's; use auto or ddp"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_before_the_clips_are_encoded(
    project, tmp_path, capsys, setting, message
):
    assert project(*TRAIN, "--max-steps", 1, "--override", setting) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: config: ")
    assert message in said
    assert "\n" not in said  # no "codes: ...", no "shards: ..."


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--merge-weights", "--resume-from-checkpoint", "x"), "belongs to --train"),
        (("--merge-weights", "--resume-latest"), "--resume-latest belongs to --train"),
        (("--list-checkpoints", "--checkpoint-path", "x"), "--train or --merge-weights"),
        ((*TRAIN, "--checkpoint-step", 1), "--merge-weights or --merge-best or --evaluate"),
        ((*TRAIN, "--texts", "lines.txt"), "--texts belongs to --evaluate or --merge-best"),
        ((*TRAIN, "--eval-samples", 3), "--eval-samples belongs to"),
        ((*TRAIN, "--speaker-encoder", "x"), "--evaluate or --merge-best or --eval-every"),
        ((*TRAIN, "--whisper-model", "base"), "--whisper-model belongs to --prepare-data or"),
        ((*TRAIN, "--speaker", "Ann"), "--speaker belongs to --prepare-data: leave it out here"),
        (("--evaluate", "--eval-every", 3), "--eval-every belongs to --train"),
        (("--merge-weights", "--batch-size-extract", 3), "--batch-size-extract belongs to"),
        (("--merge-weights", "--num-workers-extract", 3), "--num-workers-extract belongs to"),
        (("--merge-weights", "--precision", "bf16"), "--train or --evaluate or --merge-best"),
        (("--merge-weights", "--num-workers", 1), "--num-workers belongs to --train: leave it out"),
        (("--evaluate", "--seed", 3), "--seed belongs to --train: leave it out here"),
        (("--evaluate", "--override", "seed=3"), "or --train or --merge-weights: leave it out"),
        (("--evaluate", "--lora-config", "r_4_alpha_8"), "belongs to --train or --merge-weights"),
        (("--list-checkpoints", "--devices", 2), "--devices belongs to --train: leave it out"),
        ((*TRAIN[:2], "--full-pipeline", "--speaker", "Ann"), "--speaker Ann: data is prepared"),
    ],
)
def test_a_flag_without_its_stage_is_refused(project, capsys, flags, message):
    assert project(*flags) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: --")
    assert message in said


@pytest.mark.parametrize("stage", ["--merge-weights", "--evaluate"])
def test_a_model_version_that_is_not_the_projects_base_is_refused(
    project, tmp_path, monkeypatch, capsys, stage
):
    keep_codes(tmp_path)
    assert project(*TRAIN, "--max-steps", 1) == 0
    monkeypatch.setattr(hub, "REPOSITORY", tmp_path)
    for version, problem in (("1.5", "fish-speech-1.5: "), ("tiny", "tiny")):
        assert finetune_tts.main(["--project", "p", stage, "--model-version", version]) == 2
        assert problem in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "checkpoints/p-merged").exists()


def test_a_disk_that_is_full_while_merging_leaves_the_voice_that_was_there(
    project, tmp_path, monkeypatch, capsys
):
    keep_codes(tmp_path)
    assert project(*TRAIN, "--max-steps", 2, "--save-every", 1) == 0
    assert project("--merge-weights", "--checkpoint-step", 1) == 0
    before = file_digest(tmp_path / "checkpoints/p-merged/model.pth")

    def full(state, folder, **more):
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / "model.pth"))

    with monkeypatch.context() as patch:
        patch.setattr("fish_speech.training.merge.save_model", full)
        assert project("--merge-weights") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    file = tmp_path / "checkpoints/p-merged/model.pth"
    assert said.startswith(f"error: {file}: no space left on device; make room, and the same")
    assert file_digest(file) == before
    assert project("--merge-weights") == 0
    assert file_digest(file) != before


def test_merging_another_step_says_which_project_it_leaves_without_a_base(
    project, tmp_path, capsys
):
    keep_codes(tmp_path)
    assert project(*TRAIN, "--max-steps", 2, "--save-every", 1) == 0
    assert project("--merge-weights") == 0
    base = tmp_path / "checkpoints/p-merged"
    assert project(*TRAIN, "--max-steps", 1, name="over", base=base) == 0
    for step, stranded in ((2, False), (1, True), (2, False)):
        capsys.readouterr()
        assert project("--merge-weights", "--checkpoint-step", step) == 0
        said = "over can't go on: trained over what checkpoints/p-merged was before"
        assert (said in capsys.readouterr().err) == stranded
    assert project(*TRAIN, "--max-steps", 2, name="over", base=base) == 0  # brought back


@pytest.mark.parametrize(
    "flags",
    [
        ("--full-pipeline", "--texts", "nowhere.txt"),
        ("--train", "--merge-best", "--texts", "nowhere.txt"),
        ("--full-pipeline", "--speaker-encoder", "./nowhere"),
        ("--train", "--eval-every", 1, "--speaker-encoder", "./nowhere"),
        ("--full-pipeline", "--whisper-model", "nowhere.pt"),
    ],
)
def test_what_an_evaluation_lacks_is_said_before_the_training(
    project, tmp_path, monkeypatch, capsys, flags
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert project("--data-dir", "data", *flags) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"error: {flags[-2]} {flags[-1]}: ")
    assert "codes: " not in said
    assert not (tmp_path / "results").exists()


def test_a_pipeline_with_nothing_held_out_has_not_failed(project, tmp_path, capsys):
    keep_codes(tmp_path)
    flags = ("--data-dir", "data", "--full-pipeline", "--max-steps", 1, "--learning-rate", "1e-3")
    assert project(*flags, "--override", "data.validation_share=0") == 0
    assert "not evaluated: data: no clip is held out" in capsys.readouterr().err
    assert (tmp_path / "checkpoints/p-merged/model.pth").is_file()


def test_settings_that_came_to_no_checkpoint_are_forgotten(project, tmp_path, capsys):
    keep_codes(tmp_path)
    assert project(*TRAIN, "--max-steps", 1) == 0
    flags = ("--data-dir", "data", "--train", "--max-steps", 3)
    for every in ("100", "1"):  # with the latter a spoiled checkpoint is put aside
        spoiled = ("--learning-rate", "1e30", "--save-every", every)
        assert project(*flags, *spoiled) == 2
        assert "is nan at step" in capsys.readouterr().err
    assert project(*flags) == 0
    assert (tmp_path / "results/p/checkpoints/step_000000003.ckpt").is_file()


@pytest.mark.parametrize("stages", [("--build-dataset",), ("--extract-tokens", "--build-dataset")])
def test_stages_by_themselves_are_over_the_projects_base(
    project, tmp_path, monkeypatch, capsys, stages
):
    keep_codes(tmp_path)
    asked = []
    assert project(*TRAIN, "--max-steps", 1) == 0
    from fish_speech.hub import find_model

    monkeypatch.setattr(
        "fish_speech.hub.find_model", lambda version: find_model(asked.append(version) or version)
    )
    flags = ("--project", "p", "--data-dir", "data", *stages)
    capsys.readouterr()
    assert finetune_tts.main([*flags]) == 0
    assert "1.5" not in asked
    assert "(unchanged)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("q", ("--resume-from-checkpoint", "results/p/checkpoints/step_000000001.ckpt")),
        ("q", ("--checkpoint-path", "results/p/checkpoints")),
        ("q", ("--resume-latest",)),
        ("p", ()),
    ],
)
def test_what_goes_on_without_a_base_named_is_over_the_checkpoints(project, tmp_path, name, flags):
    keep_codes(tmp_path)
    assert project(*TRAIN, "--max-steps", 1) == 0
    shutil.rmtree(tmp_path / "results/p/training_configs")
    arguments = ["--project", name, *TRAIN, "--max-steps", 2, *flags]
    assert finetune_tts.main([*map(str, arguments)]) == 0
    assert (tmp_path / f"results/{name}/checkpoints/step_000000002.ckpt").is_file()


def test_a_base_named_by_an_override_is_the_one_that_counts(project, tmp_path, capsys):
    keep_codes(tmp_path)
    assert project(*TRAIN, "--max-steps", 1) == 0
    flags = ("--resume-latest", "--override", f"base_model={tmp_path}/other")
    assert finetune_tts.main([*map(str, ("--project", "q", *TRAIN, *flags))]) == 2
    assert f"{tmp_path}/other" in capsys.readouterr().err


def test_what_can_not_be_encoded_is_named_once(project, tmp_path, capsys):
    keep_codes(tmp_path)
    (tmp_path / "data/Ann/clip_0001.npy").unlink()
    (tmp_path / "data/Ann/clip_0001.wav").write_bytes(b"RIFF no audio")
    assert project("--data-dir", "data", "--extract-tokens", "--build-dataset") == 1
    assert capsys.readouterr().err.count("clip_0001") == 2  # its name, and its file in the reason


def test_an_older_checkpoint_of_its_own_is_not_taken_for_the_newest(project, tmp_path, capsys):
    keep_codes(tmp_path)
    assert project(*TRAIN, "--max-steps", 2, "--save-every", 1) == 0
    older = "results/p/checkpoints/step_000000001.ckpt"
    assert project(*TRAIN, "--max-steps", 3, "--checkpoint-path", older) == 2
    assert f"--resume-from-checkpoint {older} goes back" in capsys.readouterr().err
    folder = "results/p/checkpoints/"
    assert project(*TRAIN, "--max-steps", 3, "--checkpoint-path", folder) == 0


@pytest.mark.parametrize("flag", ["--checkpoint-path", "--resume-from-checkpoint"])
def test_what_a_stopped_run_says_goes_on_does(project, tmp_path, monkeypatch, capsys, flag):
    from fish_speech.training.lit_module import TextToSemantic

    keep_codes(tmp_path)
    assert project(*TRAIN, "--max-steps", 1) == 0
    flags = (*TRAIN, "--max-steps", 3)
    step = TextToSemantic.training_step

    def interrupted(module, batch, index):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(module, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(TextToSemantic, "training_step", interrupted)
        newest = "results/p/checkpoints/step_000000001.ckpt"
        assert project(*flags, flag, newest) == 128 + signal.SIGTERM
    assert f"stopped; --resume-latest in place of {flag} goes on" in capsys.readouterr().err
    assert project(*flags, "--resume-latest") == 0
    assert "resuming from results/p/checkpoints/step_000000002.ckpt" in capsys.readouterr().err


def test_a_project_name_that_is_a_path_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert finetune_tts.main(["--project", "../x", "--list-checkpoints"]) == 2
    assert "--project '../x'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_published_model_offline_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fish_speech.hub.REPOSITORY", ROOT)
    make_data_set(tmp_path / "data", {"Ann": 2})
    if (ROOT / "checkpoints" / "fish-speech-1.5" / "model.pth").exists():
        pytest.skip("the published model is here")
    assert finetune_tts.main(["--project", "p", *map(str, TRAIN)]) == 2
    said = capsys.readouterr().err
    assert "fishaudio/fish-speech-1.5" in said
    assert "--model-version tiny" in said


def test_unwritable_results_are_named(project, tmp_path, capsys):
    keep_codes(tmp_path)
    (tmp_path / "results").write_text("a file in the way")
    assert project(*TRAIN, "--max-steps", 1) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: results: is a file, and a folder is to be here")


def test_a_killed_run_resumes_to_the_same_adapters(project, tmp_path, base_dir):
    """kill -9 after the checkpoint of step 3, then --resume-latest."""
    import torch

    keep_codes(tmp_path)
    flags = [*TRAIN, "--max-steps", 6, "--save-every", 3]
    assert project(*flags, name="whole") == 0
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); import finetune_tts\n"
        "from fish_speech.training.lit_module import TextToSemantic as M\n"
        "step = M.training_step\n"
        "def dying(self, batch, index):\n"
        "    if self.global_step == 4: os.kill(os.getpid(), 9)\n"
        "    return step(self, batch, index)\n"
        "M.training_step = dying\n"
        "finetune_tts.main(sys.argv[2:])\n"
    )
    arguments = ["--project", "killed", "--pretrained-ckpt-path", str(base_dir), *map(str, flags)]
    died = subprocess.run([PYTHON, "-c", code, str(ROOT), *arguments], cwd=tmp_path)
    assert died.returncode == -9
    assert project(*flags, "--resume-latest", name="killed") == 0
    states = [
        torch.load(f"results/{name}/checkpoints/step_000000006.ckpt", weights_only=True)
        for name in ("whole", "killed")
    ]
    torch.testing.assert_close(states[0]["state_dict"], states[1]["state_dict"], atol=0, rtol=0)
    shutil.rmtree(tmp_path / "results")


def test_a_checkpoint_cut_short_is_named_and_an_earlier_one_goes_on(project, tmp_path, capsys):
    keep_codes(tmp_path)
    assert project(*TRAIN, "--max-steps", 4, "--save-every", 2) == 0
    folder = tmp_path / "results/p/checkpoints"
    data = (folder / "step_000000004.ckpt").read_bytes()
    (folder / "step_000000004.ckpt").write_bytes(data[: len(data) // 2])
    for flags in (("--merge-weights",), (*TRAIN, "--max-steps", 6)):
        assert project(*flags) == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert "step_000000004.ckpt: damaged, cut short" in last
        assert "step 2 is whole: --resume-from-checkpoint" in last
    assert project("--list-checkpoints") == 0
    assert capsys.readouterr().out.endswith("Latest: step_000000002.ckpt\n")
    earlier = ("--resume-from-checkpoint", folder / "step_000000002.ckpt")
    assert project(*TRAIN, "--max-steps", 4, *earlier) == 0
    assert (folder / "step_000000004.ckpt").stat().st_size > 0.9 * len(data)


def test_two_projects_share_one_data_set(project, tmp_path, capsys):
    keep_codes(tmp_path)
    assert project(*TRAIN, "--max-steps", 1, "--seed", 1, name="one") == 0
    capsys.readouterr()
    assert project(*TRAIN, "--max-steps", 1, "--seed", 2, name="two") == 0
    assert "(unchanged)" in capsys.readouterr().err


def test_a_data_set_that_another_run_works_on_is_waited_for(project, tmp_path, monkeypatch, capsys):
    keep_codes(tmp_path)
    other = ExitStack()
    monkeypatch.setattr("time.sleep", lambda seconds: other.close())
    other.enter_context(exclusive(tmp_path / "data", "dataset"))
    assert project(*TRAIN, "--max-steps", 1) == 0
    said = capsys.readouterr().err
    assert said.count("waiting (Ctrl+C stops that): dataset data is in use by process") == 1

    def packed_by_somebody_else(*arguments, **more):
        with exclusive(tmp_path / "data", "dataset"):
            pass

    for stage in ("preparation.extract.extract_codes", "datasets.shards.build_shards"):
        with monkeypatch.context() as patch:
            patch.setattr(f"fish_speech.{stage}", packed_by_somebody_else)
            assert project(*TRAIN, "--max-steps", 2) == 2
        assert "dataset is in use by process" in capsys.readouterr().err

    def ctrl_c(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", ctrl_c)
    with exclusive(tmp_path / "data", "dataset"):
        assert project(*TRAIN, "--max-steps", 2) == 130


def test_adapters_trained_by_the_reference_merge(project, tmp_path, capsys):
    import torch

    torch.save(golden_tensors("lora.pt")["lora_ckpt"], tmp_path / "theirs.ckpt")
    assert project("--merge-weights", "--checkpoint-path", "theirs.ckpt") == 0
    assert (tmp_path / "checkpoints/p-merged/model.pth").is_file()
    assert project("--merge-weights", "--checkpoint-path", "theirs.ckpt",
                   "--lora-config", "r_4_alpha_8") == 2  # fmt: skip
    assert "not the adapters of this base model and LoRA config" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_a_full_disk_while_a_checkpoint_is_written_leaves_the_last_good_one(
    project, tmp_path, base_dir
):
    keep_codes(tmp_path)
    flags = [*map(str, TRAIN), "--max-steps", "6", "--save-every", "2"]
    code = (
        "import resource, signal, sys; sys.path.insert(0, sys.argv[1]); import finetune_tts\n"
        "from fish_speech.training.lit_module import TextToSemantic as M\n"
        "step = M.training_step\n"
        "def then_full(self, batch, index):\n"
        "    if self.global_step == 3:\n"
        "        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))\n"
        "    return step(self, batch, index)\n"
        "M.training_step = then_full\n"
        "sys.exit(finetune_tts.main(sys.argv[2:]))\n"
    )
    arguments = ["--project", "p", "--pretrained-ckpt-path", str(base_dir), *flags]
    full = subprocess.run(
        [PYTHON, "-c", code, str(ROOT), *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert full.returncode == 2
    last = full.stderr.strip().splitlines()[-1]
    assert "step_000000004.ckpt: could not be written" in last
    names = [path.name for path in (tmp_path / "results/p/checkpoints").iterdir()]
    assert names == ["step_000000002.ckpt"]
    assert project(*flags) == 0


def test_a_resumed_run_remembers_what_is_not_said_again(project, tmp_path):
    import torch

    keep_codes(tmp_path)
    flags = ("--data-dir", "data", "--train", "--save-every", 2)
    settings = ("--batch-size", 2, "--learning-rate", "1e-3", "--seed", 7, "--lora-config",
                "r_4_alpha_8")  # fmt: skip
    assert project(*flags, *settings, "--max-steps", 4, name="whole") == 0
    assert project(*flags, *settings, "--max-steps", 2, name="parts") == 0
    assert project("--data-dir", "data", "--train", "--max-steps", 4, name="parts") == 0
    states = [
        torch.load(f"results/{name}/checkpoints/step_000000004.ckpt", weights_only=True)
        for name in ("whole", "parts")
    ]
    torch.testing.assert_close(states[0]["state_dict"], states[1]["state_dict"], atol=0, rtol=0)


def test_an_evaluation_that_nobody_asked_for_never_costs_the_merge(
    project, tmp_path, monkeypatch, capsys
):
    keep_codes(tmp_path)
    monkeypatch.setattr("fish_speech.evaluation.project.evaluate", lambda *a: {}["no cuBLAS"])
    flags = ("--data-dir", "data", "--full-pipeline", "--max-steps", 2, "--learning-rate", "1e-3")
    assert project(*flags) == 1
    assert "not evaluated: 'no cuBLAS'" in capsys.readouterr().err
    assert (tmp_path / "checkpoints" / "p-merged" / "model.pth").is_file()
    assert project("--evaluate") == 2
    assert project("--evaluate", "--merge-weights", "--checkpoint-step", 1, 2) == 2
    assert "one step can be merged" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["2024", "1e5", "true", "голос"])
def test_any_folder_name_is_a_project(project, tmp_path, name):
    keep_codes(tmp_path)
    assert project(*TRAIN, "--max-steps", 1, name=name) == 0
    assert (tmp_path / "results" / name / "checkpoints/step_000000001.ckpt").is_file()


def test_an_unexpected_error_is_one_line_and_a_traceback_only_when_asked_for(
    project, tmp_path, monkeypatch, capsys
):
    class PanicException(BaseException):
        """As extensions in Rust raise."""

    def panic(*a, **k):
        raise PanicException("duplicate indices")

    flags = ("--data-dir", "data", "--build-dataset")
    monkeypatch.setattr("fish_speech.datasets.shards.build_shards", panic)
    assert project(*flags) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == "error: PanicException: duplicate indices (--debug shows where)"
    monkeypatch.setattr("fish_speech.datasets.shards.build_shards", lambda *a, **k: 1 / 0)
    assert project(*flags) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == "error: ZeroDivisionError: division by zero (--debug shows where)"
    assert project(*flags, "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
def test_two_processes_are_one_with_twice_the_batch(project, tmp_path, base_dir, launcher):
    import torch

    keep_codes(tmp_path)
    (tmp_path / "data/Ann/clip_0005.lab").write_text("")  # named and left out, in both runs
    flags = [
        "--data-dir", "data", "--full-pipeline", "--no-evaluate", "--max-steps", "3",
        "--learning-rate", "1e-3",
        "--save-every", "2", "--override", "lora.dropout=0", "--device", "cpu",
        "--precision", "fp32",
    ]  # fmt: skip
    assert project(*flags, "--batch-size", 2, name="one") == 1
    shutil.rmtree(tmp_path / "data" / "protos")
    start = [PYTHON] if launcher == "lightning" else [
        PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
    ]  # fmt: skip
    two = subprocess.run(
        [*start, str(ROOT / "finetune_tts.py"), "--project", "two", "--pretrained-ckpt-path",
         str(base_dir), *flags, "--batch-size", "1", "--devices", "2"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert two.returncode == 1, two.stderr
    assert (tmp_path / "checkpoints/two-merged/model.pth").is_file()
    names = [p.name for p in sorted((tmp_path / "results/two/checkpoints").iterdir())]
    assert names == ["step_000000002.ckpt", "step_000000003.ckpt"]
    states = [
        torch.load(f"results/{name}/checkpoints/step_000000003.ckpt", weights_only=True)
        for name in ("one", "two")
    ]
    torch.testing.assert_close(
        states[1]["state_dict"], states[0]["state_dict"], atol=1e-5, rtol=1e-4
    )


def test_an_unknown_model_version_is_refused_with_those_there_are(project, capsys):
    flags = ["--project", "p", *map(str, TRAIN), "--model-version", "9"]
    assert finetune_tts.main(flags) == 2
    assert "--model-version 9: one of 1.5, tiny" in capsys.readouterr().err


def test_training_whose_messages_nobody_reads_saves_a_checkpoint(tmp_path, base_dir):
    """As with `| head`."""
    make_data_set(tmp_path / "data", {"Ann": 6})
    flags = (*TRAIN, "--project", "p", "--max-steps", 500, "--val-every", 1)
    command = [PYTHON, ROOT / "finetune_tts.py", *flags, "--pretrained-ckpt-path", base_dir]
    process = subprocess.Popen(
        [*map(str, command)], cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    while not process.stderr.readline().startswith(b"step 1:"):
        assert process.poll() is None
    process.stderr.close()
    assert process.wait() == 1
    assert list(tmp_path.glob("results/p/checkpoints/step_*.ckpt"))
