"""Model directories: which there are on this machine, and how published ones are downloaded."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path
from typing import TYPE_CHECKING

from fish_speech.files import exclusive, file_digest, shown_path

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.hf_api import RepoSibling

REPOSITORY = Path(__file__).resolve().parents[1]
MODEL_FILES = ("config.json", "model.pth", "tokenizer.tiktoken", "special_tokens.json")
CODEC_PATTERN = "firefly-gan-vq-*.pth"


@dataclass(frozen=True)
class ModelVersion:
    """One entry of the registry, `configs/model/NAME.yaml`.

    `directory` is relative to the repository. `repo_id` and `revision` say where on the hub it is
    published; without them it comes with the repository. `files` maps the name of each file to the
    least number of bytes that a whole copy has.
    """

    name: str
    description: str
    directory: str
    repo_id: str | None
    revision: str | None
    licence: str
    files: dict[str, int]


def model_versions(root: Path = REPOSITORY) -> dict[str, ModelVersion]:
    """The registry of the repository at `root`, by name."""
    from omegaconf import OmegaConf

    schema = OmegaConf.structured(ModelVersion)  # refuses unknown keys and wrong types
    entries = [
        OmegaConf.to_object(OmegaConf.merge(schema, OmegaConf.load(path)))
        for path in sorted((root / "configs" / "model").glob("*.yaml"))
    ]
    return {entry.name: entry for entry in entries}


def find_model(version: str | Path, root: Path = REPOSITORY) -> Path:
    """A complete local model directory: of a registered version, or `version` itself if a path.

    What is missing of a published version is downloaded, with a progress bar; a download that broke
    off goes on where it stopped. The hub's own settings hold (HF_ENDPOINT, HF_HUB_OFFLINE,
    HF_TOKEN). Raises `FileNotFoundError` or `ValueError` that says what is missing and what to do.
    """
    directory, entry = directory_of(version, root), model_versions(root).get(str(version))
    if entry is not None and (missing := _missing_files(entry, directory)):
        if entry.repo_id is None:
            raise FileNotFoundError(
                f"{shown_path(directory)} lacks {', '.join(missing)}; it is part of the"
                f" repository: 'git checkout -- {entry.directory}' brings it back"
            )
        with exclusive(directory, f"{shown_path(directory)}, being downloaded,"):
            _download(entry, directory)
    check_model_dir(directory)
    return directory


def directory_of(version: str | Path, root: Path = REPOSITORY) -> Path:
    """Where the model directory of `find_model` is, or would be after a download.

    Raises `FileNotFoundError` for a path at which nothing is.
    """
    versions = model_versions(root)
    if (entry := versions.get(str(version))) is not None:
        return root / entry.directory
    if not Path(version).exists():
        merged = Path("checkpoints", f"{Path(version).name.removesuffix('-merged')}-merged")
        hint = f"; there is {merged}" if (root / merged).is_dir() else ""
        raise FileNotFoundError(
            f"{version}: neither a model version ({', '.join(versions)}) nor a model directory"
            + hint
        )
    return Path(version)


def local_model(version: str, root: Path = REPOSITORY) -> Path | None:
    """The directory of a registered version where all of it is there already, else None."""
    entry = model_versions(root)[version]
    directory = root / entry.directory
    return None if _missing_files(entry, directory) else directory


def local_model_dirs(root: Path = REPOSITORY) -> list[tuple[Path, str]]:
    """The model directories on this machine and a description of each, the preferred first.

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
    found = [(file.parent, f"trained voice of {_modified_at(file)}") for file in merged]
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


def _modified_at(file: Path) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(file.stat().st_mtime))


