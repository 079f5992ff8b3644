"""Packing clips into protobuf shards, with a validation split and a manifest."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from fish_speech.datasets.clips import Clip, find_clips
from fish_speech.datasets.protos.stream import read_shard, write_shard
from fish_speech.datasets.protos.text_data_pb2 import Semantics, Sentence, TextData
from fish_speech.datasets.spans import Span, SpanSet, recorded_spans, shared, whole
from fish_speech.files import file_digest, read_json, safe_name, write_json
from fish_speech.text import is_speakable, spoken_text

if TYPE_CHECKING:
    from fish_speech.conversation import Utterance

SHARD_FOLDER = "protos"
_MANIFEST = "manifest.json"
_SENTENCES_A_MESSAGE = 100  # keeps packing and reading at a few hundred kilobytes of memory


@dataclass(frozen=True)
class Sample:
    """An utterance of a shard: text, speaker, `codes [K, T]` (uint16), and its clip if known."""

    text: str
    speaker: str
    codes: np.ndarray
    name: str = ""

    def utterance(self, dtype: str = "int64") -> Utterance:
        """Its text and codes [K, T] as prompts and training items take them."""
        import torch

        from fish_speech.conversation import Utterance

        return Utterance(self.text, torch.from_numpy(self.codes.astype(dtype)))


@dataclass
class Manifest:
    """What was packed: shards with their digests, the clips of each split, and what was left out.

    `skipped` maps a clip to the reason, `spans` to what it is known by under any name.
    `validation_share` is what was asked for. `source` is the digest of everything that went in.
    """

    source: str
    speakers: list[str]
    train: list[str] = field(default_factory=list)
    validation: list[str] = field(default_factory=list)
    shards: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    spans: dict[str, list[Span]] = field(default_factory=dict)
    validation_share: float = 0.0
    frames: int = 0

    def paths(self, data_dir: str | Path, split: str) -> list[Path]:
        """The shards of `train` or `validation`."""
        folder = Path(data_dir) / SHARD_FOLDER
        return [folder / name for name in self.shards if name.startswith(f"{split}-")]

    def spans_of(self, names: Iterable[str]) -> SpanSet:
        return SpanSet(span for name in names for span in self.spans.get(name, ()))


def build_shards(
    data_dir: str | Path,
    *,
    num_codebooks: int,
    codebook_size: int,
    validation_share: float = 0.05,
    progress: Callable[[Iterable[Clip]], Iterable[Clip]] = iter,
) -> tuple[Manifest, bool]:
    """Pack a dataset whose codes are extracted; returns the manifest and whether it was rebuilt.

    Clips without codes or transcript are left out and named in the manifest. Raises `ValueError`
    where none is left.
    """
    clips = find_clips(data_dir)
    settings = (num_codebooks, codebook_size, validation_share)
    recorded = recorded_spans(Path(data_dir))
    source = _source_digest(clips, recorded, settings)
    folder = Path(data_dir) / SHARD_FOLDER
    current = _current_manifest(folder, source)
    if current is not None:
        return current, False

    manifest, usable = Manifest(source, [], validation_share=validation_share), []
    folder.mkdir(exist_ok=True)
    # Which split a clip belongs to follows from all of them: until then they are spilled to a file.
    with TemporaryFile(dir=folder) as file:
        spilled = _SpillFile(file)
        for clip in progress(clips):
            try:
                text, codes = clip.read_text(), read_codes(clip.codes, num_codebooks, codebook_size)
                if not is_speakable(text):
                    raise ValueError(f"{clip.transcript}: the transcript has no letter or number")
            except (ValueError, FileNotFoundError) as error:
                manifest.skipped[clip.name] = str(error)
                continue
            manifest.frames += codes.shape[1]
            manifest.spans[clip.name] = [whole(codes), *recorded.get(clip.name, ())]
            usable.append(clip)
            spilled.put(clip.name, sentence(text, codes))
        if not usable:
            reason = next(iter(manifest.skipped.values()))
            raise ValueError(f"{data_dir}: no clip can be used; the first: {reason}")
        manifest.speakers = sorted({clip.speaker for clip in usable})
        before = _last_manifest(folder) or Manifest("", [])
        _recognise_by_name(manifest, before)
        held_out = _choose_validation(usable, validation_share, manifest.spans, before)
        for split in ("train", "validation"):
            chosen = [clip for clip in usable if (clip.name in held_out) == (split == "validation")]
            chosen.sort(key=lambda clip: clip.speaker)  # so that names and shards run alike
            setattr(manifest, split, [clip.name for clip in chosen])
            for number, (speaker, group) in enumerate(groupby(chosen, lambda clip: clip.speaker)):
                name = f"{split}-{number:03d}-{safe_name(speaker, max_length=40)}.protos"
                spoken = (spilled.get(clip.name) for clip in group)
                write_shard(folder / name, text_data(spoken, Path(data_dir).name, speaker))
                manifest.shards[name] = file_digest(folder / name)
    write_json(folder / _MANIFEST, vars(manifest))
    for stale in set(folder.glob("*.protos")) - {folder / name for name in manifest.shards}:
        stale.unlink()
    return manifest, True


def read_codes(file: Path, num_codebooks: int, codebook_size: int) -> np.ndarray:
    """Codes [K, T] (uint16) of an `.npy`. Raises `ValueError` that names it if they don't fit."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no codes; run finetune_tts.py --extract-tokens")
    try:
        codes = np.load(file, allow_pickle=False)
    except Exception as error:  # a flipped byte of a header raises almost anything
        raise ValueError(f"{file}: damaged codes; delete the file, and it is made again") from error
    if not isinstance(codes, np.ndarray):
        raise ValueError(f"{file}: an archive, not codes; delete the file")
    if codes.ndim != 2 or codes.shape[0] != num_codebooks or codes.dtype.kind not in "iu":
        raise ValueError(
            f"{file}: codes are {codes.dtype} {codes.shape}, expected integers of "
            f"[{num_codebooks}, T]; they belong to another codec"
        )
    if codes.shape[1] == 0:
        raise ValueError(f"{file}: the clip is shorter than one frame")
    if codes.min() < 0 or codes.max() >= codebook_size:
        raise ValueError(
            f"{file}: a code is outside 0..{codebook_size - 1}; it belongs to another codec"
        )
    return codes.astype(np.uint16)


