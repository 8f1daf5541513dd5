"""From a name and options to a part; every mistake names its place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlth.errors import StudyError
from fedlth.study.parts import make
from fedlth.tickets.evidence import Evidence
from fedlth.tickets.schedule import SCHEDULES, Shrink
from fedlth.tickets.score import SCORES


@dataclass(frozen=True)
class Cubed:
    """A user's own score."""

    scale: float = 1.0
    tags: tuple[str, ...] = ()

    def __call__(self, evidence: Evidence, /) -> np.ndarray:
        return np.abs(evidence.now) ** 3 * self.scale


def test_a_users_own_class() -> None:
    spec = {"name": "tests.laws.test_parts:Cubed", "scale": 2, "tags": ["a", "b"]}
    part = make(SCORES, spec, "finder.score")
    assert type(part).__name__ == "Cubed" and part.scale == 2 and part.tags == ("a", "b")


def test_a_module_beside_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "beside_the_study.py").write_text("class Mine:\n    pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert type(make(SCORES, {"name": "beside_the_study:Mine"}, "finder.score")).__name__ == "Mine"


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({}, r"finder\.schedule\.name: required"),
        ({"name": 3}, r"finder\.schedule\.name: required"),
        ({"name": "shrnk"}, r"finder\.schedule\.name: must be one of .*shrink.* got 'shrnk'"),
        ({"name": "shrink", "rat": 0.1}, r"finder\.schedule\.rat: shrink has no such option; it takes rate"),
        ({"name": "shrink", "rate": "x"}, r"finder\.schedule\.rate: must be float, got 'x'"),
        ({"name": "shrink", "rate": True}, r"finder\.schedule\.rate: must be float, got True"),
        ({"name": "iterative", "rounds": 1.5}, r"finder\.schedule\.rounds: must be int, got 1\.5"),
        ({"name": "one_shot", "rate": 0.1}, r"takes no options"),
        ({"name": "no.such:Thing"}, r"finder\.schedule: cannot import 'no\.such:Thing'"),
        ({"name": "tests.laws.test_parts:Nothing"}, r"finder\.schedule: cannot import"),
        ({"name": "tests.laws.test_parts:needy"}, r"finder\.schedule\.what: required by"),
        (
            {"name": "tests.laws.test_parts:picky", "what": 1},
            r"finder\.schedule: .* refuses its options: .*odd numbers",
        ),
        ({"name": "tests.broken_module:Thing"}, r"finder\.schedule: cannot import .* two lines"),
    ],
)
def test_every_mistake_names_its_place_in_one_line(spec: dict[str, Any], says: str) -> None:
    with pytest.raises(StudyError, match=says) as caught:
        make(SCHEDULES, spec, "finder.schedule")
    assert "\n" not in str(caught.value)


def needy(what: int) -> Shrink:
    return Shrink()


def picky(what: int) -> Shrink:
    raise ValueError("odd numbers\nare not liked")
