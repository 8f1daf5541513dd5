"""Bytes and speed of the wire against their limits, and against other containers: python benchmarks/wire.py.

Masks: 450 SGD steps (lr 0.05, batch 32) on the embedded Fashion-MNIST slice, then 30 steps on two classes; a mask keeps
the largest weights of all tensors with two axes or more. The share of kept weights that moved is printed: a limit on
masks with a reference means little without it. "Section" is the mask section alone, "payload" all bytes with header.
zstd comes from the package zstandard, where it is installed.
"""

from __future__ import annotations

import io
import math
import time
import tracemalloc
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import torch

from fedlth.data.embedded import fashion_slice
from fedlth.models.layout import Layout, layout_of
from fedlth.models.registry import build
from fedlth.wire import payload, varint
from fedlth.wire.codec import LOSSLESS, LOSSY_SIGN, LOSSY_STEP
from fedlth.wire.payload import Content
from fedlth.wire.reference import Reference

DENSITIES = (0.5, 0.2, 0.1, 0.05)


def flat(model: torch.nn.Module, layout: Layout) -> np.ndarray:
    state = dict(model.named_parameters())
    return np.concatenate([state[e.name].detach().numpy().ravel() for e in layout.floats]).astype(np.float32)


def steps(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, count: int, draw: np.random.Generator) -> None:
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(count):
        part = torch.from_numpy(draw.integers(0, len(y), 32))
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(x[part]), y[part]).backward()
        optimiser.step()


def top(weights: np.ndarray, size: int, density: float) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[np.argsort(-np.abs(weights[:size]), kind="stable")[: round(density * size)]] = True
    return mask


def bound(mask: np.ndarray, layout: Layout) -> float:
    """Return the i.i.d. reference: the sum over layers of n H(k / n), in bytes."""
    total = 0.0
    for e in layout.prunable:
        p = float(mask[e.slice].mean())
        if 0 < p < 1:
            total -= e.size * (p * np.log2(p) + (1 - p) * np.log2(1 - p)) / 8
    return total


def together(works: list[Callable[[], object]], times: int = 7) -> list[float]:
    """Return each one's best of a few, run in turn: a busy machine only ever adds, and adds to all."""
    best = [float("inf")] * len(works)
    for _ in range(times):
        for i, work in enumerate(works):
            began = time.perf_counter()
            work()
            best[i] = min(best[i], time.perf_counter() - began)
    return best


def peak(work: Callable[[], object]) -> float:
    """Return the most bytes that numpy and Python held at once."""
    tracemalloc.start()
    work()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most


def said(name: str, value: float, limit: float | None = None, *, least: bool = False) -> None:
    verdict = ""
    if limit is not None:
        good = value >= limit if least else value <= limit
        verdict = f"  wanted {'>=' if least else '<='} {limit:<7g} {'ok' if good else 'MISSED'}"
    print(f"  {name:<52} {value:10.4f}{verdict}", flush=True)


def log2_choose(n: int, k: int) -> float:
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)


def section(data: bytes) -> int:
    return varint.get(data, 24, len(data))[0]


def header(data: bytes) -> int:
    mask, at = varint.get(data, 24, len(data))
    values, _ = varint.get(data, at, len(data))
    return len(data) - mask - values


def random_changes(layout: Layout, known: np.ndarray) -> None:
    kept, others, draw = np.flatnonzero(known), np.flatnonzero(~known), np.random.default_rng(0)
    for share in (0.01, 0.02, 0.05):
        moved, mask = round(share * kept.size), known.copy()
        mask[draw.choice(kept, moved, replace=False)] = False
        mask[draw.choice(others, moved, replace=False)] = True
        floor = (log2_choose(kept.size, moved) + log2_choose(others.size, moved)) / 8
        data = payload.encode("values", layout, Content(mask, None, None), codec=LOSSLESS, known_mask=known)
        said(f"{share:.0%} of kept moved at random: payload (floor {floor:,.0f})", len(data), 1.01 * floor + 40)


def others(content: Content, layout: Layout, kept: int) -> None:
    dense, raw = 4 * layout.num_floats, content.floats.tobytes()
    said("beside it: COO int32 + float32 / dense", (8 * kept + dense - 4 * layout.num_prunable) / dense)
    box = io.BytesIO()
    np.savez_compressed(box, content.floats)
    said("beside it: npz / dense", len(box.getvalue()) / dense)
    if find_spec("zstandard"):
        import zstandard

        said("beside it: zstd-3 of the masked floats / dense", len(zstandard.ZstdCompressor(3).compress(raw)) / dense)
    if find_spec("flwr"):
        from flwr.common import ArrayRecord
        from flwr.common.serde import array_record_to_proto

        record = ArrayRecord([content.floats[e.slice].reshape(e.shape) for e in layout.floats])
        said("beside it: Flower's ArrayRecord / dense", array_record_to_proto(record).ByteSize() / dense)