def read_samples(paths: Iterable[str | Path]) -> Iterator[Sample]:
    """The utterances of shards, ours or upstream's, in order."""
    for path in paths:
        for message in read_shard(path):
            for sentence in message.sentences:
                rows = [np.array(part.values, dtype=np.uint16) for part in sentence.semantics]
                if not rows or len({len(row) for row in rows}) != 1 or not sentence.texts:
                    raise ValueError(f"{path}: an utterance has no text or uneven codebooks")
                yield Sample(" ".join(sentence.texts), message.name, np.stack(rows))


def load_split(data_dir: Path, manifest: Manifest, split: str) -> list[Sample]:
    """The samples of a split, each with the name of its clip and its text as it would be spoken.

    Raises `ValueError` where the shards are not those of the manifest any more.
    """
    for path in manifest.paths(data_dir, split):
        if not path.is_file() or file_digest(path) != manifest.shards[path.name]:
            raise ValueError(f"{path}: was packed again by another run; start this one again")
    samples = read_samples(manifest.paths(data_dir, split))
    names = getattr(manifest, split)
    return [
        replace(sample, name=name, text=spoken_text(sample.text))
        for sample, name in zip(samples, names, strict=True)
    ]


def no_validation_reason(manifest: Manifest) -> str:
    """Why no clip is held out, and what to do about it."""
    if twice := len(shared(manifest.spans)):
        return (
            f"{twice} of {len(manifest.spans)} clips are there twice, or are in part in another "
            "one: delete one of each (prepare_dataset.py --check names them)"
        )
    return "hold some clips out (it takes two) with --override data.validation_share=0.05"


def learned_by(run: dict[str, Any], manifest: Manifest, data_dir: Path) -> SpanSet:
    """What a checkpoint may have learned, from its record `run`."""
    if "learned" in run:
        return SpanSet.from_json(run["learned"])
    if "held_out" in run and Path(run["data_dir"]).name == data_dir.resolve().name:
        # Earlier versions noted the names of what they did not learn.
        return manifest.spans_of(manifest.spans.keys() - set(run["held_out"]))
    return SpanSet()


def sentence(text: str, codes: np.ndarray) -> Sentence:
    """An utterance of codes [K, T] as shards hold it."""
    return Sentence(texts=[text], semantics=[Semantics(values=row) for row in codes.tolist()])


def text_data(sentences: Iterable[Sentence], source: str, speaker: str) -> Iterator[TextData]:
    """Messages of one speaker's utterances, a hundred in each."""
    sentences = iter(sentences)
    while part := list(islice(sentences, _SENTENCES_A_MESSAGE)):
        yield TextData(source=source, name=speaker, sentences=part)


