"""Runs on disk: `results/<project>/{checkpoints,logs,training_configs}`."""

from __future__ import annotations

import csv
import math
import re
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fish_speech.files import safe_name, write_text

if TYPE_CHECKING:
    from fish_speech.models.text2semantic.lora import LoRAConfig

_CHECKPOINT = re.compile(r"step_(\d{9})\.ckpt")
# What the record in a checkpoint says, also of its LoRA config, and what resuming needs besides.
_RECORD = {"data_dir", "base", "base_digest", "lora", "parent"}
_LORA = {"r", "alpha", "dropout", "targets"}
_RESUMED = {"global_step", "loops", "optimizer_states"}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file of a run."""

    path: Path
    step: int

    def read(self) -> dict[str, Any]:
        """Its content, mapped. Raises `ValueError` that names the file where it is damaged."""
        content = self._content()
        record = content.get("run")
        if "state_dict" not in content or not isinstance(record, dict):
            raise ValueError(f"{self.path}: not a checkpoint of finetune_tts.py")
        lora = record.get("lora")
        known = lora.keys() if isinstance(lora, dict) else set()
        if missing := sorted(_RECORD - record.keys() or _LORA - known):
            raise ValueError(f"{self.path}: damaged: it does not say its {', '.join(missing)}")
        return content

    def check(self) -> None:
        """Raise `ValueError` unless all that resuming needs is there, byte for byte as written."""
        from fish_speech.models.weights import check_sums

        if missing := _RESUMED - self.read().keys():
            raise ValueError(f"{self.path}: damaged: it holds no {', '.join(sorted(missing))}")
        check_sums(self.path)

    def is_readable(self) -> bool:
        """Whether it can be read."""
        try:
            return bool(self.read())
        except ValueError:
            return False

    def was_due(self) -> bool:
        """Whether its run would have saved it without an interruption; True where it can't tell."""
        from omegaconf import OmegaConf

        with suppress(ValueError, KeyError, AttributeError):
            train = OmegaConf.create(self.read()["run"]["config"]).train
            return self.step % train.save_every == 0 or self.step == train.max_steps
        return True

    def has_run_record(self) -> bool:
        """Whether it says what it was trained on; upstream's checkpoints do not."""
        return "run" in self._content()

    def _content(self) -> dict[str, Any]:
        from fish_speech.models.weights import read_checkpoint

        return read_checkpoint(self.path)


@dataclass(frozen=True)
class Run:
    """The folder of a project."""

    folder: Path

    @classmethod
    def of(cls, project: str, results_dir: str | Path = "results") -> Run:
        """Raises `ValueError` where the project's name would not be a single folder."""
        if not project or safe_name(project, max_length=100) != project:
            raise ValueError(
                f"--project '{project}': use letters, digits, '_', '-' and '.' only, "
                f"for example {safe_name(project)}"
            )
        return cls(Path(results_dir) / project)

    @property
    def project(self) -> str:
        return self.folder.name

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    @property
    def configs(self) -> Path:
        return self.folder / "training_configs"

    @property
    def saved_config(self) -> Path:
        """The composed config of the latest start that came to a checkpoint."""
        return self.configs / "latest.yaml"

    def restored_config(self) -> Path | None:
        """`saved_config`; where it is gone, written again from the latest checkpoint. None where
        that does not hold it either."""
        if not self.saved_config.is_file():
            if not self.checkpoints():
                return None
            config = self.newest().read()["run"].get("config")
            if config is None:
                return None
            write_text(self.saved_config, config)
        return self.saved_config

    def new_log(self) -> str:
        """A name for the log folder of a start: never one that was used."""
        return f"run_{max(self._logs(), default=0) + 1:03d}"

    def _logs(self) -> dict[int, Path]:
        """The log folders by the number of their start."""
        folders = self.logs.glob("run_*")
        return {int(path.name[4:]): path for path in folders if path.name[4:].isdecimal()}

    @property
    def checkpoint_folder(self) -> Path:
        return self.folder / "checkpoints"

    def checkpoint_path(self, step: int) -> Path:
        return self.checkpoint_folder / f"step_{step:09d}.ckpt"

    def checkpoints(self) -> list[Checkpoint]:
        """By step; none for a project that has none."""
        return checkpoints_in(self.checkpoint_folder)

    def checkpoint(self, step: int | None = None) -> Checkpoint:
        """That of a step, or the latest. Raises `FileNotFoundError` that lists what there is, or
        `ValueError` where the latest is damaged."""
        found = self.checkpoints()
        if not found:
            raise FileNotFoundError(
                f"{self.checkpoint_folder}: no checkpoints; train first "
                f"(finetune_tts.py --project {self.project} --data-dir DIR --train)"
            )
        if step is None:
            return self.newest()
        for checkpoint in found:
            if checkpoint.step == step:
                return checkpoint
        there = ", ".join(str(checkpoint.step) for checkpoint in found)
        raise FileNotFoundError(
            f"--checkpoint-step {step}: project '{self.project}' has no such step, only {there}"
        )

    def newest(self) -> Checkpoint:
        """The latest. Raises `ValueError` where it is damaged, with what can be done."""
        newest, *earlier = reversed(self.checkpoints())
        try:
            newest.read()
        except ValueError as error:
            sound = next(filter(Checkpoint.is_readable, earlier), None)
            if sound is None:
                raise
            raise ValueError(
                f"{error}; step {sound.step} is whole: --resume-from-checkpoint {sound.path} goes "
                f"back to it, --checkpoint-step {sound.step} merges it"
            ) from error
        return newest

    def archive_after(self, step: int, name: str) -> Path | None:
        """Move the checkpoints after `step` into a folder of that name beside them.

        Returns the folder, or None where there are none.
        """
        later = [checkpoint.path for checkpoint in self.checkpoints() if checkpoint.step > step]
        if not later:
            return None
        folder = self.checkpoint_folder / name
        folder.mkdir(exist_ok=True)
        for path in later:
            path.rename(folder / path.name)
        return folder

    def logged(self, name: str) -> dict[int, float]:
        """A metric of the logs, such as `validation/loss`, by step."""
        return {
            int(float(row["step"])) + 1: float(row[name])  # Lightning counts from 0
            for row in self.metrics()
            if _is_number(row.get(name))
        }

    def metrics(self) -> list[dict[str, str]]:
        """The rows of every CSV log, oldest first, without those that a later start did again."""
        rows: list[dict[str, str]] = []
        for _, folder in sorted(self._logs().items()):
            file = folder / "metrics.csv"
            if not file.is_file():
                continue
            newer = _rows_of(file)
            first = min((float(row["step"]) for row in newer), default=math.inf)
            rows = [row for row in rows if float(row["step"]) < first] + newer
        return rows


