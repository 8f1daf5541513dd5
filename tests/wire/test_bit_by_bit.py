"""Masks and steps coded bit by bit: exact, one form only, the same bytes with and without a compiler."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlth.models.layout import Entry, Layout
from fedlth.wire import mask_bits, payload, step_bits
from fedlth.wire.codec import CODED, LOSSLESS, LOSSY_SIGN, LOSSY_STEP, ON_MASK, SIGN, STEP
from fedlth.wire.errors import PayloadError
from fedlth.wire.payload import Content
from fedlth.wire.reference import Reference
from tests.wire.golden_payloads import HERE, LAYOUT, SIZE, cases, encoded, pseudo

ODD = np.array([0, 1, -1, 23, 24, -24, 25, -1000, 2**30, -(2**30), 31, 0, 7, -7])


@given(st.integers(0, 1000), st.floats(0, 1), st.floats(0, 1), st.booleans(), st.booleans())
def test_a_mask_comes_back(seed: int, density: float, moved: float, knows: bool, holds: bool) -> None:
    draw = np.random.default_rng(seed)
    mask, floats = draw.random(SIZE) < density, draw.normal(size=SIZE).astype(np.float32)
    args = (LAYOUT.prunable, mask ^ (draw.random(SIZE) < moved) if knows else None, floats if holds else None)
    data = mask_bits.encode(mask, *args, 4 * SIZE)
    assert data is not None
    np.testing.assert_array_equal(mask_bits.decode(data, SIZE, *args), mask)
    with pytest.raises(PayloadError, match="end"):
        mask_bits.decode(data + b"\0", SIZE, *args)
    try:
        other = mask_bits.decode(data + b"\1", SIZE, *args)
    except PayloadError:
        pass
    else:
        assert holds or mask_bits.encode(other, *args, 4 * SIZE) == data + b"\1", "one form only, but for the centres"
    assert mask_bits.encode(mask, *args, 3) is None or len(data) <= 3


@given(st.lists(st.one_of(st.integers(-40, 40), st.sampled_from(ODD.tolist())), max_size=200))
def test_steps_come_back(numbers: list[int]) -> None:
    steps, kept = np.array(numbers, np.int64), np.zeros(LAYOUT.num_floats, bool)
    kept[np.linspace(0, kept.size - 1, steps.size).astype(int)] = True
    data = step_bits.encode(steps, kept, LAYOUT.floats, 10_000)
    assert data is not None
    np.testing.assert_array_equal(step_bits.decode(data, kept, LAYOUT.floats), steps)


def test_without_a_compiler_the_bytes_are_the_same() -> None:
    code = (
        "import importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'numba' else find(name, *a)\n"
        "from fedlth.kernel import late_jit as jit\n"
        "assert not jit.COMPILED\n"
        "from tests.wire.golden_payloads import HERE, cases, encoded\n"
        "from tests.wire.test_golden_payloads import test_both_decoders_read_it as read\n"
        "for name in cases():\n"
        "    assert encoded(name) == (HERE / f'{name}.bin').read_bytes(), name\n"
        "    read(name)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=200)


@pytest.mark.parametrize("name", cases())
def test_the_golden_payloads_are_written_again(name: str) -> None:
    assert encoded(name) == (HERE / f"{name}.bin").read_bytes()


HELD = Reference(pseudo(1, LAYOUT.num_floats))


def sent(scale: float = 0.03) -> Content:
    floats = HELD.floats + np.float32(scale) * pseudo(2, LAYOUT.num_floats)
    mask = np.abs(floats[:SIZE]) > 0.75
    floats[:SIZE][~mask] = 0
    return Content(mask, floats, np.array([11]))


def test_signs_move_each_tensor_by_its_mean() -> None:
    content = sent()
    content.floats[1470] = -0.0
    data = payload.encode("values", LAYOUT, content, codec=LOSSY_SIGN, reference=HELD)
    assert data[7] == SIGN
    got = payload.decode(data, "values", LAYOUT, codec=LOSSY_SIGN, reference=HELD)
    places = np.concatenate((content.mask, np.ones(LAYOUT.num_floats - SIZE, bool)))
    for e in LAYOUT.floats:
        if e.role != "param":
            np.testing.assert_array_equal(got.floats[e.slice], content.floats[e.slice])
            continue
        here = np.flatnonzero(places[e.slice]) + e.offset
        delta = content.floats[here].astype(np.float64) - HELD.floats[here]
        want = HELD.floats[here] + np.where(delta >= 0, 1, -1) * np.float64(np.float32(np.abs(delta).mean()))
        np.testing.assert_array_equal(got.floats[here].view(np.uint32), want.astype(np.float32).view(np.uint32))


@pytest.mark.parametrize("scale", [0.0, 1e-30, 0.03, 1e6])
def test_steps_lose_at_most_three_percent(scale: float) -> None:
    content = sent(scale)
    data = payload.encode("values", LAYOUT, content, codec=LOSSY_STEP, reference=HELD)
    got = payload.decode(data, "values", LAYOUT, codec=LOSSY_STEP, reference=HELD)
    places = np.concatenate((content.mask, np.ones(LAYOUT.num_params - SIZE, bool), np.zeros(6, bool)))
    delta = np.linalg.norm((content.floats - HELD.floats)[places].astype(np.float64))
    assert np.linalg.norm(got.floats - content.floats) <= 0.0301 * delta
    assert data[7] == STEP


@pytest.mark.parametrize("codec", [LOSSLESS, LOSSY_STEP, LOSSY_SIGN])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(codec: object, bad: float) -> None:
    content = sent()
    content.floats[1475] = bad
    data = payload.encode("values", LAYOUT, content, codec=codec, reference=HELD)
    with pytest.raises(PayloadError):
        payload.decode(data, "values", LAYOUT, codec=codec, reference=HELD)


@pytest.mark.parametrize("share", [0.01, 0.02, 0.05])
def test_random_changes_cost_little_above_the_floor(share: float) -> None:
    layout = Layout((Entry("a", (120, 400), "param", 0, prunable=True), Entry("b", (100, 30), "param", 48_000,
                     prunable=True)))  # fmt: skip
    draw, n, k = np.random.default_rng(0), 51_000, 10_200
    known = np.zeros(n, bool)
    known[draw.choice(n, k, replace=False)] = True
    moved, mask = round(share * k), known.copy()
    mask[draw.choice(np.flatnonzero(known), moved, replace=False)] = False
    mask[draw.choice(np.flatnonzero(~known), moved, replace=False)] = True
    floor = (math.log2(math.comb(k, moved)) + math.log2(math.comb(n - k, moved))) / 8
    data = payload.encode("mask", layout, Content(mask, None, None), codec=LOSSLESS, known_mask=known)
    assert data[6] == CODED + ON_MASK and len(data) <= 1.005 * floor + 40
