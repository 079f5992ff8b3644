"""Where a training starts: the rules of resuming and warm starts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fish_speech.files import file_digest
from fish_speech.models.text2semantic.checkpoint import MODEL_FILE
from fish_speech.models.text2semantic.lora import LoRAConfig
from fish_speech.training.runs import (
    Checkpoint,
    Run,
    named_checkpoint,
    real_path,
    recorded_lora,
)


@dataclass(frozen=True)
class Start:
    """Where training starts: `resumes` continues that checkpoint's run exactly, else it is a
    warm start from its adapters; `reason` is a sentence for the user."""

    checkpoint: Checkpoint | None
    resumes: bool
    reason: str


def choose_start(
    run: Run,
    data_dir: Path,
    *,
    resume_latest: bool = False,
    resume_from: str | None = None,
    checkpoint_path: str | None = None,
    lora: LoRAConfig | None = None,
    base: Path | None = None,
) -> Start:
    """Apply the rules of resuming (docs/training.md, "Resuming").

    What a project has is never started over: without a flag, too, it goes on. Of other projects
    `resume_latest` chooses a checkpoint with this `lora` and this `base`, the directory of a base
    model that was asked for. Raises `ValueError` or `FileNotFoundError` that says what
    there is to choose from.
    """
    if resume_latest and resume_from:
        raise ValueError("--resume-latest and --resume-from-checkpoint exclude each other")
    if resume_from and checkpoint_path:
        raise ValueError("--resume-from-checkpoint and --checkpoint-path exclude each other")
    own = run.checkpoints()
    named = resume_from or checkpoint_path
    other = named_checkpoint(named) if named else None
    is_own = other and other.path.resolve().parent == run.checkpoint_folder.resolve()
    if resume_from and is_own:
        return Start(other, True, f"resuming from {other.path}")
    if own:
        parent = run.newest().read()["run"]["parent"]
        is_parent = other and parent and _is_in(Path(parent), real_path(named))
        if other and not (is_own or is_parent):
            raise ValueError(
                f"project '{run.project}' has checkpoints of its own, up to step {own[-1].step}, "
                f"that did not start from {named}; choose another --project"
            )
        if is_own and other.path.resolve() != own[-1].path.resolve():
            raise ValueError(
                f"--checkpoint-path {named}: project '{run.project}' goes on from its newest, "
                f"{own[-1].path.name}; --resume-from-checkpoint {named} goes back to that one"
            )
        return Start(own[-1], True, f"resuming from {own[-1].path}")
    if other is not None:
        other.read()
        return Start(other, False, f"warm start from the adapters of {other.path}")
    if not resume_latest:
        return Start(None, False, "starting from the base model")
    related = _latest_of_same_data(run, data_dir, lora, base)
    if related is None:
        raise FileNotFoundError(
            f"--resume-latest: no checkpoint, neither of project '{run.project}' nor of another "
            f"one trained on {data_dir} that fits (base, LoRA config); leave the flag out to start "
            "from the base"
        )
    return Start(
        related,
        False,
        f"project '{run.project}' is new: warm start from the adapters of {related.path}, "
        f"the newest trained on {data_dir}",
    )


def _is_in(file: Path, place: Path) -> bool:
    """Whether a checkpoint is `place`, or lies in that folder or run."""
    return place.resolve() in (file.resolve(), *file.resolve().parents[:2])


def check_fits(checkpoint: Checkpoint, lora: LoRAConfig, base_digest: str, base_dir: Path) -> None:
    """Raise `ValueError` where a checkpoint was trained over another base or LoRA config."""
    run = checkpoint.read()["run"]
    theirs = recorded_lora(run)
    if what := theirs.mismatch(lora):
        raise ValueError(
            f"{checkpoint.path}: trained with another --lora-config: {what}; give that one, or "
            "choose another --project"
        )
    if run["base_digest"] != base_digest:
        if Path(run["base"]) == base_dir.resolve():
            raise ValueError(
                f"{checkpoint.path}: its base model {base_dir} has changed since; where that was "
                "merged again, merge the step that it was before, or choose another --project"
            )
        raise ValueError(
            f"{checkpoint.path}: trained over the base model {run['base']}, which is not the same "
            f"as {base_dir}; give that one with --pretrained-ckpt-path"
        )


def check_missing_base(start: Start, base: Path) -> None:
    """Raise `ValueError` where training would resume over another base than the missing `base`,
    which would be downloaded only to be compared.

    The same name is enough: the project may have come from another machine.
    """
    if start.resumes:
        recorded = Path(start.checkpoint.read()["run"]["base"])
        if recorded.name != base.name:
            project = start.checkpoint.path.parents[1].name
            raise ValueError(
                f"project '{project}' was trained over {recorded}, not over {base}: choose another "
                "--project"
            )


def projects_over(results: Path, model_dir: Path) -> set[str]:
    """The projects that were trained over the model which is in this folder now."""
    file, place = model_dir / MODEL_FILE, str(model_dir.resolve())
    over = {
        checkpoint.path.parents[1].name: record["base_digest"]
        for checkpoint, record in _newest_of_projects(results)
        if record["base"] == place
    }
    digest = file_digest(file) if over and file.is_file() else None
    return {project for project, wanted in over.items() if wanted == digest}


def _latest_of_same_data(
    run: Run, data_dir: Path, lora: LoRAConfig | None, base: Path | None
) -> Checkpoint | None:
    """The newest checkpoint of another project with the same data, LoRA config and base."""
    wanted = str(data_dir.resolve())
    found = []
    for checkpoint, record in _newest_of_projects(run.folder.parent):
        same_lora = lora is None or lora.is_compatible(recorded_lora(record))
        same_base = base is None or Path(record["base"]) == base.resolve()
        if record["data_dir"] == wanted and same_lora and same_base:
            found.append(checkpoint)
    return max(found, key=lambda checkpoint: checkpoint.path.stat().st_mtime, default=None)


def _newest_of_projects(results: Path) -> Iterator[tuple[Checkpoint, dict[str, Any]]]:
    """Each project's newest checkpoint and its record, where they can be read: what is damaged
    there, another's, or being replaced, is no fault of this project."""
    for folder in results.iterdir() if results.is_dir() else ():
        if found := Run(folder).checkpoints():
            with suppress(ValueError, OSError):
                yield found[-1], found[-1].read()["run"]
