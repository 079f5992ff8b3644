"""A small evaluation during training: its metrics and audio go to TensorBoard."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger

from fish_speech.audio import load_audio
from fish_speech.console import Say
from fish_speech.evaluation.held_out import HeldOut
from fish_speech.evaluation.leaderboard import Leaderboard
from fish_speech.evaluation.measure import measure
from fish_speech.evaluation.project import build_scorer
from fish_speech.evaluation.recommend import Commands
from fish_speech.evaluation.synthesis import Candidate
from fish_speech.inference import TextToSpeech
from fish_speech.models.vqgan import load_codec
from fish_speech.tokenizer import FishTokenizer
from fish_speech.training.callbacks import step_finished
from fish_speech.training.distributed import is_rank_zero

_SAMPLES = 4
_LOGGED = ("wer", "cer", "similarity", "similarity_referenced", "runaways", "empty")


class EvaluateDuringTraining(L.Callback):
    """Every so many steps the model as it is speaks a few held-out texts.

    That changes nothing in training, whose random numbers are seeded at each step.
    Raises `ValueError` where there is nothing to speak, before training starts.
    """

    def __init__(
        self,
        data_dir: Path,
        base_dir: Path,
        every: int,
        say: Say,
        *,
        whisper_model: str | None = None,
        speaker_encoder: str | None = None,
    ) -> None:
        self.every, self.base_dir, self.say = every, base_dir, say
        if not is_rank_zero():
            return  # the others wait for it at their next step
        data = HeldOut(data_dir)
        self._lines = data.plan([], _SAMPLES, lambda message: None)
        self._real_clips = data.real_clips()
        self._scorer = build_scorer(
            data.texts,
            say,
            whisper_model=whisper_model,
            speaker_encoder=speaker_encoder,
            device="cpu",
        )
        self._tts: TextToSpeech | None = None

    def on_train_batch_end(self, trainer: L.Trainer, module, outputs, batch, batch_index) -> None:
        due = step_finished(trainer, batch_index) and trainer.global_step % self.every == 0
        if due and trainer.is_global_zero and not trainer.should_stop:
            module.flush_metrics()  # raises where this step has made the adapters NaN
            module.model.eval()
            try:
                self._evaluate(trainer, module)
            finally:
                module.model.train()

    def _evaluate(self, trainer: L.Trainer, module: Any) -> None:
        if self._tts is None:
            codec = load_codec(self.base_dir, module.device)
            tokenizer = FishTokenizer.from_pretrained(self.base_dir)
            self._tts = TextToSpeech(module.model, codec, tokenizer)
            self._tts.forget_speakers()  # the project has its own
        name = f"step_{trainer.global_step:09d}"
        candidate = Candidate(name, self.base_dir, name, lambda: self._tts, trainer.global_step)
        with TemporaryDirectory() as folder:
            board = measure(
                [candidate],
                self._lines,
                self._real_clips,
                Path(folder),
                title=name,
                scorer=self._scorer,
                commands=Commands("", "", ""),
                say=self.say,
            )
            self._log(trainer, board, Path(folder))

    def _log(self, trainer: L.Trainer, board: Leaderboard, folder: Path) -> None:
        row, step = board.rows[0], trainer.global_step - 1  # as Lightning counts in its logs
        found = {name: each.mean for name in _LOGGED if (each := row.estimate(name))}
        for logger in trainer.loggers:
            logger.log_metrics({f"evaluation/{k}": v for k, v in found.items()}, step)
        boards = [each for each in trainer.loggers if isinstance(each, TensorBoardLogger)]
        for sample in board.samples:
            spoken = sample.spoken.get(row.name)
            if spoken is not None and spoken.audio is not None:
                waveform, rate = load_audio(folder / spoken.audio)
                for logger in boards:
                    tag = f"evaluation/{sample.name}"
                    logger.experiment.add_audio(tag, waveform, trainer.global_step, rate)
