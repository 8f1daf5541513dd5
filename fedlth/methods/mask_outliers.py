"""Which masks of a round lie far from all others: a report on who may have found another task, or made a mask up.

A client's distance is the median of its Jaccard distances (1 - |both| / |either|) to the others. It is an outlier
where it exceeds the median of all by more than FAR robust standard deviations, 1.4826 times the median absolute
deviation, and by more than LEAST: with masks that are nearly alike the deviation is next to nothing. FAR is that of
Iglewicz and Hoaglin (How to Detect and Handle Outliers, 1993). With fewer than ENOUGH masks nobody is one.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

FAR, LEAST, ENOUGH = 3.5, 0.05, 4


def jaccard_distance(one: np.ndarray, other: np.ndarray) -> float:
    """Return 1 - |both| / |either| of two masks (n,) bool; 0 where both are empty."""
    either = int(np.count_nonzero(one | other))
    return 1 - int(np.count_nonzero(one & other)) / either if either else 0.0


def distances(masks: Mapping[int, np.ndarray]) -> dict[int, float]:
    """Return each client's median distance to the others, of two masks (n,) bool at least."""
    clients = list(masks)
    apart = np.zeros((len(clients), len(clients)))
    for i, one in enumerate(clients):
        for j in range(i):
            apart[i, j] = apart[j, i] = jaccard_distance(masks[one], masks[clients[j]])
    return {one: float(np.median(np.delete(apart[i], i))) for i, one in enumerate(clients)}


def outliers(masks: Mapping[int, np.ndarray]) -> dict[int, float]:
    """Return the clients whose masks are outliers with their distances, in the order given."""
    if len(masks) < ENOUGH:
        return {}
    found = distances(masks)
    values = np.array(list(found.values()))
    middle = float(np.median(values))
    most = middle + max(LEAST, FAR * 1.4826 * float(np.median(np.abs(values - middle))))
    return {client: distance for client, distance in found.items() if distance > most}
