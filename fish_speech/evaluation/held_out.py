"""What a project is measured with: its held-out clips, real clips and references."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fish_speech.audio_decoding import audio_info
from fish_speech.console import counted
from fish_speech.conversation import build_item
from fish_speech.datasets.clips import Clip, find_clips
from fish_speech.datasets.shards import learned_by, load_split, no_validation_reason, read_manifest
from fish_speech.evaluation.measure import Say
from fish_speech.evaluation.synthesis import Line, RealClip, plan_lines
from fish_speech.models.text2semantic import DualARTransformer
from fish_speech.tokenizer import FishTokenizer
from fish_speech.training.loss import loss_sums

_MIN_REAL_CLIPS = 8  # of a speaker; where fewer are held out, training clips fill up
_MAX_CLIPS = 32  # held-out ones that are scored and whose loss is taken
_REFERENCE_SECONDS = 8.0


class NothingToMeasureError(ValueError):
    """No clip is held out, and no texts are given."""


class HeldOut:
    """The held-out clips of a packed dataset, and further real clips of its speakers."""

    def __init__(self, data_dir: Path, records: Sequence[dict[str, Any]] = ()) -> None:
        """`records` are those of checkpoints: what one of them may have learned is left out."""
        self.data_dir, self.manifest = data_dir, read_manifest(data_dir)
        learned = [learned_by(record, self.manifest, data_dir) for record in records]
        spans = self.manifest.spans
        self.held = [
            name
            for name in self.manifest.validation
            if not any(known.overlaps(spans.get(name, ())) for known in learned)
        ]
        self._clips = {clip.name: clip for clip in find_clips(data_dir)}

    @cached_property
    def texts(self) -> list[str]:
        """All transcripts."""
        return [clip.read_text() for clip in self._of([*self.manifest.train, *self.held])]

    @property
    def name_speakers(self) -> bool:
        """Whether texts are spoken with the speaker's name in front."""
        return len(self.manifest.speakers) > 1

    def plan(self, more_texts: Sequence[str], count: int, say: Say) -> list[Line]:
        """What is spoken: `count` of `more_texts`, dealt out to the speakers, and held-out texts.

        Raises `NothingToMeasureError` where there is none.
        """
        if fewer := len(self.manifest.validation) - len(self.held):
            say(f"left out: {counted(fewer, 'held-out clip')} that a checkpoint may have learned")
        held = [
            self._line(clip.read_text(), clip.speaker, _real_clip(clip))
            for clip in self._of(self.held)
        ]
        speakers = self.manifest.speakers
        more = [
            self._line(text, speakers[index % len(speakers)])
            for index, text in enumerate(more_texts)
        ]
        if not held:
            others = bool(self.manifest.validation)  # these checkpoints may have learned from them
            of_these = " from the training of these checkpoints" if others else ""
            say(none := f"{self.data_dir}: no clip is held out{of_these}")
        if not held and not more:
            how = "" if others else f": {no_validation_reason(self.manifest)}"
            raise NothingToMeasureError(
                f"{none}, so there is nothing to speak; give --texts FILE, or train a new project, "
                f"from a base that hasn't learned them{how}"
            )
        if count > len(held) + len(more):
            texts = counted(len(held) + len(more), "text")
            say(f"{texts} for {count} samples: --texts FILE gives more")
        return plan_lines([*more, *held], count, self.references)

    def _line(self, text: str, speaker: str, recording: RealClip | None = None) -> Line:
        name = speaker if self.name_speakers else None
        return Line("", text, speaker=name, voice=speaker, recording=recording)

    def real_clips(self) -> dict[str, list[RealClip]]:
        """Real clips by speaker: the held-out ones, and training clips where those are few."""
        found = {}
        for speaker in self.manifest.speakers:
            held = [c for c in self._of(self.held) if c.speaker == speaker][:_MAX_CLIPS]
            trained = [c for c in self._of(self.manifest.train) if c.speaker == speaker]
            chosen = held + trained[: max(0, _MIN_REAL_CLIPS - len(held))]
            found[speaker] = [_real_clip(clip) for clip in chosen]
        return found

    @cached_property
    def references(self) -> dict[str, RealClip]:
        """A training clip of each speaker as a reference: the nearest to eight seconds."""
        found = {}
        for clip in self._of(self.manifest.train):
            seconds = audio_info(clip.audio).duration or 0.0
            far = abs(seconds - _REFERENCE_SECONDS)
            if clip.speaker not in found or far < found[clip.speaker][0]:
                found[clip.speaker] = far, _real_clip(clip)
        return {speaker: clip for speaker, (_, clip) in found.items()}

    @torch.no_grad()
    def losses(self, model: DualARTransformer, tokenizer: FishTokenizer) -> dict[str, list[float]]:
        """The loss of each held-out clip (nats a label) and its frames."""
        values, frames = [], []
        samples = load_split(self.data_dir, self.manifest, "validation")
        for sample in [s for s in samples if s.name in self.held][:_MAX_CLIPS]:
            speaker = sample.speaker if self.name_speakers else None
            item = build_item(tokenizer, sample.utterance(), speaker=speaker)
            tokens, labels = (part[None].to(model.device) for part in item)
            sums = loss_sums(model, tokens, labels)
            values.append(float(sums.loss(sums.tokens, sums.codes)))
            frames.append(sample.codes.shape[1])
        return {"losses": values, "frames": frames}

    def _of(self, names: Sequence[str]) -> list[Clip]:
        """Those clips that are still there, with their transcripts."""
        clips = (self._clips[name] for name in names if name in self._clips)
        return [clip for clip in clips if clip.transcript.is_file()]


def _real_clip(clip: Clip) -> RealClip:
    return RealClip(clip.audio, clip.read_text())
