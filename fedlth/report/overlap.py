"""How alike the clients' tickets are: against chance, and against how alike the clients' labels are."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedlth.errors import StudyError
from fedlth.report.facts import Facts, SavedTicket
from fedlth.rng import stream
from fedlth.storage.header import Header
from fedlth.storage.ticket_file import is_mask, read

PERMUTATIONS = 9_999
MOST_CLIENTS = 200  # pairs grow with their square: of more, this many are drawn
Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Masks:
    """The bit-packed masks of K clients: one (K, bytes) uint8 array a layer, and the layer's size in weights."""

    clients: tuple[int, ...]
    packed: dict[str, NDArray[np.uint8]]
    sizes: dict[str, int]

    def kept(self) -> dict[str, NDArray[np.int64]]:
        """Return the alive weights of each client, (K,) a layer."""
        return {name: np.bitwise_count(rows).sum(axis=1, dtype=np.int64) for name, rows in self.packed.items()}


def read_masks(facts: Facts) -> Masks:
    """Return the masks of every saved ticket; raises StudyError where a file's layers differ from the first one's.

    Where clients have tasks of their own, of the layers that all their networks have.
    """
    rows: dict[str, list[NDArray[np.uint8]]] = {}
    sizes = {layer.name: layer.size for layer in facts.header.shared_layers}
    for saved in facts.tickets:
        tensors, _ = read(saved.path)
        found = {name.removesuffix("_mask"): value for name, value in tensors.items() if is_mask(name, value)}
        if facts.header.tasks:
            found = {name: value for name, value in found.items() if name in sizes}
        if rows and found.keys() != rows.keys():
            odd = sorted(found.keys() ^ rows.keys())
            raise StudyError(f"{saved.path}: expected the masks of the other tickets, got a difference in {odd}")
        for name, value in sorted(found.items()):
            sizes.setdefault(name, math.prod(tensors[name].shape) if name in tensors else 8 * value.size)
            if value.size != math.ceil(sizes[name] / 8):
                wanted = f"{math.ceil(sizes[name] / 8)} bytes for {sizes[name]} weights"
                raise StudyError(f"{saved.path}: {name}_mask: expected {wanted}, got {value.size}")
            rows.setdefault(name, []).append(value.reshape(-1).astype(np.uint8, copy=False))
    packed = {name: np.stack(values) for name, values in rows.items()}
    return Masks(tuple(saved.client for saved in facts.tickets), packed, {name: sizes[name] for name in packed})


def jaccard(masks: Masks) -> Matrix:
    """Return |A and B| / |A or B| of every pair of tickets, (K, K); two empty tickets count as equal."""
    num = len(masks.clients)
    common = np.zeros((num, num))
    for rows in masks.packed.values():
        for client in range(num):  # one row at a time: (K, K, bytes) at once would not fit for a large model
            common[client] += np.bitwise_count(rows & rows[client]).sum(axis=1, dtype=np.int64)
    kept = np.diag(common)
    union = kept[:, None] + kept[None, :] - common
    return np.divide(common, union, out=np.ones_like(common), where=union > 0)


def chance(masks: Masks) -> Matrix:
    """Return the Jaccard index expected of random tickets with the same kept count in every layer, (K, K).

    The ratio of expected intersection and expected union; both are sums over many weights, so the ratio's own
    bias is far below a thousandth. Fairer than density / (2 - density): tickets that agree only on which layers
    to prune hardest already overlap more than that.
    """
    num = len(masks.clients)
    common, kept = np.zeros((num, num)), np.zeros(num)
    for name, count in masks.kept().items():
        common += np.outer(count, count) / masks.sizes[name]
        kept += count
    union = kept[:, None] + kept[None, :] - common
    return np.divide(common, union, out=np.ones_like(common), where=union > 0)


def label_similarity(counts: NDArray[np.int64]) -> Matrix:
    """Return 1 - total variation distance of the clients' label shares, (K, K), from counts (K, classes).

    It reads as the share of label mass that two clients have in common: 1 equal, 0 no class in common.
    """
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return np.stack([np.minimum(shares, row).sum(axis=1) for row in shares])


@dataclass(frozen=True)
class Mantel:
    """Spearman correlation of two similarity matrices and its one-sided permutation p; nan where undefined."""

    correlation: float
    p_value: float
    permutations: int


