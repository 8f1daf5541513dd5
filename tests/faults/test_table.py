"""The table of faults names tests that exist, and says of every fault whether it has any."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

from tests.faults.table import ROWS, SURVIVED, Outcomes, Row, lines

ROOT = Path(__file__).parents[2]


@cache
def defined(file: str) -> frozenset[str]:
    """Return the tests of a file, those of a class behind its name; nothing is imported for it."""
    tree = ast.parse((ROOT / file).read_text())
    found = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{one.name}" for one in node.body if isinstance(one, ast.FunctionDef)}
    return frozenset(found)


def test_every_test_that_a_row_names_is_there() -> None:
    for row in ROWS:
        for test in row.tests:
            file, _, name = test.partition("::")
            assert name.partition("[")[0] in defined(file), test


def test_every_fault_has_a_test_or_says_that_it_has_none() -> None:
    assert [row.number for row in ROWS] == list(range(1, 26))
    for row in ROWS:
        assert row.tests or row.gap.startswith("not covered: "), row.number
        assert len(row.fault) <= 53, "or the table's columns do not stand"


def test_the_figures_are_those_of_the_run() -> None:
    row = Row(number=1, fault="a fault", tests=("a::b", "a::c"), lost="a visit")
    outcomes = Outcomes({"a::b[1]": True, "a::b[2]": True, "a::c": True, "a::cd": False}, {"a::b[1]": 1.5, "a::c": 1})
    table = list(lines((row, Row(number=2, fault="another", gap="not covered: why")), outcomes))
    assert table[1].split() == ["1", "a", "fault", "3/3", SURVIVED, "2.5", "a", "visit"]
    assert "not covered" in table[2] and "1 of 2 faults have tests; of 3 injections 3 ended" in table[4]
    outcomes.passed["a::b[2]"] = False
    assert "2/3" in list(lines((row,), outcomes))[1] and "FAILED" in list(lines((row,), outcomes))[1]
    assert "did not run" in list(lines((row,), Outcomes()))[1]
