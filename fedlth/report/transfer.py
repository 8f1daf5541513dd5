"""The transfer matrix of a run, or its mean over the seeds of one: JSON, CSV, Markdown, and a picture.

A cell is dark where the mask does at least as well as the target's own ticket. Chen et al., BERT-Tickets, NeurIPS 2020,
arXiv 2007.12223.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedlth.report.build import write_file
from fedlth.report.canvas import Picture, Theme, drawn_png
from fedlth.report.measure import Shown
from fedlth.report.sparsity import ROUNDING
from fedlth.report.tables import Table, aligned, csv_text, markdown
from fedlth.report.units import NOTHING
from fedlth.storage.header import Header, read_header
from fedlth.storage.transfer_cells import DENSE, TRANSFER, Cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Values = NDArray[np.float64]
AGREE = 0.9  # masks of a larger Jaccard index are so nearly one mask that it cannot matter whose they are
NUMBERS = 16  # columns with room for numbers in the picture
DARK = "●"


@dataclass(frozen=True)
class Grid:
    """The matrix: rows are masks, columns clients; (rows, columns) means over seeds, NaN where a cell is missing.

    `seeds` holds the metric by seed, (seeds, rows, columns). `sources` are the clients whose tickets rows are.
    `majority` is the share of the commonest class of each test part, NaN where the study has no such metric.
    """

    masks: tuple[str, ...]
    sources: tuple[int | None, ...]
    targets: tuple[int, ...]
    shown: tuple[Shown, ...]
    names: tuple[str, ...]
    num_test: tuple[int, ...]
    majority: tuple[float, ...]
    seeds: Values
    density: Values
    jaccard: Values
    difference: Values
    dark: NDArray[np.bool_]

    @property
    def value(self) -> Values:
        return _mean(self.seeds)

    def own(self, row: int, column: int) -> bool:
        """Say whether a cell is a client's own ticket on its own data."""
        return self.sources[row] == self.targets[column]

    def others(self, row: int) -> Values:
        """Return the Jaccard indices of a row with the targets' own tickets, its own client's left out."""
        kept = [self.jaccard[row, c] for c in range(len(self.targets)) if not self.own(row, c)]
        return np.array([one for one in kept if not math.isnan(one)])

    def rows(self) -> Iterator[tuple[int, str]]:
        """Yield the rows that are masks, with their places: all but the dense twin."""
        return ((i, name) for i, name in enumerate(self.masks) if name != DENSE)


def _mean(values: Values) -> Values:
    """Return the mean over the first axis of what is there, NaN where nothing is."""
    there = ~np.isnan(values)
    total: Values = np.where(there, values, 0.0).sum(axis=0)
    found: Values = np.divide(total, there.sum(axis=0), out=np.full(total.shape, np.nan), where=there.any(axis=0))
    return found


def grid_of(headers: Sequence[Header], seeds: Sequence[Sequence[Cell]]) -> Grid:
    """Return the matrix of the seeds' cells; differences and darkness are of what a seed has both sides of."""
    every = [cell for cells in seeds for cell in cells]
    masks, targets = tuple(dict.fromkeys(c.mask for c in every)), tuple(sorted({c.target for c in every}))
    shown = {target: Shown(headers[0].judges(target)) for target in targets}
    row, column = {name: i for i, name in enumerate(masks)}, {target: i for i, target in enumerate(targets)}
    values, density, overlap = (np.full((len(seeds), len(masks), len(targets)), np.nan) for _ in range(3))
    own = np.full((len(seeds), len(targets)), np.nan)
    for seed, cells in enumerate(seeds):
        for c in cells:
            place = seed, row[c.mask], column[c.target]
            values[place], density[place] = c.value(shown[c.target].measure.name), c.density
            overlap[place] = c.jaccard
            if c.source == c.target:
                own[seed, column[c.target]] = values[place]
    gap = _mean(values - own[:, None, :])
    gain = np.array([1.0 if shown[t].measure.higher_is_better else -1.0 for t in targets])
    tasks = {client: task.name for task in headers[0].tasks for client in task.clients if task.name}
    sizes = {c.target: c.num_test for c in every}
    commonest = {c.target: c.value("majority") for c in every}
    return Grid(
        masks=masks,
        sources=tuple(next(c.source for c in every if c.mask == name) for name in masks),
        targets=targets,
        shown=tuple(shown[t] for t in targets),
        names=tuple(f"client {t}" + (f" ({tasks[t]})" if t in tasks else "") for t in targets),
        num_test=tuple(sizes[t] for t in targets),
        majority=tuple(commonest[t] for t in targets),
        seeds=values,
        density=_mean(density),
        jaccard=_mean(overlap),
        difference=_mean(values - values[:, [row[DENSE]], :]) if DENSE in row else np.full(gap.shape, np.nan),
        dark=gap * gain >= -ROUNDING,  # equal means over seeds may differ in their last bit
    )


