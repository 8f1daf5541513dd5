"""Whom a SuperNode's key stands for: a device says itself which client it serves, and its key must agree."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedlth.errors import StudyError

FILE = re.compile(r"device-([0-9]+)\.pub")


def owners_in(folder: Path) -> dict[bytes, int]:
    """Return client by public key (PEM, as Flower has it) of a folder with device-K.pub, as `fedlth deploy init` has.

    Raises StudyError naming a file that is no key, and where two clients have one key.
    """
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

    found: dict[bytes, int] = {}
    named = {path: match for path in sorted(folder.glob("*.pub")) if (match := FILE.fullmatch(path.name))}
    if not named:
        raise StudyError(f"{folder}: must hold each device's public key, device-0.pub and so on, got none")
    for path, match in named.items():
        try:
            public = load_ssh_public_key(path.read_bytes())
            pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        except Exception as error:  # of a library that raises many kinds
            raise StudyError(f"{path}: must be a public key in OpenSSH's form, got {error}") from error
        client = int(match[1])
        if pem in found:
            raise StudyError(f"{path}: is the key of client {found[pem]} too")
        found[pem] = client
    return found


def anybody(node: int, client: int) -> str:
    """Object to nobody: without known keys a node is whom it says."""
    return ""


@dataclass
class Identity:
    """Says what is wrong with a node that says whom it serves, "" for nothing.

    `owners`: client by public key. `keys`: every node's public key now, as Flower knows it from the node's signature.
    """

    owners: Mapping[bytes, int]
    keys: Callable[[], Mapping[int, bytes]]
    _known: dict[int, bytes] = field(default_factory=dict)

    def __call__(self, node: int, client: int) -> str:
        if node not in self._known:
            self._known = dict(self.keys())
        owner = self.owners.get(self._known.get(node, b""))
        if owner is None:
            return f"says that it serves client {client}, with a key that is no device's"
        return "" if owner == client else f"says that it serves client {client}, with the key of client {owner}"
