"""Speak, listen, compare: candidates and lines to a leaderboard."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

from tqdm import tqdm

from fish_speech.evaluation.intervals import figure, share
from fish_speech.evaluation.leaderboard import Figure, Leaderboard, Row, Sample, Spoken
from fish_speech.evaluation.recommend import Commands, recommend
from fish_speech.evaluation.scoring import Clip, Listener, Voice
from fish_speech.evaluation.synthesis import Candidate, Line, Recording, Take, take
from fish_speech.files import safe_name
from fish_speech.inference import Settings, TextToSpeech
from fish_speech.preparation.error_rates import NORMALISATION, Errors
from fish_speech.resources import is_out_of_memory

AUDIO = "audio"
Say = Callable[[str], None]
# Further figures of a candidate; the function gives its model, which is loaded at the first call.
MoreFigures = Callable[[Candidate, Callable[[], TextToSpeech]], dict[str, Figure | None]]


@dataclass(frozen=True)
class Result:
    """A line as one candidate spoke it, and how like the voice that was."""

    line: Line
    take: Take
    clip: Clip
    similarity: float | None


def measure(
    candidates: Sequence[Candidate],
    lines: Sequence[Line],
    recordings: Mapping[str, Sequence[Recording]],
    folder: Path,
    *,
    title: str,
    listener: Listener,
    commands: Commands,
    settings: Settings | None = None,
    resynthesised: Mapping[str, Sequence[Recording]] | None = None,
    strangers: Sequence[Path] = (),
    more: MoreFigures = lambda candidate, voice: {},
    say: Say = lambda message: None,
) -> Leaderboard:
    """Measure every candidate (the first is the base) on every line; nothing is written but audio.

    `recordings` are real clips by voice, `resynthesised` what the codec leaves of them, `strangers`
    clips of nobody among them. What an earlier run spoke into `folder` is not spoken again. A
    candidate that fails gets a row with its error.
    Raises `MemoryError` with the remedy, for that would be the fate of all.
    """
    settings = settings or Settings()
    real = {name: _real_voice(clips, listener, say) for name, clips in recordings.items()}
    coded = {
        name: _real_voice(clips, listener, say) for name, clips in (resynthesised or {}).items()
    }
    unknown = _real_voice([Recording(path, "") for path in strangers], listener.deaf(), say)
    samples = [
        Sample(line.name, line.text, line.reference is not None, _path(line.recording))
        for line in lines
    ]
    rows, started = [], time.monotonic()
    with tqdm(total=len(candidates) * len(lines), unit="sample", disable=None) as progress:
        for index, candidate in enumerate(candidates, 1):
            row = Row(candidate.name, candidate.step, str(candidate.path))
            progress.set_description(candidate.name)
            try:
                results, row.figures = _measure_one(
                    candidate, lines, real, folder, listener, settings, more, progress
                )
                for sample, result in zip(samples, results, strict=True):
                    sample.spoken[candidate.name] = _spoken(result, folder)
            except (ValueError, OSError, RuntimeError) as error:
                if is_out_of_memory(error):
                    raise MemoryError("out of memory; try --device cpu") from error
                row.error = str(error).strip().splitlines()[0]
            rows.append(row)
            left = (time.monotonic() - started) / index * (len(candidates) - index)
            say(describe(row) + (f" (about {left / 60:.0f} min left)" if left > 60 else ""))
    return Leaderboard(
        title=title,
        recogniser=listener.recogniser and listener.recogniser.identity,
        normalisation=NORMALISATION,
        speaker_encoder=listener.encoder and listener.encoder.identity,
        settings={
            "samples": sum(line.reference is None for line in lines),
            "temperature": settings.sampling.temperature,
            "top_p": settings.sampling.top_p,
            "repetition_penalty": settings.sampling.repetition_penalty,
            "seed": settings.seed,
        },
        recommendation=recommend(rows, samples, commands),
        rows=rows,
        scale=_scale(real, coded, unknown.clips),
        samples=samples,
    )


def _real_voice(recordings: Sequence[Recording], listener: Listener, say: Say) -> Voice:
    clips = []
    for recording in recordings:
        try:
            clips.append(listener.listen(recording.audio, recording.text))
        except (ValueError, OSError) as error:
            say(f"left out of the comparison: {error}")
    return Voice(clips)


def _measure_one(
    candidate: Candidate,
    lines: Sequence[Line],
    real: Mapping[str, Voice],
    folder: Path,
    listener: Listener,
    settings: Settings,
    more: MoreFigures,
    progress: tqdm,
) -> tuple[list[Result], dict[str, Figure | None]]:
    loaded: list[TextToSpeech] = []

    def voice() -> TextToSpeech:
        if not loaded:
            loaded.append(candidate.load())
        return loaded[0]

    place = folder / AUDIO / safe_name(candidate.name)
    results = []
    for line in lines:
        spoken = take(line, candidate, voice, settings, place)
        clip = listener.listen(spoken.audio, line.text)
        similarity = real[line.voice].similarity(clip) if line.voice in real else None
        results.append(Result(line, spoken, clip, similarity))
        progress.update()
    return results, figures_of(results) | more(candidate, voice)


def figures_of(results: Sequence[Result]) -> dict[str, Figure | None]:
    """The figures of a row, as `leaderboard.Row` names them."""
    plain = [result for result in results if result.line.reference is None]
    referenced = [result for result in results if result.line.reference is not None]
    texts = [result.line.text for result in results]
    return {
        **_words_and_voice(plain),
        **{f"{name}_referenced": found for name, found in _words_and_voice(referenced).items()},
        "runaways": share([result.take.runaway for result in results], texts),
        "empty": share([result.take.audio is None for result in results], texts),
        **_manner([result.clip for result in results], texts),
    }


def _words_and_voice(results: Sequence[Result]) -> dict[str, Figure | None]:
    texts = [result.line.text for result in results]
    return {
        "wer": _rate([result.clip.words for result in results], texts),
        "cer": _rate([result.clip.characters for result in results], texts),
        "similarity": _mean([result.similarity for result in results], texts),
    }


def describe(row: Row) -> str:
    """A row in a line: what matters most."""
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
        if found := row.figure(name):
            ends = f"{form.format(found.low)} to {form.format(found.high)}"
            parts.append(f"{title} {form.format(found.mean)} ({found.too_few or ends})")
    return f"{row.name}: {', '.join(parts) or 'nothing could be measured'}"


def _scale(
    real: Mapping[str, Voice], coded: Mapping[str, Voice], strangers: Sequence[Clip]
) -> list[Row]:
    """What real recordings reach, what of that the codec leaves, and what a wrong voice does."""
    if not any(voice.clips for voice in real.values()):
        return []
    within = [value for voice in real.values() for value in voice.within()]
    across = []
    for name, voice in real.items():
        others = [clip for other, theirs in real.items() if other != name for clip in theirs.clips]
        across += [voice.similarity(clip) for clip in (*others, *strangers)]
    left = [real[name].similarity(clip) for name, voice in coded.items() for clip in voice.clips]
    return [
        Row("recording", figures=_heard(real)),
        Row("recording through the codec", figures=_heard(coded) | {"similarity": _mean(left)}),
        Row("recording against recording", figures={"similarity": _mean(within)}),
        Row("another speaker", figures={"similarity": _mean(across)}),
    ]


def _heard(voices: Mapping[str, Voice]) -> dict[str, Figure | None]:
    clips = [clip for voice in voices.values() for clip in voice.clips]
    return {
        "wer": _rate([clip.words for clip in clips]),
        "cer": _rate([clip.characters for clip in clips]),
        **_manner(clips),
    }


def _manner(clips: Sequence[Clip], texts: Sequence[str] | None = None) -> dict[str, Figure | None]:
    """Pace and pitch, of the clips that have any speech."""
    spoken, texts = _known([clip if clip.speech > 0 else None for clip in clips], texts)
    pitches = [clip.pitch or (None, None) for clip in spoken]
    return {
        "speaking_rate": figure([c.letters for c in spoken], [c.speech for c in spoken], texts),
        "pitch_median": _mean([median for median, _ in pitches], texts),
        "pitch_range": _mean([reach for _, reach in pitches], texts),
    }


def _rate(errors: Sequence[Errors | None], texts: Sequence[str] | None = None) -> Figure | None:
    known, texts = _known(errors, texts)
    return figure([e.count for e in known], [e.length for e in known], texts)


def _mean(values: Sequence[float | None], texts: Sequence[str] | None = None) -> Figure | None:
    known, texts = _known(values, texts)
    return figure(known, None, texts)


def _known(values: Sequence, texts: Sequence[str] | None) -> tuple[list, list[str] | None]:
    """What is not None, and the texts of that."""
    kept = [value is not None for value in values]
    return list(compress(values, kept)), texts and list(compress(texts, kept))


def _spoken(result: Result, folder: Path) -> Spoken:
    audio, clip = result.take.audio, result.clip
    wer, cer = (e and e.count / max(1, e.length) for e in (clip.words, clip.characters))
    return Spoken(
        audio and audio.relative_to(folder).as_posix(),
        wer,
        cer,
        result.similarity,
        clip.heard,
        result.take.runaway,
        audio is None,
        round(clip.seconds, 3),
    )


def _path(recording: Recording | None) -> str | None:
    return recording and str(recording.audio)
