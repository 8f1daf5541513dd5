"""What `flwr run --run-config` may ask for, and what it is told otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from fedlth.engines.flower_session import run_of
from fedlth.errors import StudyError
from tests import tiny


@pytest.fixture
def app(tmp_path: Path) -> Path:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.yaml").write_text(yaml.safe_dump(tiny.tree()))
    return tmp_path


def asked(app: Path, out: Path | str, overrides: str = "", study: str = "configs/tiny.yaml") -> dict[str, str]:
    return {"study": study, "out": str(out), "overrides": overrides}


def test_the_study_is_read_from_the_app_and_overridden(app: Path) -> None:
    run = run_of(asked(app, app / "run", "seed=7 train.lr=0.5"), app)
    assert run is not None and not run.resume
    assert (run.experiment.study.seed, run.experiment.study.train.lr) == (7, 0.5)


@pytest.mark.parametrize("out", ["", "runs/mine"])
def test_out_must_be_absolute(app: Path, out: str) -> None:
    with pytest.raises(StudyError, match="out must be an absolute folder"):
        run_of(asked(app, out), app)


@pytest.mark.parametrize(("overrides", "said"), [("seeds=[0,1]", "seeds"), ("tune.lr=[0.1,0.2]", "tune.lr")])
def test_what_needs_several_runs_is_refused(app: Path, overrides: str, said: str) -> None:
    with pytest.raises(StudyError, match=said):
        run_of(asked(app, app / "run", overrides), app)


def test_a_missing_study_is_named(app: Path) -> None:
    with pytest.raises(StudyError, match="no such study file"):
        run_of(asked(app, app / "run", study="configs/none.yaml"), app)


def test_a_folder_is_gone_on_with_only_by_its_own_study(app: Path) -> None:
    out = app / "run"
    tiny.run(tiny.study(), out)
    assert run_of(asked(app, out), app) is None  # it has ended
    header = json.loads((out / "header.json").read_bytes())
    (out / "header.json").write_text(json.dumps({**header, "finished": False}))
    run = run_of(asked(app, out), app)
    assert run is not None and run.resume
    with pytest.raises(StudyError, match="another study"):
        run_of(asked(app, out, "seed=1"), app)
