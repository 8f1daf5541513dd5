"""The report of a lottery study: tables, figures and one self-contained page, written into its folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedlth.report.build import embedded, filled, write_files
from fedlth.report.canvas import drawn
from fedlth.report.lottery_facts import LotteryFacts, over_seeds, read_lottery
from fedlth.report.lottery_figures import at_round, lottery_pictures
from fedlth.report.tables import Table, aligned
from fedlth.report.units import NOTHING, percent, points

PLAIN = (("granularity", "element"), ("dead", "zero"), ("gate", "always"), ("stop", "target"))
HEADER = (
    "arm", "round", "density", "early stop (iteration)", "test % at early stop", "± over seeds", "test % at the end",
    "against the search (points)",
)  # fmt: skip
LONG = 30  # rows of a probe that the terminal still shows


def write_lottery(run: Path) -> Path:
    """Write tables/, figures/ and report.html into a lottery study's folder; return the page's path.

    Equal facts give an equal report. Raises StudyError naming what is missing or corrupt.
    """
    facts = read_lottery(run)
    probes = {probe: probe_table(facts, probe) for probe in facts.probes}
    tables = {"arms": arms_table(facts), **{f"probe_{probe}": table for probe, table in probes.items()}}
    figures = [drawn(picture) for picture in lottery_pictures(facts)]
    html = _page(facts, tables["arms"], list(probes.values()), [embedded(one) for one in figures], run)
    return write_files(run, tables=tables, figures=figures, html=html)


def words(facts: LotteryFacts) -> list[str]:
    """Say in sentences what the searches found, against the dense network of the same seeds."""
    told = []
    for name in facts.config["searches"]:
        dense, tickets = facts.cell(name, 0), [cell for cell in facts.of(name) if cell.round]
        if not tickets:
            continue
        best = max(tickets, key=lambda cell: cell.mean("validation_accuracy"))  # test data choose nothing
        ticket = (
            f"the ticket that is best on validation data has {percent(best.mean('test_accuracy'), digits=2)} % at "
            f"{percent(best.density)} % of the weights and stops at {best.mean('early_stop'):.0f}"
        )
        beside = _beside(facts, name)
        if dense is None:
            told.append(f"{name}: trains no dense network; {ticket}.{beside}")
            continue
        level = dense.mean("validation_accuracy")
        as_good = [cell for cell in tickets if cell.mean("validation_accuracy") >= level]
        last = (
            f"the sparsest ticket not below it on validation data keeps {percent(as_good[-1].density)} %"
            if as_good
            else "no ticket reaches it on validation data"
        )
        told.append(
            f"{name}: the dense network has {percent(dense.mean('test_accuracy'), digits=2)} % and stops at iteration "
            f"{dense.mean('early_stop'):.0f}; {ticket}; {last}.{beside}"
        )
    return told or ["What the probes of this study measured is below."]


def _beside(facts: LotteryFacts, search: str) -> str:
    """Say how the best arm does at the sparsest mask that an arm wears too: what a ticket must beat."""
    rounds = [(len(at_round(facts, search, cell.round)) > 1, cell.round) for cell in facts.of(search) if cell.round]
    own, *arms = at_round(facts, search, max(rounds)[1])
    if not arms:
        return ""
    best = max(arms, key=lambda cell: cell.mean("validation_accuracy"))
    ticket, arm = (percent(cell.mean("test_accuracy"), digits=2) for cell in (own, best))
    return (
        f" At {percent(own.density)} % of the weights the ticket has {ticket} % and the best of its arms there, "
        f"{best.arm}, {arm} %."
    )


def legend(facts: LotteryFacts) -> list[tuple[str, str]]:
    """Return (name, what it is) of every search and arm, parts by the names that the study gave them."""
    told = []
    for name, search in facts.config["searches"].items():
        parts = [f"{part} {_spec(search[part])}" for part in ("score", "schedule", "scope", "rewind")]
        parts += [f"{part} {_spec(search[part])}" for part, plain in PLAIN if search[part] != {"name": plain}]
        told.append((name, f"search: {', '.join(parts)}{_changed(search)}"))
    for name, arm in facts.config["arms"].items():
        mask = "masks" if arm["mask"] == {"name": "keep"} else f"masks under the control {_spec(arm['mask'])}"
        others = "".join(f", {part} {_spec(arm[part])}" for part in ("start", "dead") if arm[part] is not None)
        told.append((name, f"arm: {arm['of']}'s {mask}{others}{_changed(arm)}"))
    return told


def _spec(spec: Mapping[str, Any]) -> str:
    options = ", ".join(f"{key} {value}" for key, value in spec.items() if key != "name")
    return f"{spec['name']} ({options})" if options else str(spec["name"])


def _changed(section: Mapping[str, Any]) -> str:
    return "".join(f", train.{key} {value}" for key, value in section["train"].items())


def alarms(facts: LotteryFacts) -> list[str]:
    """Say where a training diverged, where a mask leaves a layer empty, and how sparse any mask could be.

    An empty layer cuts the network in two.
    """
    told = []
    for arm in facts.arms:
        lost = {cell.round: count for cell in facts.of(arm) if (count := sum("diverged" in row for row in cell.rows))}
        if lost:
            rounds = ", ".join(
                f"{number} ({count} of {len(facts.config['seeds'])} seeds)" for number, count in lost.items()
            )
            told.append(f"Diverged: {arm} at round {rounds}; its row is the last evaluation before that, or the start.")
        for cell in facts.of(arm):
            kept = [row["layer_kept"] for row in cell.rows]
            empty = [name for name in kept[0] if any(one[name] == 0 for one in kept)]
            if empty:
                most = cell.rows[0]["size"] / len(kept[0])
                told.append(
                    f"Layer collapse: {arm} at density {cell.density:.3g} has nothing left in {', '.join(empty)}; "
                    f"masks without an empty layer exist up to a compression of {most:.0f} (weights / layers)."
                )
                break
    return told


def lottery_text(run: Path) -> str:
    """Return what the terminal shows: the sentences and the table of arms."""
    facts = read_lottery(run)
    parts = ["\n".join([*words(facts), *alarms(facts)])]
    parts += ["\n".join(f"{name}: {what}" for name, what in legend(facts))]
    if facts.cells:
        table = arms_table(facts)
        parts.append(f"{table.title}\n{aligned(table)}")
    for probe in facts.probes:
        table = probe_table(facts, probe)
        long = f"{len(table.rows)} rows: {run / 'tables' / f'probe_{probe}.md'}"
        parts.append(f"{table.title}\n{aligned(table) if len(table.rows) <= LONG else long}")
    return "\n\n".join(parts)


def arms_table(facts: LotteryFacts) -> Table:
    """Return one row an arm and round; the difference is to the arm's own search at the same round, seed by seed."""
    rows = []
    for cell in facts.cells:
        spec = facts.config["arms"].get(cell.arm)
        base = None if spec is None else facts.cell(spec["of"], cell.round)
        test = cell.values("test_accuracy")
        gain = NOTHING if base is None else points(float((test - base.values("test_accuracy")).mean()))
        rows.append((
            cell.arm, str(cell.round), f"{cell.density:.4f}", f"{cell.mean('early_stop'):.0f}",
            percent(float(test.mean()), digits=2), percent(_sd(test), digits=2),
            percent(cell.mean("final_test_accuracy"), digits=2), gain,
        ))  # fmt: skip
    return Table("Every arm at every round, mean over seeds", HEADER, tuple(rows))


