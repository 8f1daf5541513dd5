"""The report of a run, or of the seeds of one: tables, figures and one page, written into its folder.

The page is self-contained: words, tables and embedded figures; it asks the network for nothing.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import numpy as np

from fedlth.errors import MissingExtra, require
from fedlth.report.canvas import Drawn, drawn
from fedlth.report.cost import cost_text
from fedlth.report.curve import curve_table, inflation
from fedlth.report.facts import Facts, read_group
from fedlth.report.figures import pictures
from fedlth.report.fleet import fleet_text, tiers_table
from fedlth.report.headline import against, done, honest_notes, numbers, overlapping, reached
from fedlth.report.known_arms import arm_of
from fedlth.report.newcomers import newcomers_table
from fedlth.report.privacy import privacy_card
from fedlth.report.results import Results, results_of
from fedlth.report.sparsity import sparsity_table
from fedlth.report.sparsity import told as sparsity_told
from fedlth.report.tables import (
    COST,
    RENDERERS,
    Table,
    bytes_table,
    chosen_table,
    clients_table,
    summary_table,
    tasks_table,
)
from fedlth.report.units import scaled

TABLES = ("clients", "bytes", "chosen", "fleet", "curve", "tasks", "newcomers", "sparsity")  # of the page, as they are
ONE_SEED = "one seed, so BCa bootstrap over clients; they say nothing about what another seed would give."
SEEDS = "hierarchical bootstrap, seeds first and then the clients of each; with so few seeds still rather narrow."


def read_results(run: Path) -> Results:
    """Return the results of a run folder or of a folder of seeds; raises StudyError naming what is wrong there."""
    require("the report", "scipy", extra="sim")
    return results_of(read_group(run))


def write_report(run: Path) -> Path:
    """Write tables/, figures/ and report.html into a run folder (or a folder of seeds) and return the page's path.

    Equal facts give an equal report. Everything is worked out before the first file is written, and the page,
    the only file that promises the rest, comes last. Raises StudyError naming what is missing or corrupt, and
    MissingExtra where only the tables could be written.
    """
    results = read_results(run)
    tables = {"summary": summary_table(results), "clients": clients_table(results), "bytes": bytes_table(results)}
    more = {
        "chosen": chosen_table(results), "fleet": tiers_table(results), "curve": curve_table(results),
        "tasks": tasks_table(results), "newcomers": newcomers_table(results),
        "sparsity": sparsity_table(results),
    }  # fmt: skip
    tables |= {name: table for name, table in more.items() if table.rows}
    try:
        require("report.html with its figures", "matplotlib", "jinja2", extra="sim")
    except MissingExtra:
        write_tables(run / "tables", tables)
        raise
    figures = [drawn(picture) for picture in pictures(results)]
    html = page(results, tables=tables, figures=figures)
    return write_files(run, tables=tables, figures=figures, html=html)


def write_files(run: Path, *, tables: Mapping[str, Table], figures: Sequence[Drawn], html: str) -> Path:
    """Write a report's tables, its figures, and last its page, whose path it returns."""
    write_tables(run / "tables", tables)
    for one in figures:
        write_file(run / "figures" / f"{one.picture.name}.png", one.png)
    write_file(run / "report.html", html.encode())
    return run / "report.html"


def write_tables(folder: Path, tables: Mapping[str, Table]) -> None:
    """Write each table that has rows as Markdown, LaTeX and CSV."""
    for name, table in [(name, table) for name, table in tables.items() if table.rows]:
        for ending, render in RENDERERS.items():
            write_file(folder / f"{name}.{ending}", render(table).encode())


