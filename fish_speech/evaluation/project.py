"""The leaderboard of a project: its base and its checkpoints, on its own held-out clips."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from shlex import join, quote
from typing import Any

import torch

from fish_speech.console import Say
from fish_speech.devices import resolve_device, resolve_precision, triton_unavailable_reason
from fish_speech.evaluation.asr import choose_recogniser
from fish_speech.evaluation.held_out import HeldOut
from fish_speech.evaluation.intervals import estimate
from fish_speech.evaluation.leaderboard import MIN_SAMPLES, Leaderboard
from fish_speech.evaluation.measure import AUDIO_FOLDER, Metrics, measure
from fish_speech.evaluation.page import write_markdown, write_page
from fish_speech.evaluation.recommend import Commands, literal
from fish_speech.evaluation.resynthesis import Resynthesis
from fish_speech.evaluation.scoring import Scorer
from fish_speech.evaluation.speaker import stranger_clips
from fish_speech.evaluation.synthesis import Candidate, cached
from fish_speech.evaluation.xvector import load_encoder
from fish_speech.files import (
    decode_text,
    exclusive,
    file_digest,
    remove_temporaries,
    safe_name,
    shown_path,
)
from fish_speech.hub import check_model_dir, directory_of
from fish_speech.inference import TextToSpeech
from fish_speech.models.text2semantic import DualARTransformer
from fish_speech.models.text2semantic.checkpoint import MODEL_FILE
from fish_speech.models.text2semantic.lora import add_lora, load_lora, merge_lora
from fish_speech.models.vqgan.codec import find_codec
from fish_speech.preparation.extract import codecs_of_codes
from fish_speech.preparation.transcribe import CachedRecogniser, load_recogniser
from fish_speech.resources import set_threads_for_model
from fish_speech.text import is_speakable, split_lines
from fish_speech.tokenizer import FishTokenizer
from fish_speech.training.resume import check_fits
from fish_speech.training.runs import Checkpoint, Run, recorded_lora

SAMPLES = 12
JOURNAL_NAME = "heard.jsonl"  # what the recogniser heard, kept for the next run
FAST_ONLY_LORA = "fast_r_8_alpha_160"  # of configs/lora
_LOGGED_STEPS = 20  # before a checkpoint, over which the training loss is averaged


@dataclass(frozen=True)
class Request:
    """What is asked for: `steps` (all checkpoints where empty), further `texts` (a file, a line
    each), how many `samples` (twelve; half of that where it is `brief`, on a CPU); the rest where
    the run's own record should not hold."""

    steps: Sequence[int] = ()
    texts: Path | None = None
    samples: int | None = None
    brief: bool = False
    data_dir: Path | None = None
    base_dir: Path | None = None
    device: str = "auto"
    precision: str = "auto"
    whisper_model: str | None = None
    speaker_encoder: str | None = None

    @classmethod
    def of_flags(cls, flags: Mapping[str, Any]) -> Request:
        """From those of `finetune_tts.py` (None: not given)."""
        version = flags["model_version"]
        given = {
            "steps": flags["checkpoint_step"],
            "texts": flags["texts"],
            "samples": flags["eval_samples"],
            "brief": not flags["evaluate"],  # nobody asked for it in so many words
            "data_dir": flags["data_dir"],
            "base_dir": directory_of(version) if version else flags["pretrained_ckpt_path"],
            "device": flags["device"],
            "precision": flags["precision"],
            "whisper_model": flags["whisper_model"],
            "speaker_encoder": flags["speaker_encoder"],
        }
        return cls(**{name: value for name, value in given.items() if value is not None})

    def to_flags(self, samples: int, record: dict[str, Any]) -> str:
        """What asks for the same once more, with so many `samples`, of a run with this `record`."""
        moved = self.data_dir and self.data_dir.resolve() != Path(record["data_dir"])
        other = self.base_dir and self.base_dir.resolve() != Path(record["base"])
        given = (
            ("--checkpoint-step", *self.steps),
            ("--texts", self.texts),
            ("--eval-samples", samples if samples != SAMPLES else None),
            ("--data-dir", self.data_dir if moved else None),
            ("--pretrained-ckpt-path", self.base_dir if other else None),
            ("--device", self.device if self.device != "auto" else None),
            ("--precision", self.precision if self.precision != "auto" else None),
            ("--whisper-model", self.whisper_model),
            ("--speaker-encoder", self.speaker_encoder),
        )
        return join(str(word) for flag in given if flag[1:] not in ((), (None,)) for word in flag)


