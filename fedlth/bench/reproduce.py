"""fedlth reproduce: a published row under its own protocol, and ours beside it, honest and as the protocol selects."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from fedlth import api
from fedlth.errors import StudyError
from fedlth.experiment.resolve import read
from fedlth.report.tables import Table, aligned
from fedlth.storage.records import CurveRow, MetricRow
from fedlth.storage.run_folder import RunFolder
from fedlth.study import schema

log = logging.getLogger(__name__)

ROWS = Path(__file__).parent / "rows"
Over = Literal["examples", "clients"]
Selects = Literal["none", "round", "client_rounds"]
CURVE_POINTS = 100  # at most so many evaluations, where the protocol selects a round by test data


@dataclass(frozen=True, kw_only=True)
class Row:
    """One published figure and the study that gives ours.

    `paper` is its accuracy in percent, None for a row that the table lacks; `over` says whether all test examples
    count alike or all clients; `selects` what the protocol chooses by test data: nothing, the best round, or each
    client's best round. `seed_keys` are the study's keys that a seed sets; `arm` is the model whose row is read.
    """

    name: str
    source: str
    study: Mapping[str, Any]
    arm: str
    over: Over
    seed_keys: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    paper: float | None = None
    paper_seeds: int = 1
    selects: Selects = "none"
    not_matched: tuple[str, ...] = field(default=())

    def of_seed(self, seed: int, out: Path, given: Sequence[str] = ()) -> schema.Study:
        """Return the study of one seed; `given` are the user's own overrides, which come last."""
        # No arm changes another's result, and a row is of one.
        arms = f"personalise.arms=[{self.arm}]"
        sets = [arms, *self.overrides, *(f"{key}={seed}" for key in self.seed_keys), f"out={out}"]
        study = self._study([*sets, *given])
        if self.selects == "none" or study.evaluate.every:
            return study
        return self._study([*sets, f"evaluate.every={-(-study.federate.rounds // CURVE_POINTS)}", *given])

    def _study(self, overrides: Sequence[str]) -> schema.Study:
        tree = copy.deepcopy(dict(self.study))
        for one in overrides:
            schema.override(tree, one)
        return schema.build(tree, f"reproduce {self.name}")


@dataclass(frozen=True)
class Ours:
    """What one seed gave, in percent: `honest` the last round's model, `selected` as the protocol chooses by test."""

    honest: float
    selected: float | None


def rows() -> dict[str, Row]:
    """Return every published row by name."""
    found: dict[str, Row] = {}
    for file in sorted(ROWS.glob("*.yaml")):
        told = yaml.safe_load(file.read_text())
        for name, row in told.pop("rows").items():
            of = {**{k: v for k, v in told.items() if k not in ("seed_keys", "not_matched")}, **row}
            of["overrides"] = tuple(of.pop("with", ()))
            found[name] = Row(
                name=name, seed_keys=tuple(told["seed_keys"]), not_matched=tuple(told["not_matched"]), **of
            )  # fmt: skip
    return found


def row_of(name: str) -> Row:
    """Return a row by its name; raise StudyError where there is none."""
    known = rows()
    if name not in known:
        raise StudyError(f"reproduce: must be one of {', '.join(known)}, got {name!r}")
    return known[name]


def listing() -> str:
    """Return the table of rows."""
    lines = [
        (r.name, "none" if r.paper is None else f"{r.paper:.2f}", _selection(r), r.source) for r in rows().values()
    ]
    header = ("row", "paper %", "the figure is", "source")
    return aligned(Table("Published rows", header, tuple(lines), left=1))


def run(row: Row, seeds: int, out: Path, given: Sequence[str] = ()) -> list[Ours]:
    """Run what is not there of a row's seeds, and return what each gave."""
    found = []
    for seed in range(seeds):
        folder = out / row.name / f"seed-{seed}"
        study = row.of_seed(seed, folder, given)
        log.info(f"{row.name}: seed {seed} of {seeds}")
        if (folder / "config.yaml").exists():
            _check_same(folder, study)
            api.resume(folder)
        else:
            api.run(study)
        found.append(judged(row, folder))
    return found


