"""How many examples each device has, where the data live there alone (data.own): asked once, before anything trains."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedlth.data.divided import opened
from fedlth.data.own import Here, become, counts_of, here
from fedlth.engines.flower_engine import Back, Transport
from fedlth.engines.flower_keys import anybody
from fedlth.engines.flower_nodes import few
from fedlth.engines.flower_record import BODY, HEAD, Records
from fedlth.engines.flower_versions import VERSIONS
from fedlth.engines.flower_versions import asked as versions
from fedlth.errors import StudyError
from fedlth.study.schema import Study

log = logging.getLogger(__name__)

TOLD_EVERY_S = 10.0
COUNT = "count"  # the record of a query that holds the question
MOST = 1 << 31  # examples of one part: whoever says more does not count
Counts = tuple[tuple[int, int, int], ...]


def settle(client: int, folder: Path | None) -> None:
    """Make this process the device of a client that has a folder of its own; where it has none, leave it as it is."""
    if folder is not None:
        become(Here(client, str(folder)))


def told(question: str) -> str:
    """Answer a server's question: this client's numbers of training, validation and test examples, as JSON.

    The question is JSON of the study's sections on data, partition and clients; nothing else of the data is told.
    Raises StudyError where the data are not what the study says, or where this node has none.
    """
    place = here()
    if place is None:
        raise StudyError("node config: data-dir must name this device's folder, the study's data live with the clients")
    _, splits = opened(question, place)
    return json.dumps([place.client, *counts_of(splits, place.client)])


def question_of(study: Study) -> str:
    """Return what the server asks."""
    return json.dumps(study.model_dump(mode="json", include={"data", "partition", "clients"}), sort_keys=True)


def counted(
    study: Study, transport: Transport, *, wait_s: float, pause: Callable[[], None],
    objection: Callable[[int, int], str] = anybody,
) -> Counts:  # fmt: skip
    """Return every client's counts, asked of all nodes that come within `wait_s`.

    Raises StudyError where a client's node does not come, two nodes serve one client, a node cannot read its data, or
    its key is another client's (`objection`).
    """
    question, wanted = question_of(study), study.clients.count
    waiting: dict[str, int] = {}  # Flower gives an answer once; asked for again, it is an error
    asked: set[int] = set()
    found: dict[int, tuple[int, tuple[int, int, int]]] = {}
    began = said = time.monotonic()
    while len(found) < wanted:
        for node in sorted(set(transport.online()) - asked):
            asked.add(node)
            query: Records = {HEAD: {BODY: ""}, COUNT: {BODY: question}, VERSIONS: versions()}
            waiting[transport.send(query, node=node, kind="query").id] = node
        for back in transport.collect(sorted(waiting)):
            node = waiting.pop(back.id)
            client, counts = _read(back, node, wanted)
            if wrong := objection(node, client):
                raise StudyError(f"flower: node {node} {wrong}")
            if client in found and found[client][0] != node:
                raise StudyError(f"flower: each SuperNode must have its own partition-id, got {client} more than once")
            found[client] = node, counts
        now = time.monotonic()
        missing = sorted(set(range(wanted)) - found.keys())
        if missing and now - began > wait_s:
            raise StudyError(
                f"flower: the data of every client must be counted before the run, got no answer of clients "
                f"{few(missing)} in {wait_s:g} s"
            )
        if missing and now - said > TOLD_EVERY_S:
            known = f"{len(found)} of {wanted}, none yet of clients {few(missing)}"
            log.info(f"waiting for devices to count their examples: {known}")
            said = now
        if missing:
            pause()
    counts_of_all = tuple(found[client][1] for client in range(wanted))
    sizes = [one[0] for one in counts_of_all]
    most = sizes.index(max(sizes))
    log.info(
        f"data of {wanted} devices: {min(sizes)} to {max(sizes)} training examples; client {most} has "
        f"{100 * max(sizes) / sum(sizes):.0f} % of all"
    )
    return counts_of_all


def _read(back: Back, node: int, wanted: int) -> tuple[int, tuple[int, int, int]]:
    """Return a node's client and its counts; raise StudyError with what it says where it has none."""
    if back.records is None:
        raise StudyError(f"flower: node {node}: Flower error {back.code}: {back.reason[-200:]}")
    said: Any = back.records.get(HEAD, {}).get(BODY)
    try:
        client, *counts = json.loads(said)
        fits = all(type(n) is int for n in (client, *counts)) and len(counts) == 3
        if not fits or not 0 <= client < wanted or not 1 <= counts[0] < MOST or not all(0 <= n < MOST for n in counts):
            raise ValueError
    except (TypeError, ValueError, RecursionError):  # not JSON: one line about why there are none
        raise StudyError(f"flower: node {node}: {str(said)[:300]}") from None
    return client, (counts[0], counts[1], counts[2])
