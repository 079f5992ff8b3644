"""What a project is measured with: its held-out clips, and what else stands for its voices."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fish_speech.audio_decoding import audio_info
from fish_speech.conversation import Utterance, build_item
from fish_speech.datasets.clips import Clip, find_clips
from fish_speech.datasets.shards import load_split, read_manifest
from fish_speech.evaluation.measure import Say
from fish_speech.evaluation.synthesis import Line, Recording, plan_lines
from fish_speech.models.text2semantic import DualARTransformer
from fish_speech.tokenizer import FishTokenizer
from fish_speech.training.loss import loss_sums

_REAL_CLIPS = 8  # that stand for a voice; where fewer are held out, training clips fill up
_MOST_CLIPS = 32  # held-out ones that are listened to and whose loss is taken
_REFERENCE_SECONDS = 8.0


class NothingToMeasureError(ValueError):
    """No clip is held out, and no texts are given."""


class HeldOut:
    """The held-out clips of a data set as it was packed, and what else stands for its voices."""

    def __init__(self, data_dir: Path, records: Sequence[dict[str, Any]] = ()) -> None:
        """`records` are those of checkpoints: what one of them was not validated on doesn't count,
        as it was learned from, or is longer than what training takes."""
        self.data_dir, self.manifest = data_dir, read_manifest(data_dir)
        kept = [set(record["held_out"]) for record in records if "held_out" in record]
        self.held = [
            name for name in self.manifest.validation if all(name in names for names in kept)
        ]
        self._clips = {clip.name: clip for clip in find_clips(data_dir)}

    @cached_property
    def texts(self) -> list[str]:
        """All transcripts."""
        return [clip.read_text() for clip in self._of([*self.manifest.train, *self.held])]

    @property
    def named(self) -> bool:
        """Whether texts are spoken with the speaker's name in front."""
        return len(self.manifest.speakers) > 1

    def plan(self, further: Sequence[str], count: int, say: Say) -> list[Line]:
        """What is spoken: `count` held-out or `further` texts, these shared among the speakers.

        Raises `NothingToMeasureError` where there is none.
        """
        if fewer := len(self.manifest.validation) - len(self.held):
            say(f"left out: {fewer} held-out clips that the checkpoints were not validated on")
        held = [
            self._line(clip.read_text(), clip.speaker, _recording(clip))
            for clip in self._of(self.held)
        ]
        speakers = self.manifest.speakers
        more = [
            self._line(text, speakers[index % len(speakers)]) for index, text in enumerate(further)
        ]
        if not held:
            say(none := f"{self.data_dir}: no clip is held out")
        if not held and not more:
            raise NothingToMeasureError(
                f"{none}, so there is nothing to speak; give --texts FILE, or hold some clips out "
                "(it takes two) with --override data.validation_share=0.05 and train a new project"
            )
        if count > len(held) + len(more):
            say(f"{len(held) + len(more)} texts for {count} samples: --texts FILE gives more")
        return plan_lines([*more, *held], count, self.references)

    def _line(self, text: str, speaker: str, recording: Recording | None = None) -> Line:
        name = speaker if self.named else None
        return Line("", text, speaker=name, voice=speaker, recording=recording)

    def recordings(self) -> dict[str, list[Recording]]:
        """Real clips by speaker: the held-out ones, and training clips where those are few."""
        found = {}
        for speaker in self.manifest.speakers:
            held = [c for c in self._of(self.held) if c.speaker == speaker][:_MOST_CLIPS]
            trained = [c for c in self._of(self.manifest.train) if c.speaker == speaker]
            chosen = held + trained[: max(0, _REAL_CLIPS - len(held))]
            found[speaker] = [_recording(clip) for clip in chosen]
        return found

    @cached_property
    def references(self) -> dict[str, Recording]:
        """A training clip of each speaker to be put in front, the nearest to eight seconds."""
        found = {}
        for clip in self._of(self.manifest.train):
            seconds = audio_info(clip.audio).duration or 0.0
            far = abs(seconds - _REFERENCE_SECONDS)
            if clip.speaker not in found or far < found[clip.speaker][0]:
                found[clip.speaker] = far, _recording(clip)
        return {speaker: recording for speaker, (_, recording) in found.items()}

    @torch.no_grad()
    def losses(self, model: DualARTransformer, tokenizer: FishTokenizer) -> dict[str, list[float]]:
        """The loss of each held-out clip (nats a label) and its frames."""
        values, frames = [], []
        samples = load_split(self.data_dir, self.manifest, "validation")
        for sample in [s for s in samples if s.name in self.held][:_MOST_CLIPS]:
            utterance = Utterance(sample.text, torch.from_numpy(sample.codes.astype("int64")))
            speaker = sample.speaker if self.named else None
            item = build_item(tokenizer, utterance, speaker=speaker)
            tokens, labels = (part[None].to(model.device) for part in item)
            sums = loss_sums(model, tokens, labels)
            values.append(float(sums.loss(sums.tokens, sums.codes)))
            frames.append(sample.codes.shape[1])
        return {"losses": values, "frames": frames}

    def _of(self, names: Sequence[str]) -> list[Clip]:
        """Those clips that are still there, with their transcripts."""
        clips = (self._clips[name] for name in names if name in self._clips)
        return [clip for clip in clips if clip.transcript.is_file()]


def _recording(clip: Clip) -> Recording:
    return Recording(clip.audio, clip.read_text())
