"""Whose classes can be read from mask bits: an attack that learns from shadow clients, one without, and controls."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedlth.methods.defence import Defence
from fedlth.models.layout import Entry, Layout
from fedlth.privacy.defended import flipped
from fedlth.privacy.ridge import Values, counts, fitted, hits
from fedlth.rng import stream
from fedlth.storage.audit_records import (
    ALL,
    COARSE,
    COMMON,
    HIDDEN,
    NO_AUXILIARY,
    NONE,
    OUTPUT,
    PRIVATE,
    SHUFFLED,
    TENTH,
    Guess,
    Match,
)

SHUFFLES = 20  # of the control: a single one's victims are all wrong, or right, together


@dataclass(frozen=True, eq=False)
class Masks:
    """Some clients' masks under one defence, (clients, num_prunable) bool, whose they are, and their classes."""

    clients: tuple[int, ...]
    bits: np.ndarray
    present: np.ndarray

    def first(self, count: int) -> Masks:
        return Masks(self.clients[:count], self.bits[:count], self.present[:count])


def masks_of(files: Mapping[int, Mapping[str, np.ndarray]], name: str, size: int) -> Masks:
    """Return the masks of this name, of the clients that have one, in order."""
    have = [client for client in sorted(files) if f"mask {name}" in files[client]]
    bits = np.zeros((len(have), size), bool)
    for row, client in zip(bits, have, strict=True):
        row[:] = np.unpackbits(files[client][f"mask {name}"], count=size)
    none = np.zeros((0, 0), bool)
    return Masks(tuple(have), bits, np.array([files[client]["present"] for client in have]) if have else none)


def output_layer(layout: Layout, num_classes: int) -> Entry | None:
    """Return the prunable matrix of the output layer, a row a class; None where there is no such tensor."""
    head = {e.name for e in layout.head}
    return next((e for e in layout.prunable if e.name in head and e.shape[0] == num_classes), None)


def places(layout: Layout, output: Entry | None) -> dict[str, list[slice]]:
    """Return which bits each attack looks at."""
    found = {ALL: [slice(0, layout.num_prunable)]}
    hidden = [e.slice for e in layout.prunable if e is not output]
    if output is not None and hidden:
        found |= {HIDDEN: hidden, OUTPUT: [output.slice]}
    return found


def guesses(
    defence: str, attack: str, shadows: Masks, victims: Masks, seen: Sequence[slice], *,
    labels: Sequence[np.ndarray] = (),
) -> Iterator[Guess]:  # fmt: skip
    """Yield what an attacker who learns from shadows guesses of each victim.

    Each of `labels` takes the place of the shadows' own in a fit of its own.
    """
    if len(shadows.clients) < 3 or not victims.clients:
        return
    among, across = counts(shadows.bits, shadows.bits, seen), counts(victims.bits, shadows.bits, seen)
    for present in labels or (shadows.present,):
        yield from _judged(defence, attack, victims, fitted(among, present.astype(np.float64)).scores(across))


def without_auxiliary(defence: str, victims: Masks, own: np.ndarray, output: Entry) -> Iterator[Guess]:
    """Yield the guesses of an attacker without data: classes by flips of their row against theta_g's own mask."""
    flips = victims.bits[:, output.slice] != own[output.slice]
    rows = flips.reshape(len(victims.clients), output.shape[0], -1).sum(axis=2)
    yield from _judged(defence, NO_AUXILIARY, victims, rows.astype(np.float64))


def _judged(defence: str, attack: str, victims: Masks, scores: Values) -> Iterator[Guess]:
    for client, present, own in zip(victims.clients, victims.present, scores, strict=True):
        true = int(np.count_nonzero(present))
        yield Guess(defence, attack, client, hits(own, present), true, present.size)


def all_guesses(
    shadows: Mapping[int, Mapping[str, np.ndarray]], victims: Mapping[int, Mapping[str, np.ndarray]],
    table: Mapping[str, Defence], *, layout: Layout, common: np.ndarray, seed: int, num_classes: int,
) -> Iterator[Guess]:  # fmt: skip
    """Yield every victim's guesses, defence by defence; shadows are treated by the same defence."""
    size, output = layout.num_prunable, output_layer(layout, num_classes)
    seen = places(layout, output)
    both = {k: seen[k] for k in (ALL, HIDDEN) if k in seen}
    plain, own = masks_of(shadows, NONE, size), masks_of(victims, NONE, size)
    for attack, where in seen.items():
        yield from guesses(NONE, attack, plain, own, where)
    if output is not None:
        yield from without_auxiliary(NONE, own, common, output)
    yield from guesses(NONE, TENTH, plain.first(max(3, math.ceil(len(plain.clients) / 10))), own, seen[ALL])
    draw = stream(seed, "audit/shuffled")
    shuffled = [plain.present[draw.permutation(len(plain.clients))] for _ in range(SHUFFLES)]
    yield from guesses(NONE, SHUFFLED, plain, own, seen[ALL], labels=shuffled)
    for name, defence in table.items():
        pair = treated(plain, defence, name, seed, "shadow"), treated(own, defence, name, seed, "victim")
        for attack, where in both.items():
            yield from guesses(name, attack, *pair, where)
    for name in (COARSE, PRIVATE):
        pair = masks_of(shadows, name, size), masks_of(victims, name, size)
        for attack, where in both.items():
            yield from guesses(name, attack, *pair, where)
    for attack, where in both.items():
        yield from guesses(COMMON, attack, _same(plain, common), _same(own, common), where)


def treated(masks: Masks, defence: Defence, name: str, seed: int, kind: str) -> Masks:
    """Return masks as a defence leaves them, each in its client's own stream."""
    bits = [
        flipped(defence, name, row, seed, kind, client) for client, row in zip(masks.clients, masks.bits, strict=True)
    ]
    return Masks(masks.clients, np.array(bits).reshape(masks.bits.shape), masks.present)


def _same(masks: Masks, common: np.ndarray) -> Masks:
    return Masks(masks.clients, np.broadcast_to(common, masks.bits.shape), masks.present)


def matches(first: Masks, again: Masks) -> Iterator[Match]:
    """Yield how like each client's mask its own second search is, and the most similar mask of another client."""
    if len(first.clients) < 2 or not again.clients:
        return
    whole = [slice(0, first.bits.shape[1])]
    both = counts(again.bits, first.bits, whole)
    either = again.bits.sum(axis=1)[:, None] + first.bits.sum(axis=1)[None, :] - both
    jaccard = both / np.maximum(either, 1)
    for row, client in zip(jaccard, again.clients, strict=True):
        if client in first.clients:
            place = first.clients.index(client)
            yield Match(client, float(row[place]), float(np.delete(row, place).max()), len(row))