def _check_same(folder: Path, study: schema.Study) -> None:
    """Raise StudyError where a folder holds the run of another study: its figure would stand for this one."""
    old, study = RunFolder(folder).study(), read(study)[0].study  # a run's config has what its method decides, too
    for part in ("method", "data", "partition", "clients", "model", "train", "federate", "evaluate", "seed"):
        if getattr(old, part) != getattr(study, part):
            raise StudyError(f"{folder}: its run has another `{part}` than is asked for now; give another --out")


def judged(row: Row, folder: Path) -> Ours:
    """Return what a finished run gave under a row's protocol."""
    run = RunFolder(folder)
    honest = _mean(row.over, [r for r in run.rows(MetricRow) if r.arm == row.arm])
    if row.selects == "none":
        return Ours(honest, None)
    return Ours(honest, selected(row, [r for r in run.rows(CurveRow) if r.arm == row.arm]))


def selected(row: Row, curve: Sequence[CurveRow]) -> float:
    """Return the figure of the round, or of each client's round, that test data choose; an earlier one of equals."""
    tested = [r for r in curve if r.num_test]
    if row.selects == "client_rounds":
        best: dict[int, CurveRow] = {}
        for r in tested:
            kept = best.get(r.client)
            if kept is None or (r.test_accuracy or 0.0) > (kept.test_accuracy or 0.0):
                best[r.client] = r
        return _mean(row.over, list(best.values()))
    rounds: dict[tuple[str, int], list[CurveRow]] = {}
    for r in tested:
        rounds.setdefault((r.phase, r.round), []).append(r)
    return max(_mean(row.over, of) for of in rounds.values())


def _mean(over: Over, of: Sequence[MetricRow | CurveRow]) -> float:
    """Return the mean accuracy in percent; raise StudyError where nothing was tested."""
    tested = [(r.test_accuracy, r.num_test) for r in of if r.test_accuracy is not None]
    if not tested:
        raise StudyError("reproduce: no client has a test accuracy of the row's arm")
    accuracy, sizes = zip(*tested, strict=True)
    return 100 * float(np.average(accuracy, weights=sizes if over == "examples" else None))


def text(row: Row, ours: Sequence[Ours], given: Sequence[str] = ()) -> str:
    """Return what is printed of a row: paper, ours, difference, the honest figure too, and what is not matched."""
    lines = [f"{row.name}: {row.source}", ""]
    header = ("figure", "paper %", "ours %", "difference, points", "seeds")
    honest = [one.honest for one in ours]
    selected = [one.selected for one in ours if one.selected is not None]
    told = [("honest: the last round", *_against(row.paper, honest))]
    if selected:
        told.insert(0, (f"as published: {_selection(row)}", *_against(row.paper, selected)))
        told.append(
            ("selection on test data adds", "", f"{np.mean(selected) - np.mean(honest):+.2f}", "", len(selected))
        )
    lines.append(aligned(Table("", header, tuple(tuple(map(str, one)) for one in told), left=1)).strip("\n"))
    lines += ["", f"theirs: {row.paper_seeds} seed{'s' * (row.paper_seeds > 1)}; not matched:"]
    lines += [f"- {one}" for one in row.not_matched]
    if given:
        lines.append(f"- changed by you: {' '.join(given)}")
    return "\n".join(lines)


def _against(paper: float | None, ours: Sequence[float]) -> tuple[str, str, str, int]:
    spread = f" ± {np.std(ours, ddof=1):.2f}" if len(ours) > 1 else ""
    gap = "" if paper is None else f"{np.mean(ours) - paper:+.2f}"
    return _paper(paper), f"{np.mean(ours):.2f}{spread}", gap, len(ours)


def _paper(paper: float | None) -> str:
    return "none" if paper is None else f"{paper:.2f}"


def _selection(row: Row) -> str:
    over = "all test examples" if row.over == "examples" else "clients"
    chosen = {
        "none": "the last round", "round": "the best round on test data",
        "client_rounds": "each client's best round on test data",
    }  # fmt: skip
    return f"{chosen[row.selects]}, mean over {over}"
