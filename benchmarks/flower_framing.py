"""What it costs to carry a payload in a Flower message, by where it lies: python benchmarks/flower_framing.py."""

from __future__ import annotations

import ctypes
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np

from fedlth.engines import flower  # first: it sets Flower's environment
from fedlth.engines.flower_record import PIECE_BYTES

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict  # isort: skip
from flwr.common.serde import message_to_proto
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

SIZES = (1_000, 10_000, 100_000, 300_000, 600_000, 1_000_000, 2_000_000, 5_000_000, 10_000_000, 20_000_000, 50_000_000)
RECEIVERS = (1, 2, 10, 100)
MB = 1e6
HEAD = '{"client": %3d, "messages": [["values", "update", false]], "phase": "federate", "round": 3}' + 2000 * " "
PLACES = ("head", "own", "array", "pieces")


def message(place: str, payload: bytes | None, node: int = 1) -> Message:
    """Return a message with its head, and `payload` in the head, in a record of its own, as an array, or in pieces."""
    head = ConfigRecord({"b": HEAD % node})  # each client's own
    content = RecordDict({"head": head})
    if payload is not None and place == "head":
        head["0"] = payload
    elif payload is not None and place == "own":
        content["p0"] = ConfigRecord({"b": payload})
    elif payload is not None and place == "pieces":
        for start in range(0, len(payload), PIECE_BYTES):
            content[f"p0.{start // PIECE_BYTES}"] = ConfigRecord({"b": payload[start : start + PIECE_BYTES]})
    elif payload is not None:
        content["p0"] = ArrayRecord({"b": Array("uint8", (len(payload),), "fedlth.1", payload)})
    made = Message(content, node, "train")
    made.metadata.created_at = 1.0
    return made


def deflated(made: Message) -> dict[str, bytes]:
    with no_object_id_recompute():
        return {key: part.deflate() for key, part in get_all_nested_objects(made).items()}


def framed(made: Message) -> int:
    return sum(map(len, deflated(made).values())) + get_object_tree(made).ByteSize()


def there_and_back(place: str, payload: bytes) -> tuple[float, float]:
    """Return the CPU seconds of one encoding and one decoding, as Flower's grid does them."""
    made = message(place, payload)
    began = time.process_time()
    objects = deflated(made)
    with no_object_id_recompute():
        top = made.object_id
        get_object_tree(made)
    between = time.process_time()
    got: InflatableObject = inflate_object_from_contents(top, objects)
    assert isinstance(got, Message)
    ended = time.process_time()
    return between - began, ended - between


def memory(work: Callable[[], object]) -> int:
    """Return by how much the resident memory of a process of its own rises at its peak, in bytes."""
    read, write = os.pipe()
    ctypes.CDLL(None).malloc_trim(0)  # or what was freed before would be used again, and not be seen to rise
    child = os.fork()
    if not child:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        work()
        os.write(write, str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with os.fdopen(read) as said:
        return 1024 * int(said.read())


def encoded(place: str, payload: bytes) -> None:
    """Push as Flower's grid does: an object is deflated, sent, and forgotten."""
    made = message(place, payload)
    with no_object_id_recompute():
        objects = get_all_nested_objects(made)
        for key in list(objects):
            objects.pop(key).deflate()


def stored(place: str, payload: bytes, receivers: int) -> int:
    """Return the bytes of the unique objects that a broadcast leaves on the SuperLink."""
    held: dict[str, int] = {}
    for node in range(1, receivers + 1):
        held |= {key: len(part) for key, part in deflated(message(place, payload, node)).items()}
    return sum(held.values())


def main(sizes: tuple[int, ...]) -> None:
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    draw = np.random.default_rng(0)
    bare, bare_proto = framed(message("head", None)), message_to_proto(message("head", None)).ByteSize()
    print(f"flwr {flower_version()}; a message with its head alone: {bare} B deflated + tree, {bare_proto} B proto")
    print("overhead of one payload, in bytes: deflated objects + object tree (proto); objects; largest object\n")
    print(f"{'payload B':>11}  {'place':<6}{'overhead':>9}{'proto':>7}{'objects':>9}{'largest B':>12}", end="")
    print(f"{'enc ms':>9}{'dec ms':>9}{'enc peak':>10}{'dec peak':>10}")
    for size in sizes:
        payload = draw.bytes(size)
        times: dict[str, list[tuple[float, float]]] = {place: [] for place in PLACES}
        for _ in range(7):
            for place in PLACES:
                times[place].append(there_and_back(place, payload))
        for place in PLACES:
            made = message(place, payload)
            objects = deflated(made)
            enc, dec = (1e3 * statistics.median(each) for each in zip(*times[place], strict=True))
            peak = memory(lambda place=place, payload=payload: encoded(place, payload))
            top = made.object_id
            back = memory(lambda top=top, objects=objects: inflate_object_from_contents(top, objects))
            over, proto = framed(made) - bare - size, message_to_proto(made).ByteSize() - bare_proto - size
            print(f"{size:>11,}  {place:<6}{over:>+9}{proto:>+7}{len(objects):>9}", end="")
            print(f"{max(map(len, objects.values())):>12,}{enc:>9.2f}{dec:>9.2f}", end="")
            print(f"{peak / size:>9.1f}x{back / size:>9.1f}x" if size >= MB else f"{'':>10}{'':>10}")
    print("\nenc, dec: CPU, median of 7 interleaved; peak: rise of a process's memory over the payload itself")
    print("\na broadcast to N nodes: bytes of unique objects on the SuperLink\n")
    print(f"{'payload B':>11}  {'place':<6}" + "".join(f"{f'N = {n}':>14}" for n in RECEIVERS))
    for size in (100, 200, 300, 500, 1_000, 100_000, 1_000_000, 10_000_000):
        payload = draw.bytes(size)
        for place in PLACES:
            few = [stored(place, payload, min(n, 3)) for n in RECEIVERS]
            # Each receiver more adds the same, so that 100 copies of a large payload need not be made.
            more = few[2] - few[1]
            line = "".join(f"{s + max(n - 3, 0) * more:>14,}" for n, s in zip(RECEIVERS, few, strict=True))
            print(f"{size:>11,}  {place:<6}{line}")


def flower_version() -> str:
    from importlib.metadata import version

    assert flower.WORKERS
    return version("flwr")


if __name__ == "__main__":
    main(tuple(int(float(word)) for word in sys.argv[1:]) or SIZES)
