"""Where two runs differ in their facts; times, placement, engine and framing stand apart from equality."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedlth.storage import ticket_file
from fedlth.storage.json_lines import read_lines, read_object

# What may differ between equal runs: where they ran, on what, and how the transport framed a message.
APART = {"header.json": {"engine", "versions", "commit"}, "ledger.jsonl": {"framed_bytes"}}
DATA = {"client_labels", "data_digest", "partition_digest"}  # what a server of data that live with the clients lacks
ROWS = ("ledger.jsonl", "rounds.jsonl", "metrics.jsonl", "curve.jsonl")
OBJECTS = ("header.json", "digests.json")
SHOWN = 3


def _same(one: Any, other: Any) -> bool:
    # dumps, so that nan equals nan, 1 differs from 1.0 and true from 1, and floats count to the last bit
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _fields(place: str, one: dict[str, Any], other: dict[str, Any], *, apart: set[str]) -> list[str]:
    found = []
    for key in sorted((one.keys() | other.keys()) - apart):
        if key not in one or key not in other:
            found.append(f"{place}: {key} is only in the {'first' if key in one else 'second'}")
        elif not _same(one[key], other[key]):
            if isinstance(one[key], dict) and isinstance(other[key], dict):
                found += _fields(f"{place}: {key}", one[key], other[key], apart=set())
            else:
                found.append(f"{place}: {key}: {_short(one[key])} / {_short(other[key])}")
    return found


def _shortened(found: list[str], name: str) -> list[str]:
    more = len(found) - SHOWN
    return found if more <= 0 else [*found[:SHOWN], f"{name}: and {more} more"]


def _rows(name: str, run_a: Path, run_b: Path) -> list[str]:
    ours, theirs = (read_lines(run / name)[0] for run in (run_a, run_b))
    found: list[str] = []
    if len(ours) != len(theirs):
        found.append(f"{name}: {len(ours)} rows / {len(theirs)} rows")
    for number, (one, other) in enumerate(zip(ours, theirs, strict=False), start=1):
        if _same(one, other):
            continue
        found += _fields(f"{name}:{number}", one, other, apart=APART.get(name, set()))
    return found


def _saved(run: Path) -> dict[str, Any]:
    """Return the digests of a run's tickets by client, none where the run has no such file yet."""
    path = run / "digests.json"
    found = read_object(path).get("tickets", {}) if path.exists() else {}
    return found if isinstance(found, dict) else {}


def away(run: Path, other: Path) -> set[str]:
    """Return the clients whose ticket `other` names and `run` does not, because it stays on the client's device.

    Only over Flower do clients keep their states. A device's mask is compared all the same, by its name in the metrics.
    """
    if read_object(run / "header.json").get("engine") != "flower":
        return set()
    return _saved(other).keys() - _saved(run).keys()


def _counts_alone(run: Path) -> bool:
    """Say whether a run's server knew no class of an example, since they are on devices (data.own).

    Real targets have no classes anywhere: that none are told is not enough.
    """
    header = read_object(run / "header.json")
    if header.get("engine") != "flower" or any(header.get("client_labels", [[0]])):
        return False
    data = _study(run).get("data")
    return isinstance(data, dict) and data.get("own") is not None


def _other_data(one: Path, two: Path) -> set[str]:
    """Return what of two headers says nothing, since one server has data that the other has not."""
    return DATA if _counts_alone(one) != _counts_alone(two) else set()


def notes(run_a: Path, run_b: Path) -> list[str]:
    """Return what `diff` could not compare, and why."""
    found = []
    for one, two in _pairs(run_a, run_b):
        for run, gone in ((one, away(one, two)), (two, away(two, one))):
            if gone:
                found.append(f"{run}: {len(gone)} tickets stay on their devices; compared were their masks' names")
        if _other_data(one, two):
            run = one if _counts_alone(one) else two
            found.append(f"{run}: the server knows how many examples each client has, not which")
        for run in (one, two):
            if _kept_none(run):
                found.append(f"{run}: keeps no ticket files (tickets: none); compared were their digests")
    return found


def _files(run: Path) -> set[str]:
    return {path.name for path in (run / "tickets").glob("*.safetensors")}