def check_model_dir(path: str | Path) -> None:
    """Check that `path` is a complete model directory: the four model files and one codec.

    Raises `FileNotFoundError` that names what is missing, or `ValueError` where `path` is something
    else (a file, a run whose adapter is not merged yet), each with what to do about it.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such model directory")
    if path.is_file():
        _raise_for_file(path)
    missing = [name for name in MODEL_FILES if not _has_bytes(path / name, 1)]
    if not _codecs(path):
        missing.append(f"the codec {CODEC_PATTERN}")
    if missing:
        _raise_if_unmerged(path)
        project = path.resolve().name.removesuffix("-merged")
        merged = project != path.resolve().name
        remedy = (
            f"merge it again (finetune_tts.py --project {project} --merge-weights)" if merged
            else "copy that from where it came from; the published model is downloaded by its "
            "version, 1.5"
        )  # fmt: skip
        raise FileNotFoundError(
            f"{path}: not a complete model directory, it lacks {', '.join(missing)}; {remedy}"
        )
    find_codec(path)


def find_codec(model_dir: str | Path) -> Path:
    """The one codec file of a model directory. Raises `FileNotFoundError` or `ValueError`."""
    codecs = _codecs(Path(model_dir))
    if not codecs:
        raise FileNotFoundError(f"{model_dir}: no codec ({CODEC_PATTERN}) in the model directory")
    if len(codecs) > 1:
        names = ", ".join(codec.name for codec in codecs)
        raise ValueError(
            f"{model_dir}: more than one codec ({names}); keep the one that the model was trained"
            " with"
        )
    return codecs[0]


def _codecs(model_dir: Path) -> list[Path]:
    return [codec for codec in sorted(model_dir.glob(CODEC_PATTERN)) if _has_bytes(codec, 1)]


def _raise_for_file(path: Path) -> None:
    if path.suffix == ".ckpt":
        _raise_if_unmerged(path.parent)
    what = "the codec alone" if path.match(CODEC_PATTERN) else "a file"
    raise ValueError(f"{path}: {what}, not a model directory; give the folder, {path.parent}")


def _raise_if_unmerged(folder: Path) -> None:
    """Raise where `folder` is a run, or the checkpoints of one: adapters without their base."""
    inner = folder / "checkpoints"
    checkpoints = inner if any(inner.glob("*.ckpt")) else folder
    if any(checkpoints.glob("*.ckpt")):
        checkpoints = checkpoints.resolve()
        project = checkpoints.parent.name if checkpoints.name == "checkpoints" else "PROJECT"
        raise ValueError(
            f"{folder}: LoRA checkpoints that are not merged into a model yet; merge them with"
            f" 'finetune_tts.py --project {project} --merge-weights' and give the folder that it"
            f" writes, checkpoints/{project}-merged"
        )


def _missing_files(entry: ModelVersion, directory: Path) -> list[str]:
    return [
        name
        for name, min_bytes in entry.files.items()
        if not _has_bytes(directory / name, min_bytes)
    ]


def _has_bytes(path: Path, min_bytes: int) -> bool:
    return path.is_file() and path.stat().st_size >= min_bytes


def _download(entry: ModelVersion, directory: Path) -> None:
    """Download every file of `entry` that is not complete yet to `directory`, and verify it."""
    from huggingface_hub import HfApi, constants

    with _errors_translated(entry, directory):
        info = HfApi().model_info(
            entry.repo_id,
            revision=entry.revision,
            files_metadata=True,
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
        )
    published = {file.rfilename: file for file in info.siblings or [] if file.size is not None}
    if unknown := [name for name in entry.files if name not in published]:
        raise ValueError(
            f"{constants.ENDPOINT}/{entry.repo_id} does not list {', '.join(unknown)} with a size"
        )
    wanted = [
        published[name]
        for name in entry.files
        if not (directory / name).is_file()
        or (directory / name).stat().st_size != published[name].size
    ]
    _check_space(wanted, directory)
    for file in wanted:
        # All files come from one commit, even when the hub moves on in the middle.
        with _errors_translated(entry, directory):
            _fetch(entry.repo_id, info.sha, file, directory)


def _partial_path(file: RepoSibling, directory: Path) -> Path:
    """The path of an incomplete download; it depends on the file's content, not only its name."""
    content = file.lfs.sha256 if file.lfs else file.blob_id
    return directory / f"{file.rfilename}.{content[:16]}.incomplete"


