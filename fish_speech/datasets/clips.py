"""A dataset folder: clips `<SPEAKER>/<name>.wav` with `.lab` transcripts and `.npy` codes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from unicodedata import normalize

from fish_speech.files import list_audio, list_files, read_json, read_text

SUMMARY_NAME = "dataset_summary.json"
CODES_RECORD = "codes.json"  # what codes were made of; of further processes: codes.1.json, ...
REJECTED = "rejected"  # the folder of clips that preparing sorted out


@dataclass(frozen=True)
class Clip:
    """One utterance on disk. `name` is its path in the dataset, without suffix."""

    name: str
    speaker: str
    audio: Path

    @property
    def transcript(self) -> Path:
        return self.audio.with_suffix(".lab")

    @property
    def codes(self) -> Path:
        return self.audio.with_suffix(".npy")

    def read_text(self) -> str:
        """The transcript. Raises `ValueError` that names the file where it is missing or empty."""
        if not self.transcript.is_file():
            raise ValueError(f"{self.transcript}: the transcript is missing")
        try:
            text = read_text(self.transcript).strip()
        except ValueError as error:
            raise ValueError(f"{error}, or let prepare_dataset.py --input read it") from error
        if not text:
            raise ValueError(f"{self.transcript}: the transcript is empty")
        return text


def is_rejected(path: Path, data_dir: Path) -> bool:
    """Whether a file of a dataset is among the clips that preparing sorted out."""
    return path.relative_to(data_dir).parts[0] == REJECTED


def is_raw(folder: Path) -> bool:
    """Whether a folder holds recordings that are not prepared: no clip has a `.lab` beside it."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    return not any(file.suffix == ".lab" for file in list_files(folder))


def is_source_of(prepared: Path, folder: Path) -> bool:
    """Whether a folder holds raw recordings, while `prepared` is a dataset."""
    if not (prepared.is_dir() and folder.is_dir()) or prepared.samefile(folder):
        return False
    return bool(list_audio(folder)) and is_raw(folder) and not is_raw(prepared)


def read_codes_records(data_dir: Path) -> list[dict]:
    """What runs recorded that made codes; a file that is no record (any more) counts for nothing.

    `codec` is the codec's digest; of each clip in `clips` there is the audio's size, time and
    digest, or None while its codes are being made. (A damaged record may hold anything there.)
    """
    records = []
    for file in sorted(data_dir.glob("codes*.json")):
        try:
            record = read_json(file)
        except ValueError:
            continue
        if (
            isinstance(record, dict)
            and isinstance(record.get("codec"), str)
            and isinstance(record.get("clips"), dict)
        ):
            records.append(record)
    return records


def find_clips(data_dir: str | Path) -> list[Clip]:
    """All clips of a dataset, prepared or made by hand, sorted by name.

    The speaker is the first folder under the dataset; a clip beside the summary belongs to a
    speaker named like the dataset. Raises `FileNotFoundError` or `ValueError` where the folder,
    clips or transcripts are missing, or two files claim one name.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise FileNotFoundError(f"{data_dir}: no such dataset; make one with prepare_dataset.py")
    clips: dict[str, Clip] = {}
    for audio in list_audio(data_dir):
        relative = audio.relative_to(data_dir)
        if is_rejected(audio, data_dir):
            continue
        try:
            str(relative).encode()
        except UnicodeEncodeError as error:
            shown = os.fsencode(audio).decode("utf-8", "replace")
            raise ValueError(f"{shown}: its name is not UTF-8; rename it") from error
        speaker = relative.parts[0] if len(relative.parts) > 1 else data_dir.resolve().name
        # The name of a folder may have its accents beside their letters, as macOS writes them.
        clip = Clip(relative.with_suffix("").as_posix(), normalize("NFC", speaker), audio)
        if clip.name in clips:
            raise ValueError(
                f"{audio} and {clips[clip.name].audio} share one name, and so one transcript; "
                "rename or remove one"
            )
        clips[clip.name] = clip
    if not clips:
        raise ValueError(f"{data_dir}: no audio files; make a dataset with prepare_dataset.py")
    if not any(clip.transcript.is_file() for clip in clips.values()):
        raise ValueError(
            f"{data_dir}: no clip has a .lab transcript; prepare the recordings first "
            "(prepare_dataset.py, or finetune_tts.py --prepare-data)"
        )
    return list(clips.values())