class AdaptedBase:
    """A base model and the adapters of checkpoints, which are merged in memory and not written."""

    def __init__(self, directory: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.directory, self._device, self._dtype = directory, device, dtype

    @cached_property
    def model_digest(self) -> str:
        return file_digest(self.directory / MODEL_FILE)

    def candidates(self, checkpoints: Sequence[Checkpoint]) -> Iterator[Candidate]:
        """The base and its checkpoints."""
        # With CUDA graphs a seed samples otherwise.
        graphs = "" if triton_unavailable_reason(self._device) else " graphs"
        loaded_as = f"{self._device.type} {self._dtype} merged{graphs}"
        base = f"{self.model_digest} {file_digest(find_codec(self.directory))} {loaded_as}"
        yield Candidate("base", self.directory, base, self._load_tts, 0)
        for checkpoint in checkpoints:
            yield Candidate(
                checkpoint.path.stem,
                checkpoint.path,
                f"{base} {file_digest(checkpoint.path)}",
                partial(self._load_adapted, checkpoint),
                checkpoint.step,
            )

    def _load_tts(self, adapt: Callable[[DualARTransformer], None] | None = None) -> TextToSpeech:
        set_threads_for_model(self.directory / MODEL_FILE)
        tts = TextToSpeech.from_pretrained(
            self.directory, device=self._device, dtype=self._dtype, adapt=adapt
        )
        tts.forget_speakers()  # the project has its own
        return tts

    def _load_adapted(self, checkpoint: Checkpoint) -> TextToSpeech:
        content = checkpoint.read()
        lora = recorded_lora(content["run"])
        check_fits(checkpoint, lora, self.model_digest, self.directory)

        def adapt(model: DualARTransformer) -> None:
            add_lora(model, lora)
            load_lora(model, content["state_dict"], checkpoint.path)
            merge_lora(model)

        return self._load_tts(adapt)


def evaluate(run: Run, request: Request, say: Say) -> Leaderboard:
    """Measure a project and write `results/<project>/evaluation`.

    Where it was stopped it goes on. Raises `FileNotFoundError` or `ValueError` where there is
    nothing to measure or nothing to measure it with.
    """
    checkpoints = [run.checkpoint(step) for step in sorted(set(request.steps))]
    checkpoints = checkpoints or _planned(run, say) or [run.checkpoint()]  # which says what to do
    records = _readable_records(checkpoints)
    newest = records[-1]  # which knows where things are now
    data = HeldOut(request.data_dir or _recorded(newest, "data_dir", say), records)
    base_dir = request.base_dir or _recorded(newest, "base", say)
    check_model_dir(base_dir)
    if codecs_of_codes(data.data_dir) - {file_digest(find_codec(base_dir))}:
        raise ValueError(
            f"{data.data_dir}: its codes are of another codec than that of {base_dir}; make them "
            f"again: finetune_tts.py --project {run.project} --data-dir {_quoted(data.data_dir)} "
            f"--pretrained-ckpt-path {_quoted(base_dir)} --extract-tokens --build-dataset"
        )
    more_texts = read_texts(request.texts) if request.texts else []
    device = resolve_device(request.device)
    usual = SAMPLES // 2 if request.brief and device.type == "cpu" else SAMPLES
    samples = request.samples or usual
    lines = data.plan(more_texts, samples, say)
    if (texts := len({line.text for line in lines})) < MIN_SAMPLES:
        say(f"too few different texts to tell ({texts}): each is spoken once, to be listened to")
        lines = [line for line in lines if line.seed == 0]
    base = AdaptedBase(base_dir, device, resolve_precision(request.precision, device))
    folder = evaluation_folder(run)
    with exclusive(folder, f"the evaluation of project '{run.project}'"):
        remove_temporaries(folder)
        scorer = build_scorer(
            [*data.texts, *more_texts],
            say,
            whisper_model=request.whisper_model,
            speaker_encoder=request.speaker_encoder,
            device=request.device,
            journal=folder / JOURNAL_NAME,
        )
        real_clips = data.real_clips()
        board = measure(
            list(base.candidates(checkpoints)),
            lines,
            real_clips,
            folder,
            title=run.project,
            scorer=scorer,
            commands=_commands(run, data, base_dir, checkpoints, request.to_flags(samples, newest)),
            resynthesised=Resynthesis(base_dir, folder, request.device).of(real_clips),
            strangers=stranger_clips(),
            extra_metrics=partial(
                _losses, run, data, FishTokenizer.from_pretrained(base_dir), folder
            ),
            say=say,
        )
        say(f"the page: {write(board, folder)}")
    return board


def recommended(
    run: Run, request: Request, say: Say, board: Leaderboard | None = None
) -> Checkpoint:
    """The checkpoint to merge, by the `board` that was just made, else by evaluating.

    No board on disk is trusted, for the data, the base or what was asked for may be others by now;
    where they are the same, evaluating again speaks nothing anew.
    Raises `ValueError` that says why where none is recommended.
    """
    board = board or evaluate(run, replace(request, brief=False), say)
    best = board.recommendation
    if best.verdict != "use":
        raise ValueError(
            f"nothing is merged: {best.verdict}: {best.reason}; next: {best.next} "
            "(--merge-weights --checkpoint-step N merges one all the same)"
        )
    return run.checkpoint(best.step)


def evaluation_folder(run: Run) -> Path:
    return run.folder / "evaluation"


def write(board: Leaderboard, folder: Path) -> Path:
    """The leaderboard as JSON, as text and as a page; returns the page."""
    board.write(folder)
    write_markdown(board, folder)
    return write_page(board, folder)


def build_scorer(
    texts: Sequence[str],
    say: Say,
    *,
    whisper_model: str | None = None,
    speaker_encoder: str | None = None,
    device: str = "auto",
    journal: Path | None = None,
) -> Scorer:
    """A scorer for texts in this language; what its recogniser hears is kept in `journal`."""
    recogniser, note = choose_recogniser(texts, whisper_model, device)
    if note:
        say(note)
    if recogniser is not None and journal is not None:
        recogniser = CachedRecogniser(recogniser, journal)
    return Scorer(recogniser, load_encoder(speaker_encoder, device))


def check_named(request: Request) -> None:
    """Raise `FileNotFoundError` or `ValueError` where texts or models that were asked for by name
    can't be had."""
    if request.texts:
        read_texts(request.texts)
    if request.speaker_encoder:
        load_encoder(request.speaker_encoder, "cpu")
    if request.whisper_model:
        load_recogniser(request.whisper_model, device="cpu")


def read_texts(file: Path) -> list[str]:
    """The lines of a file that have words. Raises `FileNotFoundError` or `ValueError`."""
    if not file.is_file():
        what = "a folder; give a file of texts, one a line" if file.is_dir() else "no such file"
        raise FileNotFoundError(f"--texts {file}: {what}")
    lines = split_lines(decode_text(file.read_bytes(), f"--texts {file}"))
    texts = [line.strip() for line in lines if is_speakable(line)]
    if not texts:
        raise ValueError(f"--texts {file}: no line has a letter or a number")
    return texts


def _planned(run: Run, say: Say) -> list[Checkpoint]:
    """The checkpoints without those that only an interruption left before the latest: measuring one
    takes minutes."""
    found = run.checkpoints()
    left = [checkpoint for checkpoint in found[:-1] if not checkpoint.was_due()]
    if left:
        steps = ", ".join(str(checkpoint.step) for checkpoint in left)
        say(f"not measured: step {steps}, left by an interruption (--checkpoint-step measures it)")
    return [checkpoint for checkpoint in found if checkpoint not in left]


def _readable_records(checkpoints: Sequence[Checkpoint]) -> list[dict[str, Any]]:
    """What those that can be read were trained on. Raises `ValueError` if none can be."""
    records, failure = [], None
    for checkpoint in checkpoints:
        try:
            records.append(checkpoint.read()["run"])
        except ValueError as error:
            failure = failure or error
    if not records:
        raise failure
    return records


def _recorded(record: dict[str, Any], what: str, say: Say) -> Path:
    """The dataset (`data_dir`) or the base of a run: where it says that they were, or where they
    are when all of it was moved: training_data/NAME, checkpoints/NAME.

    Raises `FileNotFoundError` that names the flag with which their place is given.
    """
    recorded = Path(shown_path(Path(record[what])))
    if recorded.is_dir():
        return recorded
    moved = Path(*recorded.parts[-2:])
    if moved.is_dir():
        say(f"{recorded} is not there any more: {moved} is taken for it")
        return moved
    name, flag = {
        "data_dir": ("dataset", "--data-dir"),
        "base": ("base model", "--pretrained-ckpt-path"),
    }[what]
    raise FileNotFoundError(
        f"{recorded}: the {name} of this project is not there any more; give its place with {flag}"
    )


def _losses(
    run: Run, data: HeldOut, tokenizer: FishTokenizer, folder: Path, candidate: Candidate,
    get_tts: Callable[[], TextToSpeech],
) -> Metrics:  # fmt: skip
    """The held-out loss of a candidate, and the training loss of the steps before it."""
    found = cached(
        folder / AUDIO_FOLDER / safe_name(candidate.name) / "loss.json",
        [candidate.digest, data.manifest.shards, data.held],
        lambda: data.losses(get_tts().model, tokenizer),
        is_valid=lambda found: (
            len(found["losses"]) == len(found["frames"])
            and all(type(value) in (int, float) for value in (*found["losses"], *found["frames"]))
        ),
    )
    weighted = [
        loss * frames for loss, frames in zip(found["losses"], found["frames"], strict=True)
    ]
    logged = run.logged("train/loss")
    before = range(candidate.step - _LOGGED_STEPS + 1, candidate.step + 1)
    return {
        "held_out_loss": estimate(weighted, found["frames"]),
        "training_loss": estimate([logged[step] for step in before if step in logged]),
    }


def _commands(
    run: Run, data: HeldOut, base_dir: Path, checkpoints: Sequence[Checkpoint], asked: str
) -> Commands:
    program = f"finetune_tts.py --project {run.project}"
    data_dir, base = _quoted(data.data_dir), _quoted(base_dir)
    longer = f"--data-dir {data_dir} --train --max-steps {2 * run.checkpoints()[-1].step}"
    reference = next(iter(data.references.values()), None)
    cloning = f" --reference-audio {_quoted(reference.audio)}" if reference else ""
    fast_only = all(target.startswith("fast_") for target in _targets(checkpoints))
    again = f"--data-dir {data_dir} --pretrained-ckpt-path {base} --full-pipeline"
    return Commands(
        use=literal(f"{program} --merge-best {asked}".rstrip()),
        train_longer=f"{program} {longer}",
        keep=f'cli_tts.py "Hello there." --model-path {base}{cloning}',
        fewer_word_errors=None
        if fast_only
        else f"{program}-timbre {again} --lora-config {FAST_ONLY_LORA}",
    )


def _quoted(path: Path) -> str:
    """A path as a shell takes it."""
    return quote(str(path))


def _targets(checkpoints: Sequence[Checkpoint]) -> Sequence[str]:
    """What the first checkpoint that can be read adapts."""
    for checkpoint in checkpoints:
        with suppress(ValueError):
            return recorded_lora(checkpoint.read()["run"]).targets
    return ()
