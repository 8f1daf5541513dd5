"""One self-contained page: words, tables and embedded figures; it asks the network for nothing."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np

from fedlth.report.arms import arm_of
from fedlth.report.canvas import Picture, rendered
from fedlth.report.cost import cost_text
from fedlth.report.facts import Facts
from fedlth.report.headline import against, done, honest_notes, numbers, overlapping, reached
from fedlth.report.palette import DARK, LIGHT
from fedlth.report.results import Results
from fedlth.report.tables import SUMMARY_HEADER, Table
from fedlth.report.units import scaled

ONE_SEED = "one seed, so BCa bootstrap over clients; they say nothing about what another seed would give."
SEEDS = "hierarchical bootstrap, seeds first and then the clients of each; with so few seeds still rather narrow."


# the summary table is too wide for a page: what came out, and what it cost
ACCURACY, COST = SUMMARY_HEADER[:11], SUMMARY_HEADER[:2] + SUMMARY_HEADER[11:]


@dataclass(frozen=True)
class Drawn:
    """A picture, drawn: SVG for either colour scheme, and the PNG that stands beside the page."""

    picture: Picture
    light: bytes
    dark: bytes
    png: bytes


def drawn(picture: Picture) -> Drawn:
    """Return the picture in every form that a report needs."""
    light = rendered(picture, theme=LIGHT, kinds=("svg", "png"))
    return Drawn(picture, light["svg"], rendered(picture, theme=DARK, kinds=("svg",))["svg"], light["png"])


def embedded(one: Drawn) -> dict[str, str]:
    uris = (f"data:image/svg+xml;base64,{base64.b64encode(data).decode()}" for data in (one.light, one.dark))
    return {"title": one.picture.title, "guide": one.picture.guide, **dict(zip(("light", "dark"), uris, strict=True))}


def _seconds(facts: Facts) -> dict[str, float]:
    """Return the time of each phase's steps; the clients' own times lie within these and beside each other."""
    spent: dict[str, float] = {}
    for row in facts.times:
        seconds = row.get("seconds")
        if row.get("client") is None and isinstance(seconds, int | float):
            phase = str(row.get("phase", "other"))
            spent[phase] = spent.get(phase, 0.0) + seconds
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
    spent = _seconds(facts)
    if spent:
        shown = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in spent.items())
        told.append(("time", f"{shown} (wall time; not compared between runs)"))
    return {"seed": header.seed, "facts": told, "config": facts.config}


def _framed(results: Results) -> str:
    framed = [one.framed_bytes for one in results.traffics if one.framed_bytes is not None]
    return scaled(float(np.mean(framed)), "B") if len(framed) == len(results.traffics) and any(framed) else ""


def page(results: Results, *, tables: Mapping[str, Table], figures: Sequence[Drawn]) -> str:
    """Return the HTML of a report. tables: summary, clients and bytes. Every text from the run is escaped."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    folder = files("fedlth.report")
    source = folder.joinpath("page.html.j2").read_text(encoding="utf-8")
    css = folder.joinpath("page.css").read_text(encoding="utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(source)
    group, header = results.group, results.group[0].header
    arms = []
    for name in dict.fromkeys(found.choice.arm for found in results.summaries):
        starts = sorted({start for one in results.summaries if one.choice.arm == name for start in one.starts})
        arms.append({"label": arm_of(name).label, "meaning": arm_of(name).meaning, "starts": ", ".join(starts)})
    chosen = [found.choice for found in results.summaries]
    return template.render(
        css=Markup(css),  # ours, never the user's
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
        accuracy=tables["summary"].columns(ACCURACY),
        cost=tables["summary"].columns(COST),
        main_row=chosen.index(results.main) if results.main in chosen else -1,
        main_label=arm_of(results.main.arm).label if results.main else "nothing evaluated",
        figures=[embedded(one) for one in figures],
        dense_payload=scaled(header.dense_payload_bytes, "B"),
        dense_raw=scaled(header.dense_raw_bytes, "B"),
        framed=_framed(results),
        arms=arms,
        runs=[_provenance(facts) for facts in group],
        **tables,
    )
