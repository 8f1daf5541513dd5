"""Exact selection: k survivors of highest score, ties broken by position."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def keep_top(score: np.ndarray, alive: np.ndarray, kept: int) -> np.ndarray:
    """Return a mask (n,) bool with exactly min(kept, alive) True: the highest scores among `alive`.

    Never by threshold: a threshold keeps too few or too many as soon as two scores are equal. Among equal scores
    the first position wins. A score that is not a number raises ValueError.
    """
    if np.isnan(score).any():
        raise ValueError("a score is not a number")
    where = np.flatnonzero(alive)
    kept = min(kept, where.size)
    mask = np.zeros(score.size, bool)
    if kept == 0:
        return mask
    values = score[where]
    cut = np.partition(values, where.size - kept)[where.size - kept]
    above = values > cut
    ties = np.flatnonzero(values == cut)[: kept - int(np.count_nonzero(above))]
    mask[where[above]] = True
    mask[where[ties]] = True
    return mask


def keep_top_each(score: np.ndarray, alive: np.ndarray, place: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Do what keep_top does in many places at once: `place` (n,) numbers each score's, `kept` is the count of each.

    A score that is not a number raises ValueError.
    """
    if np.isnan(score).any():
        raise ValueError("a score is not a number")
    where = np.flatnonzero(alive)
    order = where[np.lexsort((where, -score[where], place[where]))]
    first = np.searchsorted(place[order], place[order], side="left")
    mask = np.zeros(score.size, bool)
    mask[order[np.arange(order.size) - first < kept[place[order]]]] = True
    return mask


def is_tied(score: np.ndarray, keep: Callable[[np.ndarray], np.ndarray]) -> bool:
    """Say whether position alone decided between equal scores: would `keep`, were the last to win, keep others?"""
    last_wins = np.empty(score.size)
    last_wins[np.lexsort((np.arange(score.size), score))] = np.arange(score.size)
    return bool((keep(last_wins) != keep(score)).any())


def apportion(total: int, weights: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Split `total` into integers proportional to `weights`, none above `limits`, summing exactly to `total`.

    Largest remainders get the last units, ties to the first. With total > sum(limits), returns `limits`.
    """
    total = min(total, int(limits.sum()))
    share = np.zeros(len(limits), np.int64)
    open_ = np.ones(len(limits), bool)
    left = total
    while left > 0 and open_.any():
        pool = np.where(open_, np.maximum(weights, 0.0), 0.0)
        if pool.sum() == 0:
            pool = open_.astype(float)
        exact = share + left * pool / pool.sum()
        full = open_ & (exact >= limits)
        if full.any():
            share[full] = limits[full]
            open_ &= ~full
            left = total - int(share.sum())
            continue
        whole = np.floor(exact + 1e-9).astype(np.int64)
        spare = total - int(np.where(open_, whole, share).sum())
        order = np.argsort(-(exact - whole), kind="stable")
        share = np.where(open_, whole, share)
        share[order[open_[order]][:spare]] += 1
        break
    return share
