# ruff: noqa: E501 (commands stand here as they are typed)
"""The commands of the user's guide, as typed there, on small data with small step counts."""

import ast
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import soundfile

import cli_tts
import finetune_tts
import prepare_dataset
from fish_speech.training.arguments import EPILOG
from fish_speech.training.config import _GROUPS, _KEYS
from tests.conftest import ROOT
from tests.synthetic_data import make_data_set

PROGRAMS = {
    "prepare_dataset.py": prepare_dataset,
    "finetune_tts.py": finetune_tts,
    "cli_tts.py": cli_tts,
}
COMMANDS = """
prepare_dataset.py --input samples --output training_data/note_lm --normalize --split-long --auto-transcribe
finetune_tts.py --project my_custom_voice --data-dir training_data/my_voice --model-version 1.5 --full-pipeline --max-steps 1000 --batch-size 4 --learning-rate 1e-4
finetune_tts.py --project my_step_voice --data-dir raw_audio/ --prepare-data
finetune_tts.py --project my_step_voice --data-dir training_data/my_step_voice --extract-tokens --batch-size-extract 16
finetune_tts.py --project my_step_voice --data-dir training_data/my_step_voice --train --max-steps 200 --batch-size 2 --learning-rate 5e-5
finetune_tts.py --project my_step_voice --merge-weights --data-dir training_data/my_step_voice
finetune_tts.py --project quick_pronunciation --data-dir training_data/my_voice --train --max-steps 100 --batch-size 2 --learning-rate 2e-5
finetune_tts.py --project voice_timbre_stage1 --data-dir training_data/my_voice --train --max-steps 300 --batch-size 2 --learning-rate 2e-5
finetune_tts.py --project voice_timbre_stage2 --data-dir training_data/my_voice --train --max-steps 500 --batch-size 1 --learning-rate 1e-5 --checkpoint-path results/voice_timbre_stage1/checkpoints/
finetune_tts.py --project note_lm_step2 --data-dir training_data/note_lm --train --max-steps 200
finetune_tts.py --project note_lm_step2 --merge-weights --data-dir training_data/note_lm
finetune_tts.py --project note_lm_step2 --data-dir training_data/note_lm --list-checkpoints
finetune_tts.py --project note_lm_step3 --data-dir training_data/note_lm --train --max-steps 300 --batch-size 8 --learning-rate 1.2e-5 --resume-latest
finetune_tts.py --project note_lm_step4 --data-dir training_data/note_lm --train --max-steps 300 --batch-size 8 --learning-rate 1.2e-5 --resume-from-checkpoint fish-speech/results/note_lm_step2/checkpoints/step_000000002.ckpt
finetune_tts.py --project note_lm_stage1 --data-dir training_data/note_lm --train --max-steps 200 --batch-size 4 --learning-rate 5e-6
finetune_tts.py --project note_lm_stage2 --data-dir training_data/note_lm --train --max-steps 300 --batch-size 8 --learning-rate 1e-5 --resume-latest
finetune_tts.py --project note_lm_final --data-dir training_data/note_lm --train --max-steps 200 --batch-size 8 --learning-rate 8e-6 --resume-latest
finetune_tts.py --project my_personal_voice --data-dir training_data/my_voice --full-pipeline --max-steps 1000 --batch-size 4 --learning-rate 1e-4 --device cpu
finetune_tts.py --project my_voice --data-dir training_data/my_voice --train
finetune_tts.py --project my_voice --data-dir training_data/my_voice --train --device cpu --batch-size 1 --resume-latest
prepare_dataset.py --input speaker1_data/ --output training_data/multi_voice --speaker Speaker1
prepare_dataset.py --input speaker2_data/ --output training_data/multi_voice --speaker Speaker2
finetune_tts.py --project multi_voice_model --data-dir training_data/multi_voice --full-pipeline
finetune_tts.py --project my_voice_v2 --data-dir new_training_data/ --train --pretrained-ckpt-path checkpoints/my_custom_voice-merged/
prepare_dataset.py --input training_data/note_lm --output check_data/ --auto-transcribe
cli_tts.py "Testing our trained model" --model-path checkpoints/my_custom_voice-merged -o output/test_finetuned.wav
"""


