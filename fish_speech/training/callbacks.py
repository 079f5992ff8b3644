"""What happens between the steps: checkpoints, stopping cleanly, and telling how it goes."""

from __future__ import annotations

import signal
import sys
import time
from math import ceil
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from tqdm import tqdm

from fish_speech.console import Say
from fish_speech.files import atomic_path
from fish_speech.models.weights import read_checkpoint, save_tensors
from fish_speech.resources import is_out_of_memory
from fish_speech.signals import stop_signals
from fish_speech.training.runs import Run

_STEPS_TO_FORECAST = 10
_PROGRESS = (
    "loss {train/loss:.2f}, top-5 {train/top5_accuracy:.0%}, rate {train/learning_rate:.1e}, "
    "{train/tokens_per_second:.0f} tokens/s, {train/memory_gb:.1f} GB"
)


class AtomicCheckpoints(TorchCheckpointIO):
    """Checkpoint files that are whole or not there, and hold tensors and plain values only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options=None) -> None:
        save_tensors(checkpoint, path)

    def load_checkpoint(self, path: Any, map_location=None, weights_only=None) -> dict[str, Any]:
        return read_checkpoint(path, mapped=False)  # the optimizer's state would be the file


class SaveCheckpoints(L.Callback):
    """`step_%09d.ckpt` every so many steps and at the end, however it comes.

    A run that goes on from an earlier step than its last one puts the later checkpoints aside, so
    that the latest is always of the training at hand.
    """

    def __init__(self, run: Run, every: int, keep: int | None, say: Say) -> None:
        self.run, self.every, self.keep, self.say = run, every, keep, say
        self._saved_step = -1  # until training starts there is nothing to save

    def on_train_start(self, trainer: L.Trainer, module) -> None:
        self._saved_step = trainer.global_step
        name = f"before_{trainer.loggers[0].version}"  # this start's
        if trainer.is_global_zero and (aside := self.run.archive_after(trainer.global_step, name)):
            self.say(f"later checkpoints of the run up to now were moved to {aside}")

    def on_train_batch_end(self, trainer: L.Trainer, module, outputs, batch, batch_index) -> None:
        # The last step too: a validation follows, which may take long.
        due = trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps
        if step_finished(trainer, batch_index) and due:
            self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, module) -> None:
        self.save(trainer)

    def on_exception(self, trainer: L.Trainer, module, exception: BaseException) -> None:
        try:
            module.flush_metrics()  # at the steps that were taken: they are logged
        except Exception:  # that step has spoiled the adapters, or the device is gone
            return
        # Between two steps the adapters are what the last one left, so a run that ran out of
        # memory, or whose messages nobody reads any more, loses nothing. (Not among several
        # processes: the others are elsewhere, and saving waits for them.)
        harmless = is_out_of_memory(exception) or isinstance(exception, BrokenPipeError)
        if harmless and trainer.world_size == 1 and self._saved_step >= 0:
            self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        # All processes take part in saving, so all must decide alike: not by what is on disk.
        if trainer.global_step == self._saved_step:
            return
        self._saved_step = trainer.global_step
        path = self.run.checkpoint_path(trainer.global_step)
        trainer.save_checkpoint(path, weights_only=False)  # with the optimizer
        if self.keep and trainer.is_global_zero:
            for checkpoint in self.run.checkpoints()[: -self.keep]:
                checkpoint.path.unlink()


class StopCleanly(L.Callback):
    """Ctrl+C, SIGTERM and a closed terminal end the run after the step at hand, with a checkpoint.

    A second Ctrl+C stops at once.
    """

    def __init__(self, checkpoints: SaveCheckpoints) -> None:
        self.checkpoints = checkpoints
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, module) -> None:
        # Only now: Lightning has put its own handler for SIGTERM, which would end the step midway.
        for number in stop_signals():
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                self._before[number] = signal.signal(number, self._note)

    def on_train_batch_end(self, trainer: L.Trainer, module, outputs, batch, batch_index) -> None:
        if step_finished(trainer, batch_index):
            # One process that was told to stop stops all, and all say so.
            noted = self.signal is not None
            if trainer.strategy.reduce_boolean_decision(noted, all=False):
                self.signal = self.signal or signal.SIGTERM
                trainer.should_stop = True
                # At once: Lightning would validate first, while somebody waits to kill the process.
                self.checkpoints.save(trainer)
                trainer.limit_val_batches = 0

    def on_train_end(self, trainer: L.Trainer, module) -> None:
        self.restore()

    def on_exception(self, trainer: L.Trainer, module, exception: BaseException) -> None:
        self.restore()

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, frame) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        tqdm.write(
            "stopping after this step, with a checkpoint (press again to stop at once)", sys.stderr
        )


class Progress(L.Callback):
    """A progress bar on a terminal, and in any case a line for each validation."""

    def __init__(self, max_steps: int) -> None:
        self.max_steps = max_steps
        self._bar: tqdm | None = None
        self._since, self._first_step = 0.0, 0

    def on_train_start(self, trainer: L.Trainer, module) -> None:
        if module.device.type == "cuda":  # encoding clips had a peak of its own
            torch.cuda.reset_peak_memory_stats(module.device)
        self._since, self._first_step = time.monotonic(), trainer.global_step
        self._bar = tqdm(
            total=self.max_steps,
            initial=trainer.global_step,
            desc="training",
            unit="step",
            disable=None if trainer.is_global_zero else True,
            dynamic_ncols=True,
        )

    def on_train_batch_end(self, trainer: L.Trainer, module, outputs, batch, batch_index) -> None:
        if step_finished(trainer, batch_index) and self._bar is not None:
            if module.metrics:
                self._bar.set_postfix_str(_PROGRESS.format(**module.metrics), refresh=False)
            self._bar.update()
            self._forecast(trainer)

    def _forecast(self, trainer: L.Trainer) -> None:
        """Say once, after a few steps, how long the rest will take; a pipe has no progress bar."""
        done = trainer.global_step - self._first_step
        if done == _STEPS_TO_FORECAST and trainer.is_global_zero:
            seconds = (time.monotonic() - self._since) / done
            minutes = (self.max_steps - trainer.global_step) * seconds / 60
            left = "less than a minute" if minutes < 1 else f"about {ceil(minutes)} minutes"
            tqdm.write(f"{seconds:.2f} s a step: {left} to step {self.max_steps}", sys.stderr)

    def on_validation_end(self, trainer: L.Trainer, module) -> None:
        metrics = trainer.callback_metrics
        if trainer.is_global_zero and "validation/loss" in metrics and not trainer.sanity_checking:
            learned = module.metrics.get("train/loss")
            before = "" if learned is None else f"training loss {learned:.3f}, "
            tqdm.write(
                f"step {trainer.global_step}: {before}"
                f"validation loss {metrics['validation/loss']:.3f}, "
                f"top-5 {metrics['validation/top5_accuracy']:.1%}",
                sys.stderr,
            )

    def on_train_end(self, trainer: L.Trainer, module) -> None:
        self.close()

    def on_exception(self, trainer: L.Trainer, module, exception: BaseException) -> None:
        self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def step_finished(trainer: L.Trainer, batch_index: int) -> bool:
    """Whether this micro-batch was the last of its optimizer step."""
    return (batch_index + 1) % trainer.accumulate_grad_batches == 0


def plot_losses(run: Run, file: Path) -> None:
    """Draw a run's training and validation loss over the steps into a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, style in (("train/loss", "-"), ("validation/loss", "o-")):
        if points := run.logged(name):  # a run that ended in its first step has none
            axes.plot(sorted(points), [points[s] for s in sorted(points)], style, label=name)
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    with atomic_path(file) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)
