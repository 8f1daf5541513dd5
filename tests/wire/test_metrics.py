"""Numbers a client reports: they survive, and their bytes do not depend on them."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlth.wire import metrics
from fedlth.wire.errors import PayloadError

# Results are float32 arithmetic: two digits of exponent hold them all.
NUMBERS = st.floats(-1e90, 1e90).filter(lambda x: x == 0 or abs(x) > 1e-90)
RECORDS = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | NUMBERS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=4), RECORDS, max_size=4))
def test_a_round_trip_keeps_values_and_types(record: dict[str, Any]) -> None:
    got = metrics.decode(metrics.encode(record))
    assert got == record and repr(sorted(got)) == repr(sorted(record))


@given(NUMBERS, NUMBERS)
def test_the_length_does_not_depend_on_the_numbers(a: float, b: float) -> None:
    def record(x: float, y: float) -> dict[str, Any]:
        return {"rows": [{"test_accuracy": x, "test_loss": y, "layer_density": {"w": x}}]}

    assert (
        len(metrics.encode(record(a, b))) == len(metrics.encode(record(b, a))) == len(metrics.encode(record(0.0, 0.5)))
    )


@pytest.mark.parametrize(
    "data",
    [
        b"", b"[]", b"1", b"nonsense", b"\xff\xfe", b"[" * 100_000, b" " * (metrics.LONGEST + 1), b'{"a": NaN}',
        b'{"a": Infinity}', b'{"a": 1e999}', b'{"a": 0.5}', b'{"a": {"f": "nan"}}', b'{"a": {"f": "inf"}}',
        b'{"a": {"f": "x"}}', b'{"a": ' + b"1" * 5000 + b"}",
    ],
)  # fmt: skip
def test_refused(data: bytes) -> None:
    with pytest.raises(PayloadError):
        metrics.decode(data)


def test_a_record_that_looks_like_a_number_is_a_record() -> None:
    for record in ({"a": {"f": 1}}, {"a": {"f": [1]}}, {"f": {"f": 0.5}}):
        assert metrics.decode(metrics.encode(record)) == record


@given(st.binary(max_size=60))
def test_noise(data: bytes) -> None:
    with contextlib.suppress(PayloadError):
        assert isinstance(metrics.decode(data), dict)