def recordings(folder: Path, count: int) -> None:
    """Spoken clips with transcripts, from samples/."""
    folder.mkdir(parents=True)
    for file in sorted((ROOT / "samples").glob("*.flac"))[:count]:
        for part in (file, file.with_suffix(".txt")):
            (folder / part.name).write_bytes(part.read_bytes())


def test_no_command_that_stands_in_writing_is_refused():
    files = [ROOT / "Makefile", ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    texts = (file.read_text(encoding="utf-8").replace("\\\n", "") for file in files)
    written = [COMMANDS, EPILOG, *texts]
    commands = re.findall(r"finetune_tts\.py (--project .*)", "\n".join(written))
    assert len(commands) > 25
    for command in commands:
        args = finetune_tts.build_parser().parse_args(shlex.split(command))
        finetune_tts.check_arguments(args)


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_flag_is_read(name):
    """By its name: as an attribute, or as a key."""
    read = {"help", *_KEYS, *_GROUPS}
    for file in [ROOT / name, *(ROOT / "fish_speech").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                read.add(node.attr)
            elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                read.add(node.slice.value)
    flags = {action.dest for action in PROGRAMS[name].build_parser()._actions}
    assert flags - read == set()


def test_every_link_in_writing_leads_somewhere():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")]
    pages += [*ROOT.glob("checkpoints/*/README.md"), *ROOT.glob("recipes/*/README.md")]
    links = [
        (page, to) for page in pages for to in re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    ]
    local = [(page, to) for page, to in links if "://" not in to]
    assert len(local) > 15
    for page, to in local:
        path, _, anchor = to.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page}: {to}"
        if anchor:
            titles = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, f"{page}: {to}"


@pytest.mark.slow
def test_every_command_of_the_guide_works_as_typed(tmp_path, monkeypatch, base_dir, capsys):
    monkeypatch.chdir(tmp_path)
    # The published weights can't be had here; the small golden model stands in their place.
    for name in ("hub.find_model", "hub.directory_of", "evaluation.project.directory_of"):
        monkeypatch.setattr(
            f"fish_speech.{name}",
            lambda version, root=None: base_dir if version == "1.5" else Path(version),
        )
    for name, count in (
        ("samples", 3),
        ("raw_audio", 3),
        ("speaker1_data", 2),
        ("speaker2_data", 2),
    ):
        recordings(tmp_path / name, count)
    for folder in ("training_data/my_voice", "new_training_data"):
        make_data_set(tmp_path / folder, {"ME": 4})
        for codes in (tmp_path / folder).rglob("*.npy"):
            frames = np.load(codes).shape[1]
            noise = np.random.default_rng(0).normal(0, 0.05, frames * 2048 + 100)
            soundfile.write(codes.with_suffix(".wav"), noise, 44100)
    for command in COMMANDS.strip().splitlines():
        small = re.sub(r"--max-steps \d+", "", command)
        program, *arguments = shlex.split(small)
        if program == "finetune_tts.py" and ("--train" in small or "--full-pipeline" in small):
            arguments += ["--max-steps", "2"]
            arguments += ["--eval-samples", "1"] if "--full-pipeline" in small else []
            if "--resume-latest" in small and "my_voice " in small:
                arguments[-1] = "3"
        status = PROGRAMS[program].main(arguments)
        said = capsys.readouterr()
        assert status == 0, f"{command}\n{said.err}"
    assert (tmp_path / "training_data/multi_voice/Speaker2").is_dir()
    assert soundfile.info(tmp_path / "output/test_finetuned.wav").frames > 0
