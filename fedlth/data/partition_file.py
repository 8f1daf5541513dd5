"""A division of a data set as a JSON file: the partition that reads one, and the text that such a file has."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fedlth.data.parts import Parts
from fedlth.errors import StudyError, wrong

KEYS = ("clients", "data_digest", "clients_test", "unseen")
PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class FromFile:
    """Take each client's positions from a JSON file; the parts that it leaves out are drawn as usual.

    sha256: of the file; a study that is run gets it written in, so that a resume with another file is refused.
    """

    path: str
    sha256: str = ""
    by_key: ClassVar[bool] = False

    def __call__(
        self, labels: np.ndarray, keys: np.ndarray | None, num_clients: int, rng: np.random.Generator
    ) -> list[Parts]:
        return self._clients

    def check(self, data_digest: str, own_test: bool) -> None:
        """Raise StudyError where the file is of other data, or its test parts are of another kind."""
        wanted = self._content.get("data_digest")
        if wanted is not None and wanted != data_digest:
            raise StudyError(f"partition: {self.path} is of the data {wanted}, got data with the digest {data_digest}")
        test = self._content.get("clients_test")
        if test is not None and (test == "own") != own_test:
            raise wrong("clients.test", f"{test}, as {self.path} was made with", "own" if own_test else "split")

    @property
    def unseen(self) -> tuple[int, ...] | None:
        """Return the clients held out as unseen, None where the file does not say."""
        given = self._content.get("unseen")
        if given is None:
            return None
        return tuple(int(client) for client in _positions(given, f"{self.path}: unseen"))

    @cached_property
    def _content(self) -> dict[str, Any]:
        try:
            data = Path(self.path).read_bytes()
            found = json.loads(data)
        except (OSError, ValueError, RecursionError) as error:
            raise StudyError(f"partition.path: {self.path} cannot be read as JSON: {error}") from error
        if self.sha256 and hashlib.sha256(data).hexdigest() != self.sha256:
            raise StudyError(f"partition.path: {self.path} must have the sha256 {self.sha256}, got another file")
        if not isinstance(found, dict) or not isinstance(found.get("clients"), list) or not set(found) <= set(KEYS):
            raise StudyError(f"{self.path}: must be an object with a list of clients and at most {', '.join(KEYS)}")
        for key, allowed in (("data_digest", None), ("clients_test", ("own", "split"))):
            if key in found and not (isinstance(found[key], str) and (allowed is None or found[key] in allowed)):
                raise wrong(f"{self.path}: {key}", " or ".join(allowed) if allowed else "text", found[key])
        return found

    @cached_property
    def _clients(self) -> list[Parts]:
        found, own = [], self._content.get("clients_test")
        for client, given in enumerate(self._content["clients"]):
            place = f"{self.path}: clients.{client}"
            parts = {"train": given} if isinstance(given, list) else given
            if not isinstance(parts, dict) or "train" not in parts or not set(parts) <= set(PARTS):
                raise StudyError(f"{place}: must be a list of positions, or an object with train and at most val, test")
            if "test" in parts and own is None:
                raise StudyError(f"{self.path}: clients_test: must be own or split where clients have test parts")
            arrays = {name: _positions(part, f"{place}.{name}") for name, part in parts.items()}
            found.append(Parts(arrays["train"], arrays.get("val"), arrays.get("test"), own != "split"))
        return found


def sha256_of(path: str) -> str:
    """Return the sha256 hex of a file; raise StudyError where it cannot be read."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise StudyError(f"partition.path: {path} cannot be read: {error}") from error


def text_of(
    clients: Sequence[Mapping[str, np.ndarray]], *, unseen: Sequence[int], data_digest: str, own_test: bool
) -> str:
    """Return a division as the text of such a file, one client a line."""
    head = {"data_digest": data_digest, "clients_test": "own" if own_test else "split", "unseen": list(unseen)}
    lines = [json.dumps({name: part.tolist() for name, part in client.items()}) for client in clients]
    return json.dumps(head)[:-1] + ', "clients": [\n' + ",\n".join(lines) + "\n]}\n"


def _positions(given: Any, place: str) -> np.ndarray:
    """Return (n,) int64 positions in sorted order; raise StudyError at anything but different whole numbers."""
    odd = [given] if not isinstance(given, list) else [n for n in given if type(n) is not int or n < 0]
    if odd:
        raise StudyError(f"{place}: must be a list of whole numbers of at least 0, got {odd[0]!r:.60}")
    if any(n >= 2**62 for n in given) or len(set(given)) < len(given):
        raise StudyError(f"{place}: must hold each position once, got one twice or beyond any data")
    return np.sort(np.array(given, np.int64))
