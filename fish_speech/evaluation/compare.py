"""Any two models against each other, on the same texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

from fish_speech.console import Say
from fish_speech.evaluation.leaderboard import Leaderboard
from fish_speech.evaluation.measure import measure
from fish_speech.evaluation.metric_columns import verdict
from fish_speech.evaluation.page import HTML_NAME
from fish_speech.evaluation.project import JOURNAL_NAME, build_scorer, read_texts, write
from fish_speech.evaluation.recommend import Commands, literal, prefer
from fish_speech.evaluation.resynthesis import Resynthesis
from fish_speech.evaluation.speaker import stranger_clips
from fish_speech.evaluation.synthesis import Candidate, Line, RealClip, plan_lines
from fish_speech.files import exclusive, file_digest, safe_name, shown_path
from fish_speech.hub import find_model
from fish_speech.inference import Settings, TextToSpeech
from fish_speech.inference.jobs import model_digests
from fish_speech.inference.references import pair_references
from fish_speech.inference.speakers import choose_speaker
from fish_speech.models.vqgan.codec import find_codec

_VOICE = "reference"  # the key of the one voice that both are compared with


def compare(
    models: Sequence[Path],
    texts: Sequence[str],
    folder: Path,
    *,
    load: Callable[[Path], TextToSpeech],
    loaded_as: Any = None,
    settings: Settings | None = None,
    takes: int = 1,
    speaker: str | None = None,
    references: Sequence[tuple[str | Path, str]] = (),
    whisper_model: str | None = None,
    speaker_encoder: str | None = None,
    device: str = "auto",
    say: Say = lambda message: None,
) -> Leaderboard:
    """Measure two model directories on `texts`, each spoken `takes` times, and write the page.

    `load` gives the model of a directory; `loaded_as` is what else decides how it sounds, as JSON
    can hold it. With `references` (recordings and their transcripts) similarity is to those, and
    the first is cloned too. What an earlier call spoke into `folder` is not spoken again.
    Raises `ValueError` where the models are the same or there is nothing to speak.
    """
    a, b = (Path(model) for model in models)
    _check(a, b, folder)
    settings = settings or Settings()
    clips = [RealClip(Path(audio), words) for audio, words in references]
    real_clips = {_VOICE: clips} if clips else {}
    cloned = {_VOICE: clips[0]} if clips else {}
    spoken = [Line("", text, speaker=speaker, voice=_VOICE) for text in texts]
    lines = plan_lines(spoken, len(texts) * takes, cloned, settings.seed)
    commands = _commands(a, clips)
    with exclusive(folder, f"the comparison in {folder}"):
        candidates = _candidates(a, b, load, loaded_as)
        scorer = build_scorer(
            texts,
            say,
            whisper_model=whisper_model,
            speaker_encoder=speaker_encoder,
            device=device,
            journal=folder / JOURNAL_NAME,
        )
        board = measure(
            candidates,
            lines,
            real_clips,
            folder,
            title=" against ".join(candidate.name for candidate in candidates),
            scorer=scorer,
            commands=commands,
            settings=settings,
            resynthesised=_through_their_codec((a, b), real_clips, folder, device),
            strangers=stranger_clips(),
            say=say,
        )
        board.recommendation = prefer(*board.rows, board.samples, commands)
        write(board, folder)
    say(f"{verdict(board.recommendation)}: {board.recommendation.reason}")
    return board


def compare_named(
    models: Sequence[str],
    texts: Path,
    folder: str | Path | None,
    *,
    root: Path,
    reference_audio: Sequence[str] = (),
    reference_text: Sequence[str] = (),
    speaker: str | None = None,
    say: Say = lambda message: None,
    **options: Any,
) -> tuple[Leaderboard, Path]:
    """`compare` with models and references as the command line names them, and a file of texts.

    Models are as `find_model` takes them in the repository at `root`; `folder` None is
    `output/A-against-B`. Returns the page's path too. Raises as `find_model` and `compare` do.
    """
    lines = read_texts(texts)
    references = pair_references(reference_audio, reference_text)
    directories = [find_model(model, root) for model in models]
    for directory in directories:
        choose_speaker(speaker, directory, say, cloned=True)
    folder = Path(folder or Path("output", "-against-".join(path.name for path in directories)))
    board = compare(
        directories, lines, folder, references=references, speaker=speaker, say=say, **options
    )
    return board, folder / HTML_NAME


def _check(a: Path, b: Path, folder: Path) -> None:
    if folder.is_file():
        raise ValueError(f"{folder}: a file; the comparison needs a folder (-o)")
    if a.resolve() == b.resolve():
        raise ValueError(f"{shown_path(a)}: it can't be compared with itself; give another model")


def _commands(a: Path, references: Sequence[RealClip]) -> Commands:
    """How to speak with either model, and with `a` where neither is better."""
    cloning = f" --reference-audio {quote(str(references[0].audio))}" if references else ""
    speak = f'cli_tts.py "Hello there." --model-path {{path}}{literal(cloning)}'
    return Commands(speak, "", speak.format(path=quote(shown_path(a))))


def _candidates(
    a: Path, b: Path, load: Callable[[Path], TextToSpeech], loaded_as: Any
) -> list[Candidate]:
    """Both models, told apart by A and B where their folders have the same name."""
    alike = safe_name(a.name) == safe_name(b.name)
    names = (f"A: {a.name}", f"B: {b.name}") if alike else (a.name, b.name)
    return [
        Candidate(
            name,
            Path(shown_path(path)),
            json.dumps([model_digests(path), loaded_as], sort_keys=True),
            partial(load, path),
        )
        for name, path in zip(names, (a, b), strict=True)
    ]


def _through_their_codec(
    models: Sequence[Path], real_clips: dict[str, list[RealClip]], folder: Path, device: str
) -> dict[str, list[RealClip]]:
    """Real clips through the codec of the models; none where their codecs differ."""
    if len({file_digest(find_codec(model)) for model in models}) > 1:
        return {}
    return Resynthesis(models[0], folder, device).of(real_clips)
