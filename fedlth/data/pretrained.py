"""Where pre-trained models and tokenizers lie on this machine: a folder, an installed package, the hub's cache."""

from __future__ import annotations

import json
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from fedlth.errors import StudyError, require

EXTRA = "text"


def folder_of(place: str, *, path: str | None = None, package: str | None = None, hub: str | None = None) -> Path:
    """Return the folder of a model: `path` itself, that inside an installed `package`, or the cached one of a `hub` id.

    Nothing is ever downloaded. Raises StudyError naming the place where it is not there, and what puts it there.
    """
    given = {name: value for name, value in (("path", path), ("package", package), ("hub", hub)) if value is not None}
    if len(given) != 1 or not all(isinstance(value, str) and value for value in given.values()):
        raise StudyError(f"{place}: must have one of path, package and hub, got {given or 'none'}")
    if path is not None:
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise StudyError(f"{place}.path: must be a folder, got {path!r}")
        return folder
    return _of_package(place, package) if package is not None else _cached(place, str(hub))


def _of_package(place: str, package: str) -> Path:
    """Return the folder nearest to the top of a distribution whose config.json is that of a model."""
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError as error:
        raise StudyError(f"{place}.package: {package!r} is not installed: pip install {package}") from error
    configs = sorted((file for file in files if file.name == "config.json"), key=lambda file: (len(file.parts), file))
    for file in configs:
        found = Path(str(file.locate()))
        if "model_type" in config_in(place, found.parent):
            return found.parent
    raise StudyError(f"{place}.package: {package} must hold a model's config.json, got none with a model_type")


def config_in(place: str, folder: Path) -> dict[str, Any]:
    """Return what a folder's config.json says."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StudyError(f"{place}: {folder} must hold a model's config.json, got {error}") from error
    if not isinstance(found, dict):
        raise StudyError(f"{place}: {folder / 'config.json'} must hold an object, got {type(found).__name__}")
    return found


def _cached(place: str, hub: str) -> Path:
    require(f"{place}.hub", "huggingface_hub", extra=EXTRA)
    library: Any = import_module("huggingface_hub")
    try:
        return Path(library.snapshot_download(hub, local_files_only=True))
    except (OSError, ValueError) as error:  # not there, or no id at all
        raise StudyError(
            f"{place}.hub: {hub!r} must be in the Hugging Face cache of this machine, got nothing of that name; fedlth "
            f"never downloads: run `hf download {hub}` once"
        ) from error
