"""The voices on this machine: models that can speak, and recordings to be cloned."""

from __future__ import annotations

import time
from pathlib import Path

from fish_speech.hub import local_model, model_versions


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
            for file in folder.resolve().glob("checkpoints/*-merged/model.pth")
        },
        key=lambda file: file.stat().st_mtime,
        reverse=True,
    )
    found = [(file.parent, f"trained voice of {_date(file)}") for file in merged]
    embedded_last = sorted(model_versions(root).values(), key=lambda entry: entry.repo_id is None)
    for entry in embedded_last:
        if (directory := local_model(entry.name, root)) is not None:
            found.append((directory, entry.description))
    if not found:
        raise FileNotFoundError(
            f"{root / 'checkpoints'}: no model; 'git checkout -- checkpoints/tiny' brings back the"
            " embedded one, '--model-path 1.5' downloads the published one"
        )
    return found


def text_beside(audio: str | Path) -> str:
    """What a recording says, from the `.lab` or `.txt` file beside it.

    Raises `FileNotFoundError` where the recording is missing, `ValueError` where its text is.
    """
    audio = Path(audio)
    for suffix in (".lab", ".txt"):
        if (file := audio.with_suffix(suffix)).is_file():
            return file.read_text(encoding="utf-8-sig")
    if not audio.is_file():
        raise FileNotFoundError(f"{audio}: no such audio file")
    raise ValueError(
        f"{audio}: what does it say? Give --reference-text, or a .lab or .txt beside it"
    )


def _date(file: Path) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(file.stat().st_mtime))