def speed(content: Content, layout: Layout, whole: np.ndarray, holds: dict, *, wanted: bool) -> None:
    dense = 4 * layout.num_floats
    data = payload.encode("values", layout, content, codec=LOSSLESS, **holds)
    works = [
        lambda: payload.encode("values", layout, content, codec=LOSSLESS, **holds),
        lambda: payload.decode(data, "values", layout, codec=LOSSLESS, **holds),
    ]
    for work in works:
        work()
    if find_spec("zstandard"):
        import zstandard

        for raw in (whole.tobytes(), content.floats.tobytes()):
            packed = zstandard.ZstdCompressor(3).compress(raw)
            works.append(lambda raw=raw: zstandard.ZstdCompressor(3).compress(raw))
            works.append(lambda packed=packed: zstandard.ZstdDecompressor().decompress(packed))
    took = together(works)
    for i, way in enumerate(("encode", "decode")):
        said(f"{way}, MB/s of dense", dense / took[i] / 1e6)
        if len(took) > 2:
            said(
                f"{way} / zstd-3 of the dense floats",
                took[2 + i] / took[i],
                (0.35, 0.3)[i] if wanted else None,
                least=True,
            )
            said(f"{way} / zstd-3 of the masked floats", took[4 + i] / took[i])
        said(f"{way}, peak MB held by numpy and Python", peak(works[i]) / 1e6,
             (4 * dense + 16 * 2**20) / 1e6 if i else None)  # fmt: skip


def model_table(name: str) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    data, draw = fashion_slice(), np.random.default_rng(0)
    x = torch.from_numpy(data.x_train.astype(np.float32) / 255 - 0.3)
    y = torch.from_numpy(data.y_train)
    model = build(name, input_shape=(1, 28, 28), num_classes=10, options={})
    layout = layout_of(model, [n for n, p in model.named_parameters() if p.ndim > 1])
    size, cnn = layout.num_prunable, name == "leaf_cnn"
    steps(model, x, y, 450, draw)
    start = flat(model, layout)
    two = torch.isin(y, torch.tensor([0, 1]))
    steps(model, x[two], y[two], 30, draw)
    end, ints, dense = flat(model, layout), np.zeros(0, np.int64), 4 * layout.num_floats
    held = Reference(start)
    held.digest  # noqa: B018 - made once a broadcast, however many clients refer to it
    print(f"{name}: {layout.num_floats:,} parameters, {dense:,} bytes dense")
    for density in DENSITIES:
        known, mask = top(start, size, density), top(end, size, density)
        places = np.concatenate((mask, np.ones(end.size - size, bool)))
        content = Content(mask, np.where(places, end, 0).astype(np.float32), ints)
        bare, iid, holds = Content(mask, None, None), bound(mask, layout), {"known_mask": known, "reference": held}
        print(f" density {density}: i.i.d. reference {iid:,.0f} B; {np.sum(known & ~mask) / known.sum():.1%} moved")
        first = payload.encode("values", layout, bare, codec=LOSSLESS)
        said(f"first mask (mode {first[6]}): section / i.i.d.", section(first) / iid, 1.001 if cnn else 1.006)
        whole = payload.encode("values", layout, bare, codec=LOSSLESS, **holds)
        said(f"mask with reference (mode {whole[6]}): section / i.i.d.", section(whole) / iid, 0.10 if cnn else 0.16)
        said("  whole payload / i.i.d.", len(whole) / iid)
        previous = payload.encode("values", layout, bare, codec=LOSSLESS, known_mask=known)
        said(f"previous mask only (mode {previous[6]}): section / i.i.d.", section(previous) / iid)
        up = payload.encode("values", layout, content, codec=LOSSLESS, **holds)
        said("lossless uplink / dense", len(up) / dense, {0.2: 0.125, 0.05: 0.035}.get(density) if cnn else None)
        said("header, bytes", header(up), 36)
        for codec in (LOSSY_STEP, LOSSY_SIGN):
            sent = payload.encode("values", layout, content, codec=codec, **holds)
            got = payload.decode(sent, "values", layout, codec=codec, **holds)
            error = np.linalg.norm((got.floats - end)[places]) / np.linalg.norm((end - start)[places])
            exact = codec is LOSSY_STEP
            said(f"{codec.name} uplink / dense", len(sent) / dense, 0.02 if cnn and exact and density == 0.2 else None)
            said("  its error / update", float(error), 0.03 if exact else None)
        if density == 0.2:
            random_changes(layout, known)
        others(content, layout, int(mask.sum()))
        speed(content, layout, end, holds, wanted=cnn)


if __name__ == "__main__":
    for model in ("lenet5", "leaf_cnn"):
        model_table(model)
