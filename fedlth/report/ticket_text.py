"""A run's tickets in a terminal: which there are, what one holds, how far they overlap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedlth.errors import StudyError, require
from fedlth.report.facts import Facts, SavedTicket
from fedlth.report.overlap import Overlap, overlap
from fedlth.report.tables import Table, aligned
from fedlth.report.units import NOTHING, signed
from fedlth.storage import ticket_file

MOST_IN_MATRIX = 12


def chosen(facts: Facts, clients: Sequence[int]) -> tuple[SavedTicket, ...]:
    """Return the tickets of these clients in this order, all of them where none is named.

    Raises StudyError naming the clients that have none.
    """
    if not facts.tickets:
        why = _on_devices(facts) or f"(method {facts.header.method})"
        raise StudyError(f"{facts.path / 'tickets'}: expected saved tickets, got none {why}")
    held = {saved.client: saved for saved in facts.tickets}
    missing = [client for client in clients if client not in held]
    if missing:
        known = ", ".join(map(str, held))
        raise StudyError(f"{facts.path / 'tickets'}: no ticket of client {missing[0]}; there are those of {known}")
    return tuple(held[client] for client in dict.fromkeys(clients)) or facts.tickets


def _on_devices(facts: Facts) -> str:
    """Return where the tickets of a run are whose clients keep them themselves, "" of any other run."""
    simulated = (facts.path / "devices").exists()  # the states of clients on this machine
    if facts.header.engine != "flower" or simulated or not any(row.ticket for row in facts.metrics):
        return ""
    name = facts.path / "flower-run"
    run = name.read_text(encoding="utf-8").strip() if name.is_file() else "RUN"
    place = f"each device has its own, state/{run}/client-NNNN.safetensors in its folder"
    return f"here: {place}; from Python, load_ticket(FILE) opens one"


def listing(facts: Facts, clients: Sequence[int]) -> str:
    """Return one line a ticket: client, arm, density, hash, label classes, size on disk, file."""
    rows = []
    for saved in chosen(facts, clients):
        labels = facts.header.client_labels
        held = labels[saved.client] if saved.client < len(labels) else []  # real numbers have none
        classes = str(sum(n > 0 for n in held)) if held else NOTHING
        unseen = "yes" if saved.client in facts.header.unseen else "no"
        size = f"{saved.path.stat().st_size:,}"
        name = f"tickets/{saved.path.name}"
        cells = (str(saved.client), saved.arm, saved.ticket, name, f"{saved.density:.4f}", classes, unseen, size)
        rows.append(cells)
    header = ("client", "arm", "ticket", "file", "density", "classes", "unseen", "bytes")
    return aligned(Table("Tickets", header, tuple(rows), left=4)) + "\n"


def shown(facts: Facts, clients: Sequence[int]) -> str:
    """Return what each ticket holds: its metadata, then shape, type, kept weights and density of every tensor.

    Raises StudyError where no client is named.
    """
    return "\n".join(_shown(saved) for saved in named(facts, clients))


def named(facts: Facts, clients: Sequence[int]) -> tuple[SavedTicket, ...]:
    """Return the tickets of these clients; raise StudyError where no client is named, or one has none."""
    if not clients:
        raise StudyError(f"tickets of {facts.path}: expected a client, got none; `tickets ls` lists them")
    return chosen(facts, clients)


def _shown(saved: SavedTicket) -> str:
    tensors, meta = ticket_file.read(saved.path)
    rows, kept_of_all, all_weights = [], 0, 0
    for name, value in sorted(ticket_file.opened(tensors, meta).items()):
        mask = tensors.get(f"{name}_mask")
        kept = value.size if mask is None else int(np.bitwise_count(mask).sum())
        if mask is not None:
            kept_of_all, all_weights = kept_of_all + kept, all_weights + value.size
        shape = " x ".join(map(str, value.shape)) or "scalar"
        density = NOTHING if mask is None else f"{kept / value.size:.4f}"
        rows.append((name, shape, str(value.dtype), f"{value.size:,}", f"{kept:,}", density))
    if all_weights:
        share = f"{kept_of_all / all_weights:.4f}"
        rows.append(("all masked tensors", "", "", f"{all_weights:,}", f"{kept_of_all:,}", share))
    meta.pop("shapes", None)  # the table has them
    told = [f"{saved.path} ({saved.path.stat().st_size:,} B)", *(f"  {key}: {meta[key]}" for key in sorted(meta))]
    header = ("tensor", "shape", "type", "size", "kept", "density")
    return "\n".join(told) + "\n\n" + aligned(Table("Tensors", header, tuple(rows), left=3)) + "\n"


def overlapping(facts: Facts, clients: Sequence[int]) -> str:
    """Return how far tickets overlap: Jaccard over pairs, chance, and whether alike labels mean alike tickets."""
    require("fedlth tickets overlap", "scipy", extra="sim")
    found = overlap(replace(facts, tickets=chosen(facts, clients)))
    if found is None:
        raise StudyError(f"{facts.path}: expected at least two sparse tickets to compare, got fewer")
    pairs = found.pairs(found.jaccard)
    rows = [
        _row("Jaccard of two tickets", pairs),
        _row("chance, equal counts a layer", found.pairs(found.chance)),
        _row("label mass in common", found.pairs(found.similarity)),
    ]
    header = ("over pairs", "mean", "min", "25 %", "median", "75 %", "max")
    parts = [f"{len(found.clients)} tickets, {len(pairs)} pairs, mean density {found.density:.4f}"]
    parts.append(aligned(Table("Overlap", header, tuple(rows))))
    parts.append(f"chance without regard to layers, density / (2 - density): {found.plain_chance:.4f}")
    parts.append(_tested(found))
    if len(found.clients) <= MOST_IN_MATRIX:
        parts.append(aligned(_matrix(found)))
    else:
        parts.append(f"name at most {MOST_IN_MATRIX} clients to see their matrix")
    return "\n\n".join(parts) + "\n"


def _row(name: str, values: np.ndarray) -> tuple[str, ...]:
    by = np.quantile(values, (0, 0.25, 0.5, 0.75, 1))
    return (name, f"{values.mean():.4f}", *(f"{value:.4f}" for value in by))


def _tested(found: Overlap) -> str:
    test = found.test
    if math.isnan(test.correlation):
        return "similar labels, similar tickets: cannot be tested here (fewer than four clients, or all pairs equal)"
    return (
        f"similar labels, similar tickets: Spearman {signed(test.correlation)}, "
        f"one-sided Mantel p = {test.p_value:.4f} ({test.permutations:,} permutations of clients)"
    )


def _matrix(found: Overlap) -> Table:
    header = ("Jaccard", *(str(client) for client in found.clients))
    rows = [
        (str(client), *(f"{value:.3f}" for value in line))
        for client, line in zip(found.clients, found.jaccard, strict=True)
    ]
    return Table("Jaccard index", header, tuple(rows))
