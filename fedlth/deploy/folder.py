"""Where things lie in a federation's folder, and files that only their owner can read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template

from fedlth.errors import StudyError

PRIVATE, PRIVATE_FOLDER = 0o600, 0o700


class _Text(Template):
    """A template whose marks mean nothing to a shell, to systemd or to TOML: @@{name}."""

    delimiter = "@@"


@dataclass(frozen=True)
class Folder:
    """The paths of a federation; `root` is absolute."""

    root: Path

    @property
    def authority_key(self) -> Path:
        return self.root / "ca" / "ca.key"

    @property
    def authority(self) -> Path:
        return self.root / "ca" / "ca.crt"

    @property
    def server(self) -> Path:
        """The folder of what SuperLink and gate are started with."""
        return self.root / "server"

    @property
    def trusted(self) -> Path:
        """The authority's certificate as the server's programs read it: `ca` may be kept elsewhere."""
        return self.server / "ca.crt"

    @property
    def server_key(self) -> Path:
        return self.server / "server.key"

    @property
    def server_certificate(self) -> Path:
        return self.server / "server.crt"

    @property
    def flower_config(self) -> Path:
        return self.root / "flower" / "config.toml"

    @property
    def study(self) -> Path:
        return self.root / "app" / "study.yaml"

    def device(self, number: int) -> Path:
        return self.root / f"device-{number}"

    def device_key(self, number: int) -> Path:
        return self.device(number) / "key"

    def device_node(self, number: int) -> Path:
        return self.device(number) / "node.toml"

    def device_public(self, number: int) -> Path:
        """The key that the SuperLink is told of; it stays when the device's folder has gone to the device."""
        return self.root / "keys" / f"device-{number}.pub"

    def write(self, path: Path, data: str | bytes, *, script: bool = False) -> None:
        """Write a new file that only its owner can read, its folders too; `script` may be executed."""
        missing = [one for one in path.parents if not one.exists()]
        for one in reversed(missing):
            one.mkdir(mode=PRIVATE_FOLDER)
        # Never for a moment readable by others: the mode is given when the file is made.
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE_FOLDER if script else PRIVATE)
        with os.fdopen(opened, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)

    def replace(self, path: Path, data: bytes) -> None:
        """Put new contents in place of a file's, whole or not at all."""
        part = path.with_name(f"{path.name}.part")
        part.unlink(missing_ok=True)
        self.write(part, data)
        part.replace(path)


def new_folder(root: Path) -> Folder:
    """Make a federation's folder; raise StudyError where something is there, or where no script could name it."""
    refuse_existing(root)
    folder = Folder(Path(os.path.abspath(root)))
    text = str(folder.root)
    if not text.isprintable() or set(text) & set("\"'\\$`%"):
        raise StudyError(f"deploy init: DIR must have no quotes, %, $ or backslash in its path, got {text!r}")
    folder.root.parent.mkdir(parents=True, exist_ok=True)
    folder.root.mkdir(mode=PRIVATE_FOLDER)
    return folder


def refuse_existing(root: Path) -> None:
    """Raise StudyError where something is there: keys are never overwritten."""
    if root.exists() or root.is_symlink():
        raise StudyError(f"{root}: is there already; give another DIR (keys are never overwritten)")


def filled(name: str, **values: object) -> str:
    """Return a template of this room with its marks replaced; each mark must be given."""
    text = (files("fedlth.deploy") / "templates" / f"{name}.template").read_text(encoding="utf-8")
    return _Text(text).substitute({key: str(value) for key, value in values.items()})
