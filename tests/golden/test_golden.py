"""Every method against its golden file: messages exactly; digests where torch, machine and CPU are as recorded."""

from __future__ import annotations

import json

import pytest

from fedlth.methods.table import METHODS
from tests import tiny
from tests.golden.study import HERE, record, where


@pytest.mark.parametrize("name", METHODS)
def test_golden(name: str) -> None:
    golden = json.loads((HERE / f"{name}.json").read_text())
    got = record(name)
    assert got["ledger"] == golden["ledger"]
    assert sorted(got["digests"]["tickets"]) == sorted(golden["digests"]["tickets"])
    if where() == golden["where"]:
        assert got["digests"] == golden["digests"]


def test_every_method_has_a_golden_file_and_the_reverse() -> None:
    assert {p.stem for p in HERE.glob("*.json")} == set(METHODS) == set(tiny.METHODS)