def _rows_of(file: Path) -> list[dict[str, str]]:
    """The rows of a CSV file that have a step; what is damaged in a log stops no training."""
    try:
        with file.open(encoding="utf-8", errors="replace", newline="") as lines:
            return [row for row in csv.DictReader(lines) if _is_number(row.get("step"))]
    except csv.Error:
        return []


def _is_number(text: str | None) -> bool:
    try:
        return math.isfinite(float(text or ""))
    except (ValueError, TypeError):
        return False


def recorded_lora(record: dict[str, Any]) -> LoRAConfig:
    """The LoRA config that a checkpoint's record holds."""
    from fish_speech.models.text2semantic.lora import LoRAConfig

    lora = {name: record["lora"][name] for name in _LORA}  # and nothing that a later version says
    return LoRAConfig(**lora | {"targets": tuple(lora["targets"])})


def named_checkpoint(path: str | Path) -> Checkpoint:
    """A checkpoint by its file, however it is called, or the newest of a folder or run.

    Raises `FileNotFoundError` that lists what there is, or `ValueError` for a damaged file.
    """
    file = real_path(path)
    if file.is_dir():
        found = checkpoints_in(file) or checkpoints_in(file / "checkpoints")
        if not found:
            merged = (file / "model.pth").exists()
            hint = ", but a model: --pretrained-ckpt-path takes that" if merged else ""
            raise FileNotFoundError(f"{path}: no step_*.ckpt in this folder{hint}")
        return found[-1]
    if not file.is_file():
        there = ", ".join(c.path.name for c in checkpoints_in(file.parent)) or "none"
        raise FileNotFoundError(f"{path}: no such checkpoint (in that folder: {there})")
    if match := _CHECKPOINT.fullmatch(file.name):
        return Checkpoint(file, int(match[1]))
    from fish_speech.models.weights import read_checkpoint

    return Checkpoint(file, read_checkpoint(file).get("global_step", 0))


def checkpoints_in(folder: Path) -> list[Checkpoint]:
    """The checkpoints of a folder, by step."""
    found = []
    for path in folder.glob("*.ckpt") if folder.is_dir() else ():
        if (match := _CHECKPOINT.fullmatch(path.name)) and path.is_file():
            found.append(Checkpoint(path, int(match[1])))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def describe_checkpoints(run: Run) -> str:
    """The list that `--list-checkpoints` prints."""
    found = run.checkpoints()
    if not found:
        others = sorted(path.parent.name for path in run.folder.parent.glob("*/checkpoints"))
        there = f" Projects here: {', '.join(others)}." if others else ""
        return f"📂 No checkpoints for project '{run.project}' yet.{there}"
    lines = [f"📂 Available checkpoints for project '{run.project}':"]
    losses, latest = run.logged("validation/loss"), found[-1]
    for checkpoint in found:
        stat = checkpoint.path.stat()
        time = datetime.fromtimestamp(stat.st_mtime).strftime("%Y-%m-%d %H:%M:%S")
        notes = [f"step {checkpoint.step}"]
        try:
            parent = checkpoint.read()["run"]["parent"]
            latest = checkpoint
        except ValueError:
            parent = None
            notes.append("damaged, or not of this program")
        if checkpoint.step in losses:
            notes.append(f"validation loss {losses[checkpoint.step]:.3f}")
        if parent:
            notes.append(f"from {parent}")
        size = stat.st_size / 1e6
        lines.append(f"📄 {checkpoint.path.name} ({size:.1f} MB, {time}) {', '.join(notes)}")
    lines.append(f"🎯 Latest: {latest.path.name}")
    return "\n".join(lines)


def real_path(path: str | Path) -> Path:
    """The guide writes `fish-speech/results/...` for `results/...`; both mean the same."""
    path = Path(path)
    if not path.exists() and path.parts[:1] == ("fish-speech",):
        return Path(*path.parts[1:])
    return path
