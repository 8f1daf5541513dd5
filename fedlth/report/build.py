"""The report of a run, or of the seeds of one: tables, figures and the page, written into its folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedlth.errors import MissingExtra, require
from fedlth.report.facts import read_group
from fedlth.report.figures import pictures
from fedlth.report.html import Drawn, drawn, page
from fedlth.report.results import Results, results_of
from fedlth.report.tables import RENDERERS, Table, bytes_table, clients_table, summary_table


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
    try:
        require("report.html with its figures", "matplotlib", "jinja2", extra="sim")
    except MissingExtra:
        write_tables(run, tables)
        raise
    figures = [drawn(picture) for picture in pictures(results)]
    html = page(results, tables=tables, figures=figures)
    return write_files(run, tables=tables, figures=figures, html=html)


def write_files(run: Path, *, tables: Mapping[str, Table], figures: Sequence[Drawn], html: str) -> Path:
    """Write a report's tables, its figures, and last its page, whose path it returns."""
    write_tables(run, tables)
    for one in figures:
        write_file(run / "figures" / f"{one.picture.name}.png", one.png)
    write_file(run / "report.html", html.encode())
    return run / "report.html"


def write_tables(run: Path, tables: Mapping[str, Table]) -> None:
    """Write each table as Markdown, LaTeX and CSV."""
    for name, table in tables.items():
        for ending, render in RENDERERS.items():
            write_file(run / "tables" / f"{name}.{ending}", render(table).encode())


def write_file(path: Path, content: bytes) -> None:
    """Write a report's file; a reader never meets half of it."""
    path.parent.mkdir(exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    os.replace(part, path)