def _kept_none(run: Path) -> bool:
    """Say whether the study asked for no ticket files (`tickets: none`); their digests are there."""
    return _study(run).get("tickets") == "none"


def _study(run: Path) -> dict[str, Any]:
    """Return a run's config as it was written, empty where it is none."""
    import yaml

    path = run / "config.yaml"
    found = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None
    return found if isinstance(found, dict) else {}


def _tickets(run_a: Path, run_b: Path) -> list[str]:
    names = [_files(run) for run in (run_a, run_b)]
    found = []
    for here, run, other, place in ((0, run_b, run_a, "first"), (1, run_a, run_b, "second")):
        gone = {f"client-{int(client):04d}.safetensors" for client in away(run, other)}
        one_sided = set() if _kept_none(run) else names[here] - names[1 - here] - gone
        found += [f"tickets/{name}: only in the {place}" for name in sorted(one_sided)]
    for name in sorted(names[0] & names[1]):
        one, other = run_a / "tickets" / name, run_b / "tickets" / name
        if one.read_bytes() == other.read_bytes():
            continue
        found += _fields(f"tickets/{name}", _content(one), _content(other), apart=set())
    return found


def _content(path: Path) -> dict[str, Any]:
    # by tensor, so that two files that only lay the same tensors out in another order are equal
    from hashlib import sha256

    tensors, meta = ticket_file.read(path)
    found = {
        name: [str(tensor.dtype), list(tensor.shape), sha256(tensor.tobytes()).hexdigest()[:16]]
        for name, tensor in tensors.items()
    }
    return {**found, "metadata": meta}


def _without(digests: dict[str, Any], clients: set[str]) -> dict[str, Any]:
    if not clients:
        return digests
    return {**digests, "tickets": {c: digest for c, digest in digests.get("tickets", {}).items() if c not in clients}}


def _seeds(run_a: Path, run_b: Path) -> list[list[str]]:
    """Return the names of the runs in each of two folders of seeds; [] where either is a run itself."""
    seeds = [sorted(inner.parent.name for inner in run.glob("*/header.json")) for run in (run_a, run_b)]
    return seeds if all(seeds) and not any((run / "header.json").exists() for run in (run_a, run_b)) else []


def _pairs(run_a: Path, run_b: Path) -> list[tuple[Path, Path]]:
    seeds = _seeds(run_a, run_b)
    if not seeds:
        return [(run_a, run_b)]
    return [(run_a / name, run_b / name) for name in seeds[0] if name in seeds[1]]


def diff(run_a: Path, run_b: Path) -> list[str]:
    """Return where two run folders (or folders of seeds) differ, a few lines a file; empty means equal.

    Compared: header but engine, versions and commit; ledger but framed_bytes; rounds; metrics; curve; the tensors and
    metadata of every ticket that both have; digests.json (final parameters). Apart: times.jsonl, config.yaml, the
    report, tickets that stay on devices, and what says which data one of the servers did not have (`notes` tells).
    Raises StudyError where a folder is not a run or a file is corrupt.
    """
    seeds = _seeds(run_a, run_b)
    if seeds:
        if seeds[0] != seeds[1]:
            return [f"runs: {', '.join(seeds[0])} / {', '.join(seeds[1])}"]
        return [f"{name}/{line}" for name in seeds[0] for line in diff(run_a / name, run_b / name)]
    found: list[str] = []
    for name in OBJECTS:
        present = [(run / name).exists() for run in (run_a, run_b)]
        if name != "header.json" and not all(present):  # a header is what makes a folder a run: never optional
            if any(present):
                found.append(f"{name}: only in the {'first' if present[0] else 'second'}")
            continue
        ours, theirs = (read_object(run / name) for run in (run_a, run_b))
        if name == "digests.json":
            gone = away(run_a, run_b) | away(run_b, run_a)
            ours, theirs = (_without(one, gone) for one in (ours, theirs))
        apart = APART.get(name, set()) | (_other_data(run_a, run_b) if name == "header.json" else set())
        found += _shortened(_fields(name, ours, theirs, apart=apart), name)
    for name in ROWS:
        found += _shortened(_rows(name, run_a, run_b), name)
    return found + _shortened(_tickets(run_a, run_b), "tickets")