def probe_table(facts: LotteryFacts, probe: str) -> Table:
    """Return a probe's rows: what was asked, then what was measured, as mean ± standard deviation over seeds."""
    merged = over_seeds(facts.probes[probe])
    columns = list(dict.fromkeys(key for row in merged for key in row))
    measured = {key for row in merged for key, value in row.items() if isinstance(value, np.ndarray)}
    columns = [key for key in columns if key not in measured] + [key for key in columns if key in measured]
    rows = tuple(tuple(_text(row.get(key)) for key in columns) for row in merged)
    left = len(columns) - len(measured & set(columns))
    return Table(f"{probe}: {facts.part(probe)}", tuple(key.replace("_", " ") for key in columns), rows, left)


def _text(value: object) -> str:
    if value is None:
        return NOTHING
    if isinstance(value, np.ndarray):
        mean = f"{value.mean():.4g}"
        return mean if len(value) < 2 or np.ptp(value) == 0 else f"{mean} ± {_sd(value):.2g}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)


def _sd(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else float("nan")


def _page(facts: LotteryFacts, arms: Table, probes: list[Table], figures: list[dict[str, str]], run: Path) -> str:
    config = facts.config
    return filled(
        "lottery.html.j2",
        study=config["lottery"],
        seeds=", ".join(map(str, config["seeds"])),
        data=config["data"]["name"],
        model=config["model"]["name"],
        words=words(facts),
        alarms=alarms(facts),
        legend=legend(facts),
        figures=figures,
        arms=arms,
        probes=probes,
        config=(run / "config.yaml").read_text(encoding="utf-8"),
    )
