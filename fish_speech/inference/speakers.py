"""The speakers that a model lists by name, and which of them speaks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from unicodedata import normalize

from fish_speech.files import read_json


def list_speakers(model_dir: Path) -> list[str]:
    """The names that a model lists in its `config.json`; empty where it lists none."""
    try:
        names = read_json(model_dir / "config.json").get("speakers", [])
    except (OSError, ValueError, AttributeError):  # loading the model says what is wrong with it
        return []
    fit = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return names if fit else []


def choose_speaker(
    speaker: str | None, model_dir: Path, say: Callable[[str], None], *, cloned: bool
) -> str | None:
    """`resolve_speaker` for a model directory; `say` is told what the user should know.

    Raises `ValueError` for a name that the model does not list.
    """
    known = list_speakers(model_dir)
    check_speaker(speaker, known)
    if speaker is not None and not known:
        say(f"Warning: this model lists no speakers; it may not know {speaker!r}, or say the name")
    chosen = resolve_speaker(speaker, known, cloned=cloned)
    if speaker is None and chosen is not None:
        say(f"Speaker: {chosen} (the model has {', '.join(known)}; --speaker chooses)")
    return chosen


def resolve_speaker(speaker: str | None, known: Sequence[str], *, cloned: bool) -> str | None:
    """The speaker asked for; without one, the first that the model lists, unless a voice is cloned.

    A model that was trained with names has never seen a text without one.
    """
    if speaker is None:
        return known[0] if known and not cloned else None
    return _find_speaker(speaker, known) or speaker


def _find_speaker(speaker: str, known: Sequence[str]) -> str | None:
    """The name as the model lists it; it may be typed with separate accents (NFD), as on macOS."""
    wanted = normalize("NFC", speaker)
    return next((name for name in known if normalize("NFC", name) == wanted), None)


def check_speaker(speaker: str | None, known: Sequence[str]) -> None:
    """Raise `ValueError` where the model lists its speakers and this one is not among them."""
    if speaker is not None and known and _find_speaker(speaker, known) is None:
        raise ValueError(f"speaker {speaker!r} is unknown; the model knows {', '.join(known)}")