def mantel(overlap: Matrix, similarity: Matrix, *, permutations: int = PERMUTATIONS) -> Mantel:
    """Test whether pairs that are more alike in `similarity` overlap more; both (K, K) symmetric.

    Pairs share clients, so they are not independent: identities are permuted, never pairs (Mantel, Cancer
    Research 1967). p = (1 + permutations at least as correlated) / (1 + permutations).
    """
    from scipy.stats import rankdata

    num = len(overlap)
    above = np.triu_indices(num, 1)
    if num < 4 or np.ptp(overlap[above]) == 0 or np.ptp(similarity[above]) == 0:
        return Mantel(float("nan"), float("nan"), 0)

    def ranks(matrix: Matrix) -> Matrix:
        # rounded, so that a tie stays a tie when sums were taken in another order
        found = rankdata(np.round(matrix[above], 12))
        found = (found - found.mean()) / found.std()
        square = np.zeros((num, num))
        square[above] = found
        return square + square.T

    ours, theirs = ranks(overlap), ranks(similarity)
    rng = stream(0, "report/mantel")
    observed = float(np.mean(ours[above] * theirs[above]))
    target = ours[above]
    count = 0
    for _ in range(permutations):
        order = rng.permutation(num)
        count += float(target @ theirs[order[above[0]], order[above[1]]]) / len(target) >= observed - 1e-12
    return Mantel(observed, (1 + count) / (1 + permutations), permutations)


@dataclass(frozen=True)
class Overlap:
    """All of it for one run: (K, K) matrices over `clients`, density a layer and client, and the test.

    `saved` is how many tickets there are; of more than MOST_CLIENTS that many were drawn.
    """

    clients: tuple[int, ...]
    saved: int
    jaccard: Matrix
    chance: Matrix
    similarity: Matrix
    layer_density: dict[str, NDArray[np.float64]]
    density: float
    test: Mantel

    def pairs(self, matrix: Matrix) -> NDArray[np.float64]:
        """Return the entries above the diagonal, one a pair of clients."""
        return matrix[np.triu_indices(len(self.clients), 1)]

    @property
    def plain_chance(self) -> float:
        """Return density / (2 - density): chance without regard to layers."""
        return self.density / (2 - self.density)


def overlap(facts: Facts) -> Overlap | None:
    """Return the overlap of a run's saved tickets, or None where fewer than two were saved, or none is sparse."""
    if len(facts.tickets) < 2 or not facts.header.client_labels:
        return None
    masks = read_masks(replace(facts, tickets=_drawn(facts.tickets)))
    if not masks.packed or all((count == masks.sizes[name]).all() for name, count in masks.kept().items()):
        return None  # dense models have no mask to compare
    shared = jaccard(masks)
    alike = label_similarity(_labels(facts.header)[list(masks.clients)])
    kept = masks.kept()
    total = sum(masks.sizes.values())
    order = [layer.name for layer in facts.header.layers if layer.name in kept] or sorted(kept)
    return Overlap(
        clients=masks.clients,
        saved=len(facts.tickets),
        jaccard=shared,
        chance=chance(masks),
        similarity=alike,
        layer_density={name: kept[name] / masks.sizes[name] for name in order},
        density=float(np.mean(np.sum(list(kept.values()), axis=0)) / total),
        test=mantel(shared, alike),
    )


def _labels(header: Header) -> NDArray[np.int64]:
    """Return the counts of each client's labels, (clients, labels): equal labels of two tasks are different ones.

    A client whose targets are real numbers has none.
    """
    if not header.tasks:
        return np.array(header.client_labels)
    begins = np.cumsum([0, *(task.num_classes for task in header.tasks)])
    found = np.zeros((len(header.client_labels), begins[-1]), np.int64)
    for task, begin in zip(header.tasks, begins, strict=False):
        for client in task.clients:
            labels = header.client_labels[client]
            found[client, begin : begin + len(labels)] = labels
    return found


def _drawn(tickets: tuple[SavedTicket, ...]) -> tuple[SavedTicket, ...]:
    if len(tickets) <= MOST_CLIENTS:
        return tickets
    picked = stream(0, "report/overlap").choice(len(tickets), MOST_CLIENTS, replace=False)
    return tuple(tickets[i] for i in sorted(picked))
