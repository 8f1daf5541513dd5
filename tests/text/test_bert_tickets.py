"""configs/bert_tickets.yaml in small: from rounds or without, stopped between two tasks and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedlth.engines.inprocess import InProcess
from fedlth.federation import session
from fedlth.federation.rounds import Federation
from tests import tiny
from tests.test_server_state import Stopped, stop
from tests.text.sentences import IN_ROUNDS, bert_tickets

pytest.importorskip("transformers")
ARMS = {"dense", "ticket", "init_mask", "random", "shuffled_values"}


@pytest.mark.parametrize("sections", [{}, IN_ROUNDS], ids=["without rounds", "after a round"])
def test_the_study_resumes_task_by_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any]
) -> None:
    made = bert_tickets(tmp_path, **sections)
    tiny.run(made, tmp_path / "whole")
    rows = tiny.rows(tmp_path / "whole", "metrics")
    assert {row["arm"] for row in rows} == ARMS
    assert {row["client"] for row in rows if row["arm"] == "ticket"} == set(range(5))
    assert len(list((tmp_path / "whole" / "tickets").glob("*.safetensors"))) == 5
    with monkeypatch.context() as patch:
        patch.setattr(Federation, "run", lambda loop: stop(loop, 2))
        with pytest.raises(Stopped):
            tiny.run(made, tmp_path / "stopped")
    assert 0 < len({row["client"] for row in tiny.rows(tmp_path / "stopped", "metrics")}) < 5
    session.resume(tmp_path / "stopped", InProcess())
    assert tiny.facts(tmp_path / "stopped") == tiny.facts(tmp_path / "whole")