class _SpillFile:
    """Utterances by name, in a file rather than in memory."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._spans: dict[str, tuple[int, int]] = {}

    def put(self, name: str, utterance: Sentence) -> None:
        self._spans[name] = self._file.tell(), self._file.write(utterance.SerializeToString())

    def get(self, name: str) -> Sentence:
        start, size = self._spans[name]
        self._file.seek(start)
        return Sentence.FromString(self._file.read(size))


def _recognise_by_name(manifest: Manifest, before: Manifest) -> None:
    """Let clips that kept their names be the same ones where nothing else tells: their codes were
    made again on another device, or their recordings were restored in place.

    They keep what they were known by before, as checkpoints noted it.
    """
    if not before.spans:  # of an earlier version
        before.spans = manifest.spans
        return
    there = manifest.spans_of(manifest.spans)
    for name in before.spans.keys() & manifest.spans.keys():
        now, then = manifest.spans[name], before.spans[name]
        if now[0] == then[0] or not there.overlaps(then):
            now += [span for span in then if span not in now]


def _choose_validation(
    clips: list[Clip], share: float, spans: dict[str, list[Span]], before: Manifest
) -> set[str]:
    """Names of the held-out clips: about a share, at least one of two and three of twenty; but
    never the only clip, or the last one, of a speaker, or what another clip holds as well.

    A hash of its name decides whether a clip is held out, not which others there are, so that a
    second stage with more clips never validates on what the first one learned (unless a larger
    share is asked for, or a speaker had no other clip). What was held out `before` stays so, unless
    a smaller share is asked for; a clip that was learned, under whatever name, is taken only where
    there are too few others, such as where everything was cut anew.
    """
    if share <= 0:
        return set()
    learned_spans, held_spans = map(before.spans_of, (before.train, before.validation))
    fractions = {clip.name: _hash_fraction(clip.name) for clip in clips}
    twice = shared(spans)  # what is trained on, too, can't be held out
    names = [name for name in sorted(fractions, key=fractions.__getitem__) if name not in twice]
    learned = {name for name in names if learned_spans.overlaps(spans[name])}
    as_before = [n for n in names if n not in learned and held_spans.overlaps(spans[n])]
    if not before.validation:  # nothing was to be held out
        learned = set()
    chosen = [name for name in names if fractions[name] < share]
    wanted, fewest = round(share * len(names)), 3 if len(names) >= 20 else 1
    share_before = before.validation_share or share
    too_few = share > share_before or len(as_before) < wanted / 2
    candidates = (
        (as_before, len(names) if share >= share_before else max(len(chosen), wanted) + fewest),
        ([name for name in chosen if name not in learned], len(names)),
        (chosen, wanted if too_few else 0),
        ([name for name in names if name not in learned], fewest),
        (names, 1 if as_before else fewest),
    )
    left = Counter(clip.speaker for clip in clips)
    speakers = {clip.name: clip.speaker for clip in clips}
    held_out: set[str] = set()
    for some, enough in candidates:
        for name in some:
            if len(held_out) < enough and left[speakers[name]] > 1 and name not in held_out:
                held_out.add(name)
                left[speakers[name]] -= 1
    return held_out


def _hash_fraction(name: str) -> float:
    """A hash of a name, uniform in [0, 1)."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def _source_digest(clips: list[Clip], recorded: dict[str, list[Span]], settings: tuple) -> str:
    digest = hashlib.sha256(repr(("spans", *settings)).encode())
    for clip in clips:
        # The speaker is the dataset's name, for clips at its top.
        digest.update(repr((clip.speaker, recorded.get(clip.name))).encode())
        for file in (clip.transcript, clip.codes):
            state = file.stat() if file.is_file() else None
            stamp = (state.st_size, state.st_mtime_ns) if state else None
            digest.update(repr((clip.name, file.suffix, stamp)).encode())
    return digest.hexdigest()


def read_manifest(data_dir: str | Path) -> Manifest:
    """What was packed last. Raises `FileNotFoundError` or `ValueError` where it can't be told."""
    file = Path(data_dir) / SHARD_FOLDER / _MANIFEST
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: no such file; pack the data first (finetune_tts.py --build-dataset)"
        )
    try:
        return Manifest(**read_json(file))
    except TypeError as error:
        raise ValueError(f"{file}: not a manifest ({error}); delete it and pack again") from error


def _last_manifest(folder: Path) -> Manifest | None:
    """What was packed last, if anything was."""
    try:
        return read_manifest(folder.parent)
    except (ValueError, FileNotFoundError):
        return None


def _current_manifest(folder: Path, source: str) -> Manifest | None:
    """The manifest on disk, if it describes these clips and its shards are whole."""
    manifest = _last_manifest(folder)
    if manifest is None or manifest.source != source:
        return None
    for name, digest in manifest.shards.items():
        if not (folder / name).is_file() or file_digest(folder / name) != digest:
            return None
    return manifest