def write_file(path: Path, content: bytes) -> None:
    """Write a report's file; a reader never meets half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    os.replace(part, path)


def embedded(one: Drawn) -> dict[str, str]:
    uris = (f"data:image/svg+xml;base64,{base64.b64encode(data).decode()}" for data in (one.light, one.dark))
    return {"title": one.picture.title, "guide": one.picture.guide, **dict(zip(("light", "dark"), uris, strict=True))}


def _seconds(facts: Facts) -> dict[str, float]:
    """Return the time of each phase's steps; the clients' own times lie within these and beside each other."""
    spent: dict[str, float] = {}
    for row in facts.times:
        if row.client is None and row.seconds is not None:
            spent[row.phase] = spent.get(row.phase, 0.0) + row.seconds
    return spent


def _provenance(facts: Facts) -> dict[str, Any]:
    header = facts.header
    told: list[tuple[str, str]] = [
        ("finished", "yes" if header.finished else "no"),
        ("method", f"{header.method} ({header.paper})" if header.paper else header.method),
        ("engine", f"{header.engine}, compute {header.compute}" if header.compute else header.engine),
        ("commit", header.commit or "not known"),
        ("versions", ", ".join(f"{name} {version}" for name, version in sorted(header.versions.items()))),
        ("partition digest", header.partition_digest),
        ("data digest", header.data_digest),
        ("parameters", f"{header.num_parameters:,}, of which {header.num_prunable:,} are prunable"),
    ]
    if header.test == "own":
        told.append(("test parts", "of each client's own examples"))
    if header.label_noise:
        clients = ", ".join(map(str, header.noisy))
        told.append(("wrong labels", f"{header.label_noise}; clients {clients}"))
    if header.hostile:
        told.append(("attack", f"{header.attack}; clients {', '.join(map(str, header.hostile))}"))
    if header.joiners:
        told.append(("late joiners", ", ".join(f"client {c} from round {r}" for c, r in header.joiners.items())))
    spent = _seconds(facts)
    if spent:
        shown = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in spent.items())
        told.append(("time", f"{shown} (wall time; not compared between runs)"))
    return {"seed": header.seed, "facts": told, "config": facts.config}


def _framed(results: Results) -> str:
    framed = [one.framed_bytes for one in results.traffics if one.framed_bytes is not None]
    return scaled(float(np.mean(framed)), "B") if len(framed) == len(results.traffics) and any(framed) else ""


def page(results: Results, *, tables: Mapping[str, Table], figures: Sequence[Drawn]) -> str:
    """Return the HTML of a report with the tables that this run has. Every text from the run is escaped."""
    group, header, shown = results.group, results.group[0].header, results.shown
    plain = shown.measure.name == "accuracy"
    arms = []
    for name in dict.fromkeys(found.choice.arm for found in results.summaries):
        starts = sorted({start for one in results.summaries if one.choice.arm == name for start in one.starts})
        arms.append({"label": arm_of(name).label, "meaning": arm_of(name).meaning, "starts": ", ".join(starts)})
    chosen = [found.choice for found in results.summaries]
    return filled(
        "page.html.j2",
        study=header.study,
        method=header.method,
        seeds=", ".join(str(facts.header.seed) for facts in group),
        num_clients=header.num_clients,
        engines=", ".join(sorted({facts.header.engine for facts in group})),
        several=len(group) > 1,
        units="seeds and clients" if len(group) > 1 else "clients",
        interval_note=SEEDS if len(group) > 1 else ONE_SEED,
        done=done(results),
        numbers=numbers(results),
        notes=honest_notes(results),
        reached=reached(results),
        against=against(results),
        overlapping=overlapping(results),
        ticket_cost=cost_text(results),
        # the summary table is too wide for a page: what came out, and what it cost
        outcome=tables["summary"].columns(tables["summary"].header[: -len(COST)]),
        cost=tables["summary"].columns((*tables["summary"].header[:2], *COST)),
        metric="Accuracy" if plain else f"The metric, {shown.label},",
        how_told=(
            "Percent over clients. Worst decile: mean of the lowest tenth. Hurt: share of clients below their own "
            "baseline."
            if plain
            else f"The metric, {shown.label}, over clients; {shown.better.lower()} is better. Worst decile: mean of "
            "the worst tenth. Hurt: share of clients, in percent, that are worse than their own baseline."
        ),
        main_row=chosen.index(results.main) if results.main in chosen else -1,
        main_label=arm_of(results.main.arm).label if results.main else "nothing evaluated",
        figures=[embedded(one) for one in figures],
        inflation=inflation(results),
        dense_payload=scaled(header.dense_payload_bytes, "B"),
        dense_raw=scaled(header.dense_raw_bytes, "B"),
        framed=_framed(results),
        arms=arms,
        runs=[_provenance(facts) for facts in group],
        fleet_text=fleet_text(results),
        privacy=privacy_card(group),
        sparsity_text=sparsity_told(group),
        **{name: tables.get(name) for name in TABLES},
    )


def filled(template: str, **values: Any) -> str:
    """Return a page of this room with its values; every text among them is escaped."""
    return filled_page(files("fedlth.report").joinpath(template), **values)


def filled_page(page: Traversable, /, **values: Any) -> str:
    """Return a template, of whatever room, with its values in the style of reports; every text is escaped."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    source, css = (one.read_text(encoding="utf-8") for one in (page, files("fedlth.report").joinpath("page.css")))
    made = Environment(autoescape=True, undefined=StrictUndefined).from_string(source)
    return made.render(css=Markup(css), **values)  # the style is ours, never the user's