def notes(grid: Grid) -> tuple[str, ...]:
    """Return what a reader must know: what a cell says, what cannot be tested, how far chance reaches."""
    many = f"Means of {len(grid.seeds)} seeds. " if len(grid.seeds) > 1 else ""
    told = [
        f"{many}Each cell: test metric, difference to the dense twin of its column, Jaccard index (J) of the mask with "
        f"the column's own ticket; {DARK} dark: at least as good as that ticket, which is itself counted."
    ]
    alike = [name for i, name in grid.rows() if (found := grid.others(i)).size and found.mean() > AGREE]
    if alike:
        whole = len(alike) == sum(1 for i, _ in grid.rows() if grid.others(i).size)
        which = "All masks" if whole else f"The masks {', '.join(alike)}"
        told.append(
            f"{which} agree with the tickets of other clients above a Jaccard index of {AGREE:g} on average: they are "
            'nearly one mask. That "tickets of the pre-training task transfer universally, others in a limited '
            'fashion" is not testable here.'
        )
    if all(shown.measure.name == "accuracy" for shown in grid.shown):
        dense = grid.value[grid.masks.index(DENSE)] if DENSE in grid.masks else grid.value.max(axis=0)
        errors = np.sqrt(dense * (1 - dense) / np.maximum(np.array(grid.num_test), 1))
        parts = " to ".join(dict.fromkeys(map(str, (min(grid.num_test), max(grid.num_test)))))
        told.append(
            f"A test part has {parts} examples: the standard error of one accuracy is {100 * np.nanmin(errors):.1f} to "
            f"{100 * np.nanmax(errors):.1f} points, and smaller differences, dark or not, are no evidence."
        )
    known = [(name, one) for name, one in zip(grid.names, grid.majority, strict=True) if not math.isnan(one)]
    if known:
        shares = [f"{100 * one:.1f} % ({name})" for name, one in known]
        if len(known) > NUMBERS:
            shares = [f"{100 * min(one for _, one in known):.1f} to {100 * max(one for _, one in known):.1f} %"]
        told.append(f"Telling the commonest class of a test part every time reaches {', '.join(shares)}.")
    lost = int(np.isnan(grid.seeds).sum())
    if lost:
        told.append(f"{lost} of {grid.seeds.size} cells are missing; the same command tries them again.")
    return tuple(told)


def matrix_table(grid: Grid) -> Table:
    """Return one row a mask: a cell a client, the number of dark cells, the mean overlap with others' tickets."""
    rows, value = [], grid.value
    for i, name in enumerate(grid.masks):
        cells = [_cell(grid, i, c) for c in range(len(grid.targets))]
        others = grid.others(i)
        dark, mean = NOTHING, NOTHING
        if name != DENSE:
            dark = f"{int(grid.dark[i].sum())} of {int((~np.isnan(value[i])).sum())}"
            mean = f"{others.mean():.3f}" if others.size else NOTHING
        rows.append((name, f"{np.nanmean(grid.density[i]):.3g}", *cells, dark, mean))
    heads = (f"{name}, {shown.column}" for name, shown in zip(grid.names, grid.shown, strict=True))
    return Table("Transfer matrix", ("mask", "density", *heads, "dark", "mean J with others"), tuple(rows))


