"""Speak, score, recommend: from candidates and lines to a leaderboard."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fish_speech.console import Say, is_interrupt
from fish_speech.evaluation.intervals import estimate, proportion
from fish_speech.evaluation.leaderboard import (
    Estimate,
    EvalSample,
    Leaderboard,
    ModelRow,
    SampleResult,
)
from fish_speech.evaluation.recommend import Commands, recommend
from fish_speech.evaluation.scoring import ClipScores, Scorer, SpeakerProfile
from fish_speech.evaluation.synthesis import Candidate, Line, RealClip, speak_line
from fish_speech.files import safe_name
from fish_speech.inference import Settings, TextToSpeech
from fish_speech.preparation.error_rates import NORMALISATION, Errors
from fish_speech.resources import is_out_of_memory

AUDIO_FOLDER = "audio"
Metrics = dict[str, Estimate | None]
# Further metrics of a candidate; the function gives its model, which is loaded at the first call.
ExtraMetrics = Callable[[Candidate, Callable[[], TextToSpeech]], Metrics]


@dataclass(frozen=True)
class SpokenSample:
    """A line as one candidate spoke it: the file (None where nothing was said) and its scores."""

    line: Line
    audio: Path | None
    runaway: bool
    scores: ClipScores
    similarity: float | None

    def to_result(self, folder: Path) -> SampleResult:
        """As the leaderboard in `folder` keeps it."""
        errors = (self.scores.word_errors, self.scores.character_errors)
        wer, cer = (e and e.count / max(1, e.length) for e in errors)
        return SampleResult(
            self.audio and self.audio.relative_to(folder).as_posix(),
            wer,
            cer,
            self.similarity,
            self.scores.heard,
            self.runaway,
            self.audio is None,
            round(self.scores.seconds, 3),
        )


def measure(
    candidates: Sequence[Candidate],
    lines: Sequence[Line],
    real_clips: Mapping[str, Sequence[RealClip]],
    folder: Path,
    *,
    title: str,
    scorer: Scorer,
    commands: Commands,
    settings: Settings | None = None,
    resynthesised: Mapping[str, Sequence[RealClip]] | None = None,
    strangers: Sequence[Path] = (),
    extra_metrics: ExtraMetrics = lambda candidate, get_tts: {},
    say: Say = lambda message: None,
) -> Leaderboard:
    """Measure every candidate (the first is the base) on every line; nothing is written but audio.

    `real_clips` are by voice, `resynthesised` the same through the codec, `strangers` clips of
    other speakers. What an earlier run spoke into `folder` is not spoken again. A candidate that
    fails gets a row with its error.
    Raises `MemoryError` with the remedy, for that would be the fate of all.
    """
    settings = settings or Settings()
    profiles = {name: _profile(clips, scorer, say) for name, clips in real_clips.items()}
    coded = {name: _profile(clips, scorer, say) for name, clips in (resynthesised or {}).items()}
    others = _profile([RealClip(path, "") for path in strangers], scorer.without_asr(), say)
    samples = [
        EvalSample(line.name, line.text, line.reference is not None, _path(line.recording))
        for line in lines
    ]
    rows, started = [], time.monotonic()
    with tqdm(total=len(candidates) * len(lines), unit="sample", disable=None) as progress:
        evaluator = _Evaluator(lines, profiles, folder, scorer, settings, progress)
        for index, candidate in enumerate(candidates, 1):
            rows.append(row := _measure_candidate(candidate, evaluator, samples, extra_metrics))
            left = (time.monotonic() - started) / index * (len(candidates) - index)
            say(describe(row) + (f" (about {left / 60:.0f} min left)" if left > 60 else ""))
    return Leaderboard(
        title=title,
        recogniser=scorer.recogniser and scorer.recogniser.identity,
        normalisation=NORMALISATION,
        speaker_encoder=scorer.encoder and scorer.encoder.identity,
        settings=_shown_settings(lines, settings),
        recommendation=recommend(rows, samples, commands),
        rows=rows,
        scale=_anchors(profiles, coded, others.clips),
        samples=samples,
    )


def _profile(real_clips: Sequence[RealClip], scorer: Scorer, say: Say) -> SpeakerProfile:
    scores = []
    for clip in real_clips:
        try:
            scores.append(scorer.score(clip.audio, clip.text))
        except (ValueError, OSError) as error:
            if is_interrupt(error):
                raise
            say(f"left out of the comparison: {error}")
    return SpeakerProfile(scores)


def _shown_settings(lines: Sequence[Line], settings: Settings) -> dict[str, Any]:
    return {
        "samples": sum(line.reference is None for line in lines),
        "temperature": settings.sampling.temperature,
        "top_p": settings.sampling.top_p,
        "repetition_penalty": settings.sampling.repetition_penalty,
        "seed": settings.seed,
    }


@dataclass(frozen=True)
class _Evaluator:
    """What every candidate speaks, and how that is scored."""

    lines: Sequence[Line]
    profiles: Mapping[str, SpeakerProfile]
    folder: Path
    scorer: Scorer
    settings: Settings
    progress: tqdm

    def speak_and_score(
        self, candidate: Candidate, get_tts: Callable[[], TextToSpeech]
    ) -> list[SpokenSample]:
        """Every line, by one candidate."""
        self.progress.set_description(candidate.name)
        audio_folder = self.folder / AUDIO_FOLDER / safe_name(candidate.name)
        spoken = []
        for line in self.lines:
            audio, runaway = speak_line(line, candidate, get_tts, self.settings, audio_folder)
            scores = self.scorer.score(audio, line.text)
            profile = self.profiles.get(line.voice)
            similarity = profile.similarity(scores) if profile else None
            spoken.append(SpokenSample(line, audio, runaway, scores, similarity))
            self.progress.update()
        return spoken


def _measure_candidate(
    candidate: Candidate, evaluator: _Evaluator, samples: Sequence[EvalSample],
    extra_metrics: ExtraMetrics,
) -> ModelRow:  # fmt: skip
    """The row of a candidate; what it made of each sample is added to `samples`."""
    row = ModelRow(candidate.name, candidate.step, str(candidate.path))
    loaded: list[TextToSpeech] = []

    def get_tts() -> TextToSpeech:
        if not loaded:
            loaded.append(candidate.load())
        return loaded[0]

    try:
        spoken = evaluator.speak_and_score(candidate, get_tts)
        row.figures = estimates_of(spoken) | extra_metrics(candidate, get_tts)
        for sample, each in zip(samples, spoken, strict=True):
            sample.spoken[candidate.name] = each.to_result(evaluator.folder)
    except (ValueError, OSError, RuntimeError) as error:
        if is_interrupt(error):
            raise
        if is_out_of_memory(error):
            raise MemoryError("out of memory; try --device cpu") from error
        row.error = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return row


def estimates_of(spoken: Sequence[SpokenSample]) -> Metrics:
    """The metrics of a row, as `leaderboard.ModelRow` names them."""
    plain = [each for each in spoken if each.line.reference is None]
    referenced = [each for each in spoken if each.line.reference is not None]
    texts = [each.line.text for each in spoken]
    return {
        **_errors_and_similarity(plain),
        **{
            f"{name}_referenced": found
            for name, found in _errors_and_similarity(referenced).items()
        },
        "runaways": proportion([each.runaway for each in spoken], texts),
        "empty": proportion([each.audio is None for each in spoken], texts),
        **_prosody([each.scores for each in spoken], texts),
    }


def _errors_and_similarity(spoken: Sequence[SpokenSample]) -> Metrics:
    texts = [each.line.text for each in spoken]
    return {
        "wer": _error_rate([each.scores.word_errors for each in spoken], texts),
        "cer": _error_rate([each.scores.character_errors for each in spoken], texts),
        "similarity": _mean([each.similarity for each in spoken], texts),
    }


def describe(row: ModelRow) -> str:
    """The most important metrics of a row, in a line."""
    if row.error is not None:
        return f"{row.name}: could not be measured: {row.error}"
    shown = (
        ("word error rate", "wer", "{:.0%}"),
        ("similarity", "similarity", "{:.2f}"),
        ("with a reference", "similarity_referenced", "{:.2f}"),
        ("runaways", "runaways", "{:.0%}"),
        ("held-out loss", "held_out_loss", "{:.3f}"),
    )
    parts = []
    for title, name, form in shown:
        if found := row.estimate(name):
            ends = f"{form.format(found.low)} to {form.format(found.high)}"
            parts.append(f"{title} {form.format(found.mean)} ({found.too_few or ends})")
    return f"{row.name}: {', '.join(parts) or 'nothing could be measured'}"


def _anchors(
    profiles: Mapping[str, SpeakerProfile],
    coded: Mapping[str, SpeakerProfile],
    strangers: Sequence[ClipScores],
) -> list[ModelRow]:
    """What the models are read against: real clips, the same through the codec, other speakers."""
    if not any(profile.clips for profile in profiles.values()):
        return []
    same = [value for profile in profiles.values() for value in profile.leave_one_out()]
    other = []
    for name, profile in profiles.items():
        others = [clip for key, each in profiles.items() if key != name for clip in each.clips]
        other += [profile.similarity(clip) for clip in (*others, *strangers)]
    through_codec = [
        profiles[name].similarity(clip) for name, profile in coded.items() for clip in profile.clips
    ]
    return [
        ModelRow("recording", figures=_real_metrics(profiles)),
        ModelRow(
            "recording through the codec",
            figures=_real_metrics(coded) | {"similarity": _mean(through_codec)},
        ),
        ModelRow("recording against recording", figures={"similarity": _mean(same)}),
        ModelRow("another speaker", figures={"similarity": _mean(other)}),
    ]


def _real_metrics(profiles: Mapping[str, SpeakerProfile]) -> Metrics:
    """Error rates and prosody of real clips."""
    clips = [clip for profile in profiles.values() for clip in profile.clips]
    return {
        "wer": _error_rate([clip.word_errors for clip in clips]),
        "cer": _error_rate([clip.character_errors for clip in clips]),
        **_prosody(clips),
    }


def _prosody(clips: Sequence[ClipScores], texts: Sequence[str] | None = None) -> Metrics:
    """Pace and pitch, of the clips that have any speech."""
    clips, texts = _known([clip if clip.speech_seconds > 0 else None for clip in clips], texts)
    pitches = [clip.pitch or (None, None) for clip in clips]
    letters, seconds = [c.letters for c in clips], [c.speech_seconds for c in clips]
    return {
        "speaking_rate": estimate(letters, seconds, texts),
        "pitch_median": _mean([median for median, _ in pitches], texts),
        "pitch_range": _mean([semitones for _, semitones in pitches], texts),
    }


def _error_rate(
    errors: Sequence[Errors | None], texts: Sequence[str] | None = None
) -> Estimate | None:
    known, texts = _known(errors, texts)
    return estimate([e.count for e in known], [e.length for e in known], texts)


def _mean(values: Sequence[float | None], texts: Sequence[str] | None = None) -> Estimate | None:
    known, texts = _known(values, texts)
    return estimate(known, None, texts)


def _known(values: Sequence, texts: Sequence[str] | None) -> tuple[list, list[str] | None]:
    """The values that are not None, and their texts."""
    kept = [value is not None for value in values]
    return list(compress(values, kept)), texts and list(compress(texts, kept))


def _path(recording: RealClip | None) -> str | None:
    return recording and str(recording.audio)