def _check_space(wanted: list[RepoSibling], directory: Path) -> None:
    partials = [_partial_path(file, directory) for file in wanted]
    downloaded = sum(path.stat().st_size for path in partials if path.exists())
    needed = sum(file.size for file in wanted) - downloaded
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise ValueError(
            f"{shown_path(directory)}: the download needs {needed / 1e9:.1f} GB, the disk has"
            f" {free / 1e9:.1f} GB free; make room and start again"
        )


def _fetch(repo_id: str, commit: str, file: RepoSibling, directory: Path) -> None:
    """Download one file beside its place, going on from what is there; verify it, then rename it.

    `hf_hub_download` starts from the first byte in every process, which hurts at 1.3 GB, so this
    drives the layer below it, which does the requests, the retries and the progress bar.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    partial = _partial_path(file, directory)
    if partial.exists() and partial.stat().st_size > file.size:
        partial.unlink()
    # Positions in a compressed answer would not be positions in the file.
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    with partial.open("ab") as output:
        if output.tell() < file.size:
            http_get(
                hf_hub_url(repo_id, file.rfilename, revision=commit),
                output,
                resume_size=output.tell(),
                headers=headers,
                displayed_filename=file.rfilename,
            )
        output.flush()
        os.fsync(output.fileno())
    size = partial.stat().st_size
    digest = file.lfs and file_digest(partial)
    if size != file.size or (file.lfs and digest != file.lfs.sha256):
        partial.unlink()
        reason = "content" if size == file.size else f"size, {size} bytes instead of {file.size}"
        raise ValueError(
            f"{file.rfilename}: the download has the wrong {reason}; it was removed, start again"
        )
    os.replace(partial, directory / file.rfilename)
    for outdated in directory.glob(f"{file.rfilename}.*.incomplete"):
        outdated.unlink()


@contextmanager
def _errors_translated(entry: ModelVersion, directory: Path) -> Iterator[None]:
    """Translate errors of the hub and the network to ones that say what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    try:
        yield
    except HfHubHTTPError as error:
        raise ValueError(_http_error_message(entry, error)) from error
    except OfflineModeIsEnabled as error:
        raise FileNotFoundError(
            _offline_message(entry, directory, "HF_HUB_OFFLINE is set")
        ) from error
    except HTTPError as error:  # the client's own: no connection, timeout, broken off for good
        raise FileNotFoundError(_offline_message(entry, directory, str(error))) from error
    except JSONDecodeError as error:
        raise ValueError(
            f"{constants.ENDPOINT} does not answer like a hub; is HF_ENDPOINT right, and does the"
            " network ask for a login first?"
        ) from error


def _http_error_message(entry: ModelVersion, error: HfHubHTTPError) -> str:
    """A line for an HTTP error of the hub, with what to do about it."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError

    page = f"{constants.ENDPOINT}/{entry.repo_id}"
    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        return f"{page} asks for consent: give it there, then 'hf auth login' or set HF_TOKEN"
    if status in (401, 403):
        return (
            f"{page} refuses access ({status}): it is private, gone, or your token is not valid;"
            " 'hf auth login' or set HF_TOKEN"
        )
    if status == 404:
        return f"{page} was not found (404) at revision {entry.revision}; is HF_ENDPOINT right?"
    return f"{page} answered with status {status}; start again later, what is there is kept"


def _offline_message(entry: ModelVersion, directory: Path, reason: str) -> str:
    from huggingface_hub import constants

    missing, where = _missing_files(entry, directory), shown_path(directory)
    page = f"{constants.ENDPOINT}/{entry.repo_id}"
    return (
        f"model {entry.name} is not complete in {where} and the hub cannot be reached ({reason}).\n"
        "With a network, the same command goes on with the download and keeps what is there. Or"
        f" download {', '.join(missing)} elsewhere, from {page}, and put that into {where}:\n"
        f"  hf download {entry.repo_id} {' '.join(missing)} --local-dir {where}\n"
        "The version tiny needs no download: --model-version tiny to train it, --model-path tiny to"
        " speak with it."
    )