def _cell(grid: Grid, row: int, column: int) -> str:
    value, shown = grid.value[row, column], grid.shown[column]
    if math.isnan(value) or grid.masks[row] == DENSE:
        return shown.text(value)
    gap = grid.difference[row, column]
    less = "" if math.isnan(gap) else f" ({shown.difference(gap)})"
    return f"{shown.text(value)}{less} J {grid.jaccard[row, column]:.3f}{f' {DARK}' if grid.dark[row, column] else ''}"


def cells_table(grid: Grid) -> Table:
    """Return one row a cell, in plain numbers, for programs."""
    header = ("mask", "target", "metric", "test", "difference", "jaccard", "density", "dark", "seeds")
    rows = []
    for i, name in enumerate(grid.masks):
        for c, target in enumerate(grid.targets):
            told = (grid.value[i, c], grid.difference[i, c], grid.jaccard[i, c], grid.density[i, c])
            test, gap, overlap, density = ("" if math.isnan(one) else repr(float(one)) for one in told)
            dark = "" if name == DENSE or not test else str(int(grid.dark[i, c]))
            seeds = str(int((~np.isnan(grid.seeds[:, i, c])).sum()))
            rows.append((name, str(target), grid.shown[c].measure.name, test, gap, overlap, density, dark, seeds))
    return Table("Transfer matrix, a row a cell", header, tuple(rows), left=3)


def _record(headers: Sequence[Header], grid: Grid) -> dict[str, Any]:
    def number(value: float) -> float | None:
        return None if math.isnan(value) else float(value)

    value = grid.value
    return {
        "study": headers[0].study, "method": headers[0].method, "seeds": [header.seed for header in headers],
        "targets": [
            {"client": t, "name": name, "metric": shown.measure.name, "num_test": size}
            for t, name, shown, size in zip(grid.targets, grid.names, grid.shown, grid.num_test, strict=True)
        ],
        "rows": [
            {
                "mask": name, "client": grid.sources[i],
                "dark": None if name == DENSE else int(grid.dark[i].sum()),
                "mean_jaccard": float(others.mean()) if (others := grid.others(i)).size and name != DENSE else None,
                "cells": [
                    {
                        "target": t, "test": number(value[i, c]), "by_seed": [number(v) for v in grid.seeds[:, i, c]],
                        "difference": number(grid.difference[i, c]), "jaccard": number(grid.jaccard[i, c]),
                        "density": number(grid.density[i, c]),
                        "dark": None if name == DENSE or math.isnan(value[i, c]) else bool(grid.dark[i, c]),
                    }
                    for c, t in enumerate(grid.targets)
                ],
            }
            for i, name in enumerate(grid.masks)
        ],
        "notes": list(notes(grid)),
    }  # fmt: skip


