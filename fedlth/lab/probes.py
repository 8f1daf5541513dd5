"""The table of probes: what else a lottery study can measure, each a frozen part called with the bench of a seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from fedlth.lab.bench import Bench


class Probe(Protocol):
    def __call__(self, bench: Bench, /) -> Iterator[dict[str, Any]]:
        """Yield rows of JSON values."""
        ...


PROBES: dict[str, Callable[..., Probe]] = {}
