"""Numbers that a client reports, as bytes whose length does not depend on the numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from fedlth.wire.errors import PayloadError

LONGEST = 1 << 19  # JSON of this size may become 24 times as much in memory: 12 MB


def encode(record: Mapping[str, Any]) -> bytes:
    """Serialise a JSON-able record; floats become fixed-width text.

    With plain JSON the number of digits of a test accuracy would change the bytes: a result would leak into a cost.
    """
    return json.dumps(_fix(record), sort_keys=True, allow_nan=False).encode()


def decode(data: bytes) -> dict[str, Any]:
    """Return the record; raise PayloadError at anything else."""
    if len(data) > LONGEST:
        raise PayloadError(f"metrics of {len(data)} bytes, at most {LONGEST} are read")
    try:
        record = json.loads(data, parse_float=_refused, parse_constant=_refused, object_hook=_unfix)
    except (ValueError, RecursionError) as error:
        raise PayloadError(f"metrics are not JSON: {error}") from error
    if not isinstance(record, dict):
        raise PayloadError("metrics are not a record")
    return record


def _fix(value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, float):
        return {"f": format(value, "+.16e")}
    if isinstance(value, Mapping):
        return {k: _fix(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_fix(v) for v in value]
    return value


def _refused(text: str) -> Any:
    raise ValueError(f"{text[:40]} is not a number of fixed width")


def _unfix(record: dict[str, Any]) -> Any:
    """Return the number that a record stands for, or the record; called from inside out, so that no copy is made."""
    if set(record) != {"f"} or not isinstance(record["f"], str):
        return record
    number = float(record["f"])
    if not math.isfinite(number):
        raise ValueError("a number is not finite")
    return number
