"""The leaderboard of a bench, written into its folder: one page, and tables as Markdown, LaTeX and CSV."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from textwrap import fill

from fedlth.bench.board import Board, read_board
from fedlth.bench.headline import headline, warnings
from fedlth.bench.matrix import Matrix
from fedlth.bench.pictures import pictures
from fedlth.bench.tables import (
    cost_table,
    leaderboard_csv,
    machine_table,
    outcome_table,
    ranks_table,
    tests_table,
    tried,
    tuning_csv,
    tuning_table,
    unequal,
    whole_table,
)
from fedlth.bench.ticket_table import tickets_table
from fedlth.errors import require
from fedlth.report.build import embedded, filled_page, write_file
from fedlth.report.canvas import drawn
from fedlth.report.tables import WIDTH, Table, aligned, csv_text, latex, markdown


def write_leaderboard(matrix: Matrix, root: Path) -> tuple[Path, str]:
    """Write leaderboard.html, .md, .tex and .csv, and three more CSV files; return the page's path and its text.

    Equal runs give an equal leaderboard.csv: what a clock or this machine decides stands in cells.csv.
    """
    require("the leaderboard", "scipy", "matplotlib", "jinja2", extra="sim")
    board = read_board(matrix, root)
    whole, machine, rates = whole_table(board), machine_table(board), tried(board)
    tuning = tuning_table(rates, board.shown)
    figures = [drawn(picture) for picture in pictures(board)]
    html = page(board, machine=machine, tuning=tuning, figures=[embedded(one) for one in figures])
    told = text(board)
    head = "\n".join([*(f"{line}\n" for line in _said(board)), *(f"- {line}" for line in warnings(board))])
    tables = [
        f"## {t.title}\n\n{markdown(t)}{f'{chr(10)}{note}{chr(10)}' if note else ''}"
        for t, note in (*_tables(board), (ranks_table(board), ""), (tuning, "")) if t.rows
    ]  # fmt: skip
    write_file(root / "leaderboard.csv", leaderboard_csv(board).encode())
    write_file(root / "cells.csv", csv_text(_plain_cells(board)).encode())
    if (tickets := tickets_table(board)).rows:
        write_file(root / "tickets.csv", csv_text(tickets).encode())
    if tuning.rows:
        write_file(root / "tuning.csv", csv_text(tuning_csv(rates, board.shown)).encode())
    write_file(root / "leaderboard.md", f"# {matrix.name}\n\n{head}\n\n{chr(10).join(tables)}".encode())
    write_file(root / "leaderboard.tex", latex(whole).encode() if whole.rows else b"")
    for one in figures:
        write_file(root / "figures" / f"{one.picture.name}.png", one.png)
    write_file(root / "leaderboard.html", html.encode())
    return root / "leaderboard.html", told


def _plain_cells(board: Board) -> Table:
    header = ("partition", "method", "seed", "status", "reason", "wall_seconds", "peak_memory_MB")
    outcomes = ((cell, board.outcomes[cell.name]) for cell in board.matrix.cells)
    rows = [
        (c.partition, c.method, str(c.seed), o.status, o.reason, f"{o.seconds:.3f}", f"{o.peak_memory_mb:.1f}")
        for c, o in outcomes
    ]
    return Table("", header, tuple(rows))


def _said(board: Board) -> list[str]:
    return [f"{partition}: {sentences}" for partition, sentences in headline(board).items()]


def _tables(board: Board) -> list[tuple[Table, str]]:
    """Return the tables of every partition, each with the note below it."""
    makers = (outcome_table, tests_table, cost_table)
    return [
        (make(board, partition), unequal(board, partition) if make is outcome_table else "")
        for partition in board.entries for make in makers
    ]  # fmt: skip


def text(board: Board) -> str:
    """Return the leaderboard for a terminal: findings, the table of each partition in short, warnings."""
    parts = [fill(line, WIDTH) for line in _said(board)]
    for partition in board.entries:
        table = outcome_table(board, partition)
        short = [name for name in table.header if not name.startswith(("95", "10th", "90th", "less"))]
        parts += [f"{table.title}\n\n{aligned(table.columns(short))}", fill(unequal(board, partition), WIDTH)]
    parts += ["\n".join(fill(f"note: {line}", WIDTH, subsequent_indent="      ") for line in warnings(board))]
    return "\n\n".join(part for part in parts if part)


def page(board: Board, *, machine: Table, tuning: Table, figures: list[dict[str, str]]) -> str:
    """Return the page's HTML; every text from the runs is escaped."""
    matrix, shown = board.matrix, board.shown
    parts = []
    for partition in board.entries:
        lines = board.lines[partition]
        parts.append({
            "name": partition,
            "outcome": outcome_table(board, partition),
            "tests": tests_table(board, partition),
            "cost": cost_table(board, partition),
            "unequal": unequal(board, partition),
            "main": [not line.control for line in lines],
        })  # fmt: skip
    groups = [entry.group for held in board.entries.values() for entry in held.values()]
    ranking = board.ranking
    return filled_page(
        files("fedlth.bench").joinpath("leaderboard.html.j2"),
        bench=matrix.name,
        seeds=", ".join(map(str, matrix.seeds)),
        counts=f"{len(matrix.ranked)} methods · {len(matrix.partitions)} partitions",
        clients=", ".join(sorted({str(group[0].header.num_clients) for group in groups})) or "0",
        headline=headline(board),
        warnings=warnings(board),
        metric=shown.label if shown else "",
        better=shown.better.lower() if shown else "",
        parts=parts,
        figures=figures,
        ranks=ranks_table(board),
        friedman=None if ranking is None else f"{ranking.p_value:.3g}",
        tuning=tuning,
        budget=matrix.tune,
        machine=machine,
        config=matrix.text(),
    )
