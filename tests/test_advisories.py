"""What CI says of known vulnerabilities: a run that could read no advisory must not look like a clean one."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / ".ci" / "advisories.py"))
CLEAN: dict[str, Any] = {"name": "torch", "version": "2.13.0", "vulns": []}
BAD = {**CLEAN, "vulns": [{"id": "PYSEC-1", "fix_versions": ["2.14.0"]}]}
SKIPPED = {"name": "torch", "skip_reason": "Dependency not found"}


@pytest.mark.parametrize(
    ("found", "code", "line"),
    [
        ([CLEAN], 0, "advisories: none for 1 pinned packages"),
        ([CLEAN, SKIPPED], 0, "advisories: none for 1 pinned packages; 1 could not be checked"),
        ([SKIPPED, BAD], 1, "advisories: torch 2.13.0: PYSEC-1"),
        ([SKIPPED], 0, "advisories: NOT CHECKED, no advisory could be read from here; versions are as pinned"),
        (None, 0, "advisories: NOT CHECKED, no advisory could be read from here; versions are as pinned"),
    ],
)
def test_what_is_said(found: list[dict[str, Any]] | None, code: int, line: str) -> None:
    assert SCRIPT["judged"](None if found is None else {"dependencies": found}) == (code, line)


def test_installed_versions_are_the_pinned() -> None:
    pinned = SCRIPT["pins"]("torch==2.13.0\nPyYAML==6.0.3  # why\natheris==3.0.0; python_version < '3.14'\n\n")
    assert pinned == {"torch": "2.13.0", "pyyaml": "6.0.3", "atheris": "3.0.0"}
    assert SCRIPT["drift"](pinned, {"torch": "2.13.0+cpu", "pyyaml": "6.0.3", "other": "1"}) == []
    assert SCRIPT["drift"](pinned, {"torch": "2.12.0"}) == ["torch: pinned 2.13.0, installed 2.12.0"]
