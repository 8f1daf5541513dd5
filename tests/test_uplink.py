"""Error feedback: what a lossy update leaves out comes with the next one; what left the mask is forgotten."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedlth.errors import StudyError
from fedlth.experiment.resolve import resolve
from fedlth.federation.uplink import Uplink
from fedlth.models.layout import Layout
from fedlth.storage.client_state import ClientState
from fedlth.wire import payload
from fedlth.wire.codec import CODECS, Codec
from fedlth.wire.payload import Content
from fedlth.wire.reference import Reference
from tests import tiny

LAYOUT = tiny.small_layout()
INTS = np.zeros(LAYOUT.num_ints, np.int64)
LOSSY = [c for c in CODECS.values() if c.feedback]


def content(floats: np.ndarray, mask: np.ndarray, layout: Layout = LAYOUT) -> Content:
    kept = floats.astype(np.float32)
    kept[: mask.size][~mask] = 0
    return Content(mask, kept, INTS)


def visit(codec: Codec, state: ClientState, ref: Reference, sent: Content) -> tuple[np.ndarray, ClientState]:
    data, state = Uplink(codec, None, ref).update("values", LAYOUT, sent, state)
    got = payload.decode(data, "values", LAYOUT, codec=codec, reference=ref)
    assert got.floats is not None
    return got.floats, state


@pytest.mark.parametrize("codec", LOSSY, ids=lambda c: c.name)
def test_the_sum_of_what_arrives_follows_the_sum_of_what_was_meant(codec: Codec) -> None:
    rng = np.random.default_rng(0)
    mask = rng.random(LAYOUT.num_prunable) < 0.5
    weights = LAYOUT.num_params
    ref = Reference(rng.normal(size=LAYOUT.num_floats).astype(np.float32) * 0.1)
    alive = np.concatenate((mask, np.ones(LAYOUT.num_floats - mask.size, bool)))
    meant = np.zeros(LAYOUT.num_floats)
    with_, without = meant.copy(), meant.copy()
    state, drift = ClientState(), rng.normal(size=LAYOUT.num_floats) * 1e-3
    for _ in range(20):
        update = drift + rng.normal(size=LAYOUT.num_floats) * 1e-2
        sent = content(ref.floats + update, mask)
        assert sent.floats is not None
        meant += np.where(alive, sent.floats - ref.floats, 0)
        got, state = visit(codec, state, ref, sent)
        with_ += np.where(alive, got - ref.floats, 0)
        got, _ = visit(codec, ClientState(), ref, sent)
        without += np.where(alive, got - ref.floats, 0)
    error, plain = (np.linalg.norm((x - meant)[:weights]) / np.linalg.norm(meant[:weights]) for x in (with_, without))
    assert error < 0.6 * plain


def test_what_left_the_mask_is_forgotten() -> None:
    codec = CODECS["step"]
    rng = np.random.default_rng(1)
    ref = Reference(rng.normal(size=LAYOUT.num_floats).astype(np.float32))
    full = np.ones(LAYOUT.num_prunable, bool)
    update = ref.floats + rng.normal(size=LAYOUT.num_floats) * 0.01
    _, state = visit(codec, ClientState(), ref, content(update, full))
    owed = state.vectors["owed"]
    assert owed.size == LAYOUT.num_floats and np.abs(owed).max() > 0
    half = np.arange(LAYOUT.num_prunable) % 2 == 0
    _, state = visit(codec, state, ref, content(update, half))
    assert state.vectors["owed"].size == LAYOUT.num_floats - int((~half).sum())
    assert np.array_equal(state.masks["owed"], half)
    got, _ = visit(codec, state, ref, content(update, full))
    assert np.isfinite(got).all()


@pytest.mark.parametrize("wire", ["bf16", "f16", *(c.name for c in LOSSY)])
@pytest.mark.parametrize("name", ["fedavg_ft", "lotteryfl", "sub_fedavg", "fedselect"])
def test_studies_over_lossy_codecs_learn_and_send_less(wire: str, name: str, tmp_path: Path) -> None:
    sizes, seen = [], []
    for one in ("lossless", wire):
        tiny.run(tiny.of_method(name, wire=one, federate={"rounds": 4}), tmp_path / one)
        rounds = tiny.rows(tmp_path / one, "rounds")
        assert not any(r["failed"] for r in rounds)
        sizes.append(sum(r["up_bytes"] for r in rounds if r["phase"] == "federate"))
        seen.append(np.mean([r["test_accuracy"] for r in tiny.rows(tmp_path / one, "metrics")]))
    assert sizes[1] < 0.8 * sizes[0]
    assert seen[1] > seen[0] - 0.1


def test_a_lossy_uplink_without_values_is_refused() -> None:
    with pytest.raises(StudyError, match="wire: must not be step for a method that sends no values up, as fedpm"):
        resolve(tiny.of_method("fedpm", wire="step"))
