"""The voices on this machine: models that can speak, and recordings to be cloned."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unicodedata import normalize

from fish_speech.files import read_json, read_text, sidecar_of
from fish_speech.hub import local_model, model_versions
from fish_speech.text import is_speakable


def local_voices(root: Path) -> list[tuple[Path, str]]:
    """The model directories on this machine with what they are, the preferred first.

    Trained voices (`checkpoints/*-merged` of the repository at `root` and of the working directory)
    from the newest on, then the published model, then the embedded one. Raises `FileNotFoundError`
    where there is none at all.
    """
    merged = sorted(
        {
            file
            for folder in (root, Path.cwd())
            for file in folder.resolve().glob("checkpoints/[!.]*-merged/model.pth")
        },
        key=lambda file: file.stat().st_mtime,
        reverse=True,
    )
    found = [(file.parent, f"trained voice of {_date(file)}") for file in merged]
    embedded_last = sorted(model_versions(root).values(), key=lambda entry: entry.repo_id is None)
    for entry in embedded_last:
        if (directory := local_model(entry.name, root)) is not None:
            found.append((directory, f"{entry.description}, {entry.licence}"))
    if not found:
        raise FileNotFoundError(
            f"{root / 'checkpoints'}: no model; 'git checkout -- checkpoints/tiny' brings back the"
            " embedded one, '--model-path 1.5' downloads the published one"
        )
    return found


def speakers_of(model_dir: Path) -> list[str]:
    """The names that a model lists in its `config.json`; empty where it lists none."""
    try:
        return read_json(model_dir / "config.json").get("speakers", [])
    except (OSError, ValueError, AttributeError):  # loading the model says what is wrong with it
        return []


def choose_speaker(
    speaker: str | None, model_dir: Path, say: Callable[[str], None], *, cloned: bool
) -> str | None:
    """`speaker_or_first` of a model directory; `say` is given what the user should know.

    Raises `ValueError` for a name that the model does not list.
    """
    known = speakers_of(model_dir)
    check_speaker(speaker, known)
    if speaker is not None and not known:
        say(f"Warning: this model lists no speakers; it may not know {speaker!r}, or say the name")
    chosen = speaker_or_first(speaker, known, cloned=cloned)
    if speaker is None and chosen is not None:
        say(f"Speaker: {chosen} (the model has {', '.join(known)}; --speaker chooses)")
    return chosen


def speaker_or_first(speaker: str | None, known: Sequence[str], *, cloned: bool) -> str | None:
    """The name wanted, else the first of a model's where nobody is `cloned`.

    A model that learned its texts with names was never asked without one.
    """
    if speaker is None:
        return known[0] if known and not cloned else None
    return _listed(speaker, known) or speaker


def _listed(speaker: str, known: Sequence[str]) -> str | None:
    """How a model writes a name: accents may stand beside their letters, as macOS has them."""
    wanted = normalize("NFC", speaker)
    return next((name for name in known if normalize("NFC", name) == wanted), None)


def check_speaker(speaker: str | None, known: Sequence[str]) -> None:
    """Raise `ValueError` where a model lists its speakers, and not this one."""
    if speaker is not None and known and _listed(speaker, known) is None:
        raise ValueError(f"speaker {speaker!r} is unknown; the model knows {', '.join(known)}")


def check_reference(audio: str | Path, text: str) -> None:
    """Raise `FileNotFoundError` for a missing recording, `ValueError` for a text without words."""
    _check_file(audio)
    if not is_speakable(text):
        raise ValueError(f"{audio}: the reference needs its text, the words that are spoken")


def _check_file(audio: str | Path) -> None:
    if not Path(audio).is_file():
        what = "a folder, not a recording" if Path(audio).is_dir() else "no such audio file"
        raise FileNotFoundError(f"{audio}: {what}")


def pair_references(audio: Sequence[str], texts: Sequence[str]) -> list[tuple[str, str]]:
    """Each recording with what it says, which is read beside it where no `texts` are given.

    Raises `FileNotFoundError` or `ValueError` where something is missing.
    """
    if texts and len(texts) != len(audio):
        raise ValueError(
            f"{len(audio)} --reference-audio, but {len(texts)} --reference-text: give one for each,"
            " or none where a .lab or .txt file lies beside the recording"
        )
    pairs = list(zip(audio, texts or map(text_beside, audio), strict=True))
    for file, text in pairs:
        check_reference(file, text)
    return pairs


def text_beside(audio: str | Path) -> str:
    """What a recording says, from the `.lab` or `.txt` file beside it.

    Raises `FileNotFoundError` where the recording is missing, `ValueError` where its text is.
    """
    if (file := sidecar_of(audio)) is not None:
        return read_text(file)
    _check_file(audio)
    raise ValueError(
        f"{audio}: what does it say? Give --reference-text, or a .lab or .txt beside it"
    )


def _date(file: Path) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(file.stat().st_mtime))
