"""The same study over both codecs: equal parameters, metrics and tickets; fewer bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import tiny


def told(out: Path) -> list[dict[str, Any]]:
    """Return the ledger without what a codec may change."""
    coded = ("payload_bytes", "coding", "mask_bytes", "value_bytes")
    return [{k: v for k, v in r.items() if k not in coded} for r in tiny.rows(out, "ledger")]


def compared(folder: Path, name: str, **sections: Any) -> tuple[int, int]:
    """Run one study raw and lossless, check that they tell the same, and return the bytes of each."""
    sizes = []
    for wire in ("raw", "lossless"):
        out = folder / wire
        tiny.run(tiny.of_method(name, wire=wire, **sections), out)
        sizes.append(sum(r["payload_bytes"] for r in tiny.rows(out, "ledger")))
        assert not any(r["failed"] for r in tiny.rows(out, "rounds"))
    raw, lossless = folder / "raw", folder / "lossless"
    assert tiny.digests(raw) == tiny.digests(lossless)
    assert told(raw) == told(lossless)
    assert tiny.rows(raw, "metrics") == tiny.rows(lossless, "metrics")
    return sizes[0], sizes[1]


@pytest.mark.parametrize("name", sorted(tiny.KINDS))
def test_a_study_ends_the_same_over_both_codecs(name: str, tmp_path: Path) -> None:
    raw, lossless = compared(tmp_path, name, federate={"rounds": 3})
    assert lossless < raw or (lossless == raw and name in ("local", "standalone"))


def test_refinement_ends_the_same_over_both_codecs(tmp_path: Path) -> None:
    raw, lossless = compared(tmp_path, "two_step", refine={"rounds": 2, "clients_per_round": 2})
    assert lossless < raw