@dataclass(frozen=True)
class HeatMap:
    """The matrix as coloured cells: the metric, below it the Jaccard index; a frame around what is dark."""

    grid: Grid

    def __call__(self, figure: Figure, theme: Theme) -> None:
        """Draw on an empty figure."""
        from matplotlib.patches import Rectangle

        grid, axes = self.grid, figure.add_subplot()
        factors = np.array([s.factor if s.measure.higher_is_better else -s.factor for s in grid.shown])
        gaps = grid.difference * factors
        percent = all(shown.measure.percent for shown in grid.shown)
        if not percent:  # no common unit: each column by its own largest difference
            gaps = gaps / np.maximum(np.nanmax(np.abs(gaps), axis=0), 1e-12)
        image: Any = axes.imshow(gaps, cmap=theme.heat, interpolation="nearest", aspect="auto")
        for i, name in enumerate(grid.masks):
            for c in range(len(grid.targets)):
                dark = bool(grid.dark[i, c]) and name != DENSE
                if dark:
                    frame = (c - 0.46, i - 0.46), 0.92, 0.92
                    axes.add_patch(Rectangle(*frame, fill=False, edgecolor=theme.loss, linewidth=2))
                if len(grid.targets) > NUMBERS:
                    continue
                gap = gaps[i, c]
                high = not math.isnan(gap) and image.norm(gap) > 0.55
                how: dict[str, Any] = {"ha": "center", "va": "center", "color": theme.page if high else theme.ink}
                text, up = grid.shown[c].text(grid.value[i, c]), 0.12 if name != DENSE else 0.0
                axes.text(c, i - up, text, fontsize=10, fontweight="bold" if dark else "normal", **how)
                if name != DENSE and not math.isnan(grid.jaccard[i, c]):
                    axes.text(c, i + 0.27, f"{grid.jaccard[i, c]:.3f}", fontsize=7, **how)
            if name != DENSE:
                there = int((~np.isnan(grid.value[i])).sum())
                told = f"{int(grid.dark[i].sum())} of {there} dark"
                axes.text(len(grid.targets) - 0.4, i, told, fontsize=9, va="center", ha="left")
        long = any(len(name) > 10 for name in grid.names)
        axes.set_xticks(range(len(grid.targets)), grid.names, rotation=30 * long, ha="right" if long else "center")
        axes.set_yticks(range(len(grid.masks)), grid.masks)
        one = f"test {grid.shown[0].axis}" if len(set(grid.shown)) == 1 else "each client's metric on test data"
        guide = f"number: {one}\nsmall: Jaccard index with the column's own ticket\n"
        figure.suptitle(f"{guide}frame: dark, at least as good as that ticket", fontsize=8, x=0.02, ha="left")
        axes.set_xlabel("trained and tested on")
        axes.set_ylabel("mask")
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.12)
        unit = "points, up is better" if percent else "share of the column's largest, up is better"
        bar.set_label(f"less the dense twin\n({unit})")
        bar.outline.set_visible(False)


def picture(grid: Grid) -> Picture:
    """Return the matrix as a picture."""
    return Picture(
        TRANSFER, "Every mask on every client",
        "A cell's number is the metric, below it the Jaccard index of its mask with the column's own ticket; a framed "
        "cell is at least as good as that ticket.",
        3.6 + 1.05 * min(len(grid.targets), NUMBERS), 1.8 + 0.52 * len(grid.masks), HeatMap(grid),
    )  # fmt: skip


def _read(run: Path, cells: Sequence[Sequence[Cell]]) -> tuple[list[Header], Grid]:
    folders = [run] if (run / "header.json").exists() else [file.parent for file in run.glob("*/header.json")]
    headers = sorted(map(read_header, folders), key=lambda header: header.seed)
    return headers, grid_of(headers, cells)


def transfer_text(run: Path, cells: Sequence[Sequence[Cell]]) -> str:
    """Return the matrix and its notes in a terminal."""
    grid = _read(run, cells)[1]
    return "\n\n".join([aligned(matrix_table(grid)), *notes(grid)])


def write_transfer(run: Path, cells: Sequence[Sequence[Cell]]) -> Path:
    """Write RUN/transfer/transfer.json, .csv, .md and .png from the cells of each seed; return the last's path."""
    headers, grid = _read(run, cells)
    folder, table = run / TRANSFER, matrix_table(grid)
    write_file(folder / "transfer.json", (json.dumps(_record(headers, grid), indent=1) + "\n").encode())
    write_file(folder / "transfer.csv", csv_text(cells_table(grid)).encode())
    told = "\n".join(f"- {note}" for note in notes(grid))
    write_file(folder / "transfer.md", f"# {headers[0].study}: transfer matrix\n\n{markdown(table)}\n{told}\n".encode())
    write_file(folder / "transfer.png", drawn_png(picture(grid)))
    return folder / "transfer.png"
