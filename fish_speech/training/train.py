"""From a config to a trained checkpoint."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from fish_speech.console import Say, counted
from fish_speech.datasets.semantic import SemanticDataModule, SemanticDataset
from fish_speech.datasets.shards import Manifest, Sample, learned_by, load_split
from fish_speech.datasets.spans import SpanSet, learned_by_model
from fish_speech.devices import resolve_device, resolve_precision
from fish_speech.files import exclusive, file_digest, remove_temporaries, write_text
from fish_speech.models.text2semantic import ModelConfig, load_model
from fish_speech.models.text2semantic.checkpoint import MODEL_FILE
from fish_speech.models.text2semantic.lora import add_lora, load_lora
from fish_speech.models.vqgan import CodecConfig
from fish_speech.resources import is_out_of_memory
from fish_speech.tokenizer import FishTokenizer
from fish_speech.training.callbacks import (
    AtomicCheckpoints,
    Progress,
    SaveCheckpoints,
    StopCleanly,
    plot_losses,
)
from fish_speech.training.config import RunConfig
from fish_speech.training.distributed import is_rank_zero
from fish_speech.training.lit_module import DivergedError, TextToSemantic
from fish_speech.training.preflight import out_of_memory, preflight
from fish_speech.training.resume import Start, check_fits
from fish_speech.training.runs import Checkpoint, Run
from fish_speech.training.step_graphs import StepGraphs

_RISE = 1.3  # times the loss at the beginning, which no good training reaches


@dataclass(frozen=True)
class Trained:
    """The last checkpoint of a run, and the signal that ended it early (None where none did)."""

    checkpoint: Checkpoint
    stopped_by: int | None


def train(
    config: RunConfig,
    *,
    base_dir: Path,
    manifest: Manifest,
    start: Start,
    say: Say,
    callbacks: Sequence[L.Callback] = (),
) -> Trained:
    """Train adapters over the model in `base_dir` on the packed dataset.

    `say` is given what the user should know, `callbacks` see every step after those of the run.
    Raises `ValueError` where something doesn't fit or the loss diverges; running out of memory ends
    in a `MemoryError` that says what to change.
    """
    run = Run.of(config.project)
    if not is_rank_zero():  # a further process of a run whose first one holds the lock
        return _train(config, run, base_dir, manifest, start, lambda message: None, callbacks)
    with exclusive(run.folder, f"project '{run.project}'"):
        for folder in (run.checkpoint_folder, run.logs, run.configs):  # an evaluation has its own
            remove_temporaries(folder)
        return _train(config, run, base_dir, manifest, start, say, callbacks)


def _train(
    config: RunConfig,
    run: Run,
    base_dir: Path,
    manifest: Manifest,
    start: Start,
    say: Say,
    callbacks: Sequence[L.Callback],
) -> Trained:
    max_steps = config.train.max_steps
    if start.resumes and start.checkpoint.step >= max_steps:
        say(
            f"{start.checkpoint.path} is at step {start.checkpoint.step} of {max_steps} already; "
            "nothing to train; a higher --max-steps trains on"
        )
        return Trained(start.checkpoint, None)
    device = resolve_device(config.device)
    module, data = _module_and_data(config, run, base_dir, manifest, start, device, say)
    if is_rank_zero():
        time = datetime.now().strftime("%Y%m%d-%H%M%S")
        write_text(run.configs / f"{time}.yaml", config.to_yaml())
    return _fit(config, run, module, data, start, device, say, callbacks)


def _module_and_data(
    config: RunConfig,
    run: Run,
    base_dir: Path,
    manifest: Manifest,
    start: Start,
    device: torch.device,
    say: Say,
) -> tuple[TextToSemantic, SemanticDataModule]:
    """What `_fit` trains, and on what: adapters over the base, at the step where it starts."""
    dtype = resolve_precision(config.precision, device, training=True)
    lora = config.adapters
    base_digest = file_digest(base_dir / MODEL_FILE)
    if start.checkpoint is not None:
        check_fits(start.checkpoint, lora, base_digest, base_dir)
    if start.resumes:
        start.checkpoint.check()

    before = start.checkpoint.read()["run"] if start.checkpoint is not None else {}
    if start.resumes and before.get("shards") not in (None, manifest.shards):
        say(
            f"the data has changed since {start.checkpoint.path}: going on with what "
            f"{config.data.dir} holds now"
        )
    learned = learned_by(before, manifest, Path(config.data.dir)) | learned_by_model(base_dir)
    learner = start.checkpoint.path if start.checkpoint is not None else base_dir
    data = _data_module(config, base_dir, manifest, learned, learner, say)
    validated = {sample.name for sample in data.validation.samples}
    learned |= manifest.spans_of(name for name in manifest.spans if name not in validated)
    data.start_step = start.checkpoint.step if start.resumes else 0
    model = load_model(base_dir, dtype=dtype)
    model.set_dropout(config.train.dropout)
    add_lora(model, lora, seed=config.seed)
    if start.checkpoint is not None and not start.resumes:
        load_lora(model, start.checkpoint.read()["state_dict"], start.checkpoint.path)
    module = TextToSemantic(
        model,
        config.optimizer,
        seed=config.seed,
        run=_run_record(config, run, base_dir, base_digest, manifest, start, learned),
        clip_names=[sample.name for sample in data.train.samples],
    )
    model.train()  # Lightning leaves the mode as it finds it
    frame_rate = CodecConfig.from_pretrained(base_dir).frame_rate
    if preflight(config, model, data, frame_rate, device, say):
        module.graphs = StepGraphs(model)
    return module, data


def _fit(
    config: RunConfig,
    run: Run,
    module: TextToSemantic,
    data: SemanticDataModule,
    start: Start,
    device: torch.device,
    say: Say,
    callbacks: Sequence[L.Callback],
) -> Trained:
    checkpoints = SaveCheckpoints(run, config.train.save_every, config.train.keep_checkpoints, say)
    stop, save_config = StopCleanly(checkpoints), _SaveRunConfig(config, run)
    try:
        with _quiet_lightning():
            own = [checkpoints, save_config, Progress(config.train.max_steps), stop]
            trainer = _trainer(config, run, device, data, [*own, *callbacks])
            trainer.fit(module, data, ckpt_path=start.checkpoint.path if start.resumes else None)
    except DivergedError as error:
        begin = start.checkpoint.step if start.resumes else 0
        undone = _archive_diverged(run, error.step, begin, log_name=trainer.loggers[0].version)
        if is_rank_zero() and not any(checkpoint.step > begin for checkpoint in run.checkpoints()):
            save_config.undo()
        raise ValueError(f"{error}; {undone}") from error
    except SystemExit as error:  # Lightning's answer to a second Ctrl+C
        raise KeyboardInterrupt from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(out_of_memory(graphs=module.graphs is not None)) from error
    finally:
        stop.restore()
        if is_rank_zero():
            _plot(run, say)
    _warn_of_rise(run, start.checkpoint.step if start.resumes else 0, say)
    return Trained(run.checkpoint(trainer.global_step), stop.signal)


def _warn_of_rise(run: Run, begin: int, say: Say) -> None:
    """Say where a training has made the model worse than it was, which ends in no error."""
    losses = [loss for step, loss in sorted(run.logged("train/loss").items()) if step > begin]
    part = max(1, len(losses) // 5)
    first, last = (sum(some) / part for some in (losses[:part], losses[-part:]))
    if last > _RISE * first:
        say(
            f"warning: the training loss rose from {first:.1f} to {last:.1f}: this voice is worse "
            "than its base; lower --learning-rate"
        )


class _SaveRunConfig(L.Callback):
    """Keeps the config that the next start goes on with: from the first checkpoint on, for settings
    that came to none would fail that start too."""

    def __init__(self, config: RunConfig, run: Run) -> None:
        self.config, self.file = config, run.saved_config
        self._before = self.file.read_text(encoding="utf-8") if self.file.is_file() else None

    def on_save_checkpoint(self, trainer: L.Trainer, module, checkpoint: dict[str, Any]) -> None:
        if trainer.is_global_zero:
            write_text(self.file, self.config.to_yaml())

    def undo(self) -> None:
        if self._before is not None:
            write_text(self.file, self._before)


def _archive_diverged(run: Run, step: int, begin: int, *, log_name: str) -> str:
    """Put the checkpoint aside that a run saved of the step at which it diverged; where to go
    on."""
    earlier = [checkpoint.path for checkpoint in run.checkpoints() if checkpoint.step < step]
    if step == begin:  # the start itself: it is not this run's to move
        others = f" (--resume-from-checkpoint {earlier[-1]})" if earlier else ""
        return f"that is where it started: go on from another checkpoint{others}"
    aside = run.archive_after(step - 1, f"diverged_{log_name}") if is_rank_zero() else None
    moved = f"the checkpoint of this step was moved to {aside}; " if aside else ""
    return moved + (f"the last before it is {earlier[-1]}" if earlier else "there is none before")


def _plot(run: Run, say: Say) -> None:
    """Draw the losses; whatever keeps them from being drawn costs no training."""
    file = run.logs / "loss.png"
    try:
        plot_losses(run, file)
    except Exception as error:
        say(f"{file}: could not be drawn: {error}")


def _run_record(
    config: RunConfig,
    run: Run,
    base_dir: Path,
    base_digest: str,
    manifest: Manifest,
    start: Start,
    learned: SpanSet,
) -> dict[str, Any]:
    """What every checkpoint of the run carries: all that merging and resuming must know.

    `learned` is all that they may have learned: what that had from which it starts, and every clip
    that isn't validated on.
    """
    parent = None
    if start.checkpoint is not None:
        parent = (
            start.checkpoint.read()["run"]["parent"] if start.resumes else start.checkpoint.path
        )
    return {
        "project": run.project,
        "data_dir": str(Path(config.data.dir).resolve()),
        "base": str(base_dir.resolve()),
        "base_digest": base_digest,
        "shards": manifest.shards,
        "learned": learned.to_json(),
        "speakers": _named_speakers(manifest),
        "lora": asdict(config.lora),
        "config": config.to_yaml(),
        "parent": parent and str(parent),
    }


def _named_speakers(manifest: Manifest) -> list[str]:
    """The speakers whose names the texts are trained with: none where there is only one."""
    return manifest.speakers if len(manifest.speakers) > 1 else []


def _held_out(
    data_dir: Path, manifest: Manifest, learned: SpanSet, learner: Path, say: Say
) -> list[Sample]:
    """The samples to validate on: none that the `learner` from which it starts has learned."""
    samples = load_split(data_dir, manifest, "validation")
    unknown = [s for s in samples if not learned.overlaps(manifest.spans[s.name])]
    if known := len(samples) - len(unknown):
        clips = counted(known, "clip")
        say(f"left out of validation: {clips} that {learner} may have learned")
    return unknown


def _data_module(
    config: RunConfig,
    base_dir: Path,
    manifest: Manifest,
    learned: SpanSet,
    learner: Path,
    say: Say,
) -> SemanticDataModule:
    data_dir = Path(config.data.dir)
    tokenizer = FishTokenizer.from_pretrained(base_dir)
    # What is longer than the model's context could be learned, and never be spoken.
    context = ModelConfig.from_pretrained(base_dir).max_seq_len
    max_length = min(config.data.max_length, context)
    limit = f"{'the context' if max_length == context else 'data.max_length'} of {max_length}"
    shared = {
        "max_length": max_length,
        "name_speakers": bool(_named_speakers(manifest)),
        "seed": config.seed,
    }
    train = SemanticDataset(
        load_split(data_dir, manifest, "train"),
        tokenizer,
        reference_share=config.data.reference_share,
        **shared,
    )
    held_out = _held_out(data_dir, manifest, learned, learner, say)
    validation = SemanticDataset(held_out, tokenizer, **shared)
    for name in (*train.too_long, *validation.too_long):
        say(f"left out: {name} is longer than {limit} tokens")
    if max_length < context and (train.too_long or validation.too_long):
        say(f"--override data.max_length={context} takes all that the model can speak, and memory")
    if not len(train):
        raise ValueError(
            f"{data_dir}: every clip is longer than {limit} tokens; cut them with "
            "prepare_dataset.py --split-long"
        )
    return SemanticDataModule(
        train,
        validation,
        batch_size=config.data.batch_size,
        accumulate=config.train.gradient_accumulation_steps,
        seed=config.seed,
        num_workers=config.data.num_workers,
    )


def _trainer(
    config: RunConfig,
    run: Run,
    device: torch.device,
    data: SemanticDataModule,
    callbacks: Sequence[L.Callback],
) -> L.Trainer:
    settings = config.train
    accelerator = {"cuda": "gpu"}.get(device.type, device.type)
    one_card = device.type == "cuda" and device.index is not None
    devices = [device.index] if one_card else settings.devices
    version = run.new_log()
    val_every = settings.val_every or settings.save_every
    has_validation = bool(len(data.validation))
    return L.Trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=settings.num_nodes,
        strategy=settings.strategy,
        max_steps=settings.max_steps,
        max_epochs=-1,
        accumulate_grad_batches=settings.gradient_accumulation_steps,
        gradient_clip_val=settings.gradient_clip,
        val_check_interval=val_every * settings.gradient_accumulation_steps
        if has_validation
        else None,
        check_val_every_n_epoch=None,
        limit_val_batches=1.0 if has_validation else 0,
        num_sanity_val_steps=0,
        inference_mode=False,  # what validation caches must be usable in training
        log_every_n_steps=settings.log_every,
        logger=[
            CSVLogger(run.folder, name="logs", version=version),
            TensorBoardLogger(run.folder, name="logs", version=version),
        ],
        callbacks=list(callbacks),
        plugins=[AtomicCheckpoints()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,  # the batches know their process
    )


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Without Lightning's advice on hardware, products and loaders, which isn't the user's."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.")
            yield
    finally:
        logger.setLevel(level)
