"""The figures of a lottery study: accuracy and speed by density, curves, and what the probes measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlth.report.canvas import Picture, Theme, end_labels
from fedlth.report.lottery_facts import Cell, LotteryFacts, over_seeds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The n-th line of a figure is drawn like this arm of a federated report.
LOOKS = ("ticket", "global_mask", "random", "one_shot", "local", "global", "refined", "own", "dense", "ticket_0")


def look(place: int) -> str:
    return LOOKS[place % len(LOOKS)]


@dataclass(frozen=True)
class ByDensity:
    """One number of every arm against density: mean over seeds, the band from the least seed to the most."""

    facts: LotteryFacts
    key: str
    label: str
    scale: float = 1.0

    def __call__(self, figure: Figure, theme: Theme) -> None:
        """Draw on an empty figure."""
        axes = figure.add_subplot()
        labels: list[tuple[float, str, str]] = []
        for place, arm in enumerate(swept(self.facts, self.key)):
            cells = sorted(self.facts.of(arm), key=lambda cell: -cell.density)
            style, colour = theme.style(look(place)), theme.colour(look(place))
            x = [float(-np.log2(cell.density)) for cell in cells]
            values = self.scale * np.array([cell.values(self.key) for cell in cells])
            axes.fill_between(x, values.min(1), values.max(1), color=colour, alpha=0.13, linewidth=0)
            axes.plot(x, values.mean(1), color=colour, marker=style.marker, linestyle=style.dashes, markersize=4.5)
            labels.append((float(values[-1].mean()), arm, colour))
        dense = next((cell for name in self.facts.arms if (cell := self.facts.cell(name, 0))), None)
        level = self.scale * (dense or max(self.facts.cells, key=lambda cell: cell.mean(self.key))).mean(self.key)
        if dense is not None:
            axes.axhline(level, color=theme.faint, linewidth=1, linestyle="--")
        _density_ticks(axes, self.facts.cells)
        axes.set_ylabel(self.label)
        if self.scale == 100.0:  # an arm that collapses must not flatten all others
            low = max(axes.get_ylim()[0], level - 12)
            axes.set_ylim(low, axes.get_ylim()[1])
            labels = [(max(height, low), text, colour) for height, text, colour in labels]
        low, high = axes.get_ylim()
        end_labels(axes, labels, gap=(high - low) * 0.055)
        axes.set_ylim(low, high)


def swept(facts: LotteryFacts, key: str) -> list[str]:
    """Return the arms with a line to draw: three densities or more (or all there is), and some number above 0."""
    lines = [arm for arm in facts.arms if max(cell.values(key).max() for cell in facts.of(arm)) > 0]
    return [arm for arm in lines if len(facts.of(arm)) >= 3] or lines


@dataclass(frozen=True)
class AtRound:
    """Every arm at one round: a dot a seed, a bar at the mean, the best on top; the line is the search's own ticket."""

    facts: LotteryFacts
    search: str
    round: int

    def __call__(self, figure: Figure, theme: Theme) -> None:
        """Draw on an empty figure."""
        axes = figure.add_subplot()
        cells = sorted(at_round(self.facts, self.search, self.round), key=lambda cell: cell.mean("test_accuracy"))
        for place, cell in enumerate(cells):
            colour = theme.gain if cell.arm == self.search else theme.ink
            values = 100 * cell.values("test_accuracy")
            axes.plot(values, [place] * len(values), "o", color=colour, markersize=4.5, alpha=0.55, markeredgewidth=0)
            axes.plot([values.mean()] * 2, [place - 0.32, place + 0.32], color=colour, linewidth=2.2)
        own = next(cell for cell in cells if cell.arm == self.search)
        axes.axvline(100 * own.mean("test_accuracy"), color=theme.gain, linewidth=1, linestyle="--", alpha=0.6)
        axes.set_yticks(range(len(cells)), [cell.arm for cell in cells], fontsize=9)
        axes.grid(axis="x", visible=True)
        axes.set_xlabel("test accuracy (%)")


def at_round(facts: LotteryFacts, search: str, round: int) -> list[Cell]:
    """Return the cells of a search and of all arms under its mask at one round."""
    arms = [name for name, arm in facts.config["arms"].items() if arm["of"] == search]
    return [cell for name in (search, *arms) if (cell := facts.cell(name, round)) is not None]


@dataclass(frozen=True)
class Curves:
    """Validation loss of the first search along the training, one line a density."""

    facts: LotteryFacts

    def __call__(self, figure: Figure, theme: Theme) -> None:
        """Draw on an empty figure."""
        axes = figure.add_subplot()
        cells = self.facts.of(self.facts.arms[0])
        chosen = sorted({round(i) for i in np.linspace(0, len(cells) - 1, min(6, len(cells)))})
        for place, number in enumerate(chosen):
            cell = cells[number]
            curves = _together([row["curve"] for row in cell.rows])
            if not curves.size:  # a seed diverged before it was evaluated
                continue
            colour = theme.colour(look(place))
            x, mean = curves[0, :, 0], curves[:, :, 1].mean(0)
            axes.plot(x, mean, color=colour, linestyle=theme.style(look(place)).dashes, linewidth=1.5,
                      label=f"density {cell.density:.3g}")  # fmt: skip
            axes.plot(x[mean.argmin()], mean.min(), "o", color=colour, markersize=6)
        axes.set_xlabel("iteration")
        axes.set_ylabel("validation loss")
        if axes.lines:
            axes.legend(fontsize=9, ncols=2)


def _together(curves: Sequence[Sequence[Sequence[float]]]) -> np.ndarray:
    """Return seeds' curves (seeds, points, 3) where all were evaluated: one that diverged is shorter."""
    common = set.intersection(*({point[0] for point in curve} for curve in curves))
    return np.array([[point for point in curve if point[0] in common] for curve in curves])


@dataclass(frozen=True)
class Lines:
    """A probe's numbers as lines: `y` against `x`, one line for each combination of the `by` columns."""

    rows: Sequence[dict[str, Any]]
    x: str
    y: str
    by: tuple[str, ...]

    def __call__(self, figure: Figure, theme: Theme) -> None:
        """Draw on an empty figure."""
        axes = figure.add_subplot()
        groups: dict[str, list[tuple[float, np.ndarray]]] = {}
        for row in self.rows:
            name = ", ".join(f"{key} {row[key]}".replace("_", " ") for key in self.by) or self.y
            groups.setdefault(name, []).append((float(row[self.x]), np.atleast_1d(row[self.y])))
        for place, (name, points) in enumerate(groups.items()):
            style, colour = theme.style(look(place)), theme.colour(look(place))
            points.sort(key=lambda point: point[0])
            x = [at for at, _ in points]
            axes.fill_between(x, [v.min() for _, v in points], [v.max() for _, v in points], color=colour, alpha=0.13)
            axes.plot(x, [v.mean() for _, v in points], color=colour, marker=style.marker, markersize=4,
                      linestyle=style.dashes, label=name)  # fmt: skip
        axes.set_xlabel(self.x.replace("_", " "))
        axes.set_ylabel(self.y.replace("_", " "))
        if len(groups) > 1:
            figure.legend(loc="outside upper left", fontsize=8, ncols=3)


@dataclass(frozen=True)
class Heat:
    """A probe's numbers as a matrix, mean over seeds, each written into its cell; `across` 0 is white."""

    rows: Sequence[dict[str, Any]]
    down: str
    over: str
    value: str

    def __call__(self, figure: Figure, theme: Theme) -> None:
        """Draw on an empty figure."""
        axes = figure.add_subplot()
        downs = list(dict.fromkeys(str(row[self.down]) for row in self.rows))
        overs = list(dict.fromkeys(str(row[self.over]) for row in self.rows))
        grid = np.full((len(downs), len(overs)), np.nan)
        for row in self.rows:
            grid[downs.index(str(row[self.down])), overs.index(str(row[self.over]))] = float(np.mean(row[self.value]))
        image = axes.imshow(grid, cmap=theme.heat, interpolation="nearest", aspect="auto")
        middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
        if grid.size <= 150:
            for (i, j), value in np.ndenumerate(grid):
                dark = (value > middle) == (theme.name == "light")
                ink = "#ffffff" if dark else "#1c1f23"
                if np.isfinite(value):
                    axes.text(j, i, f"{value:.2g}", ha="center", va="center", fontsize=8, color=ink)
        axes.grid(visible=False)
        axes.set_xticks(range(len(overs)), overs, rotation=45 if max(map(len, overs)) > 4 else 0, fontsize=8)
        axes.set_yticks(range(len(downs)), downs, fontsize=8)
        axes.set_xlabel(self.over.replace("_", " "))
        axes.set_ylabel(self.down.replace("_", " "))
        bar: Any = figure.colorbar(image, ax=axes, shrink=0.85, pad=0.02)
        bar.outline.set_visible(False)
        bar.set_label(self.value.replace("_", " "), fontsize=9)


# Which probes have a picture: the drawing, its columns, and how to read it.
DRAWN: dict[str, tuple[str, tuple[Any, ...], str]] = {
    "instability": (
        "lines", ("alpha", "error", ("density", "rewind_step")),
        "Test error on the straight line between two copies trained in different orders: flat means that both are in "
        "one basin; a hump is the barrier.",
    ),
    "settling": (
        "heat", ("iteration", "other", "distance"),
        "Share of weights in which the masks drawn at two iterations differ: once the ticket has settled, the square "
        "towards the lower right is pale.",
    ),
    "attack": (
        "lines", ("eps", "robust_accuracy", ("network", "attack")),
        "Accuracy on attacked test images by strength in pixels of [0, 1].",
    ),
}  # fmt: skip


def lottery_pictures(facts: LotteryFacts) -> tuple[Picture, ...]:
    """Return the figures that these facts allow, in reading order."""
    found: list[Picture] = []
    if facts.cells:
        found.append(Picture(
            "accuracy_by_density", "Occam's hill: accuracy at the early-stop iteration",
            "Test accuracy where the validation loss was lowest; sparser is to the right, a dashed line is the "
            "dense network. Lines are means over seeds, bands reach from the lowest seed to the highest; arms at fewer "
            "than three densities are in the table only.",
            8.6, 4.6, ByDensity(facts, "test_accuracy", "test accuracy (%)", 100.0),
        ))  # fmt: skip
        for search in facts.config["searches"]:
            numbers = [cell.round for cell in facts.of(search) if cell.round]
            most = max(numbers, key=lambda n: (len(at_round(facts, search, n)), n), default=0)  # the sparsest of them
            cells = at_round(facts, search, most)
            if len(cells) > 2:
                found.append(Picture(
                    f"controls_{search}", f"{search} and its arms at density {cells[0].density:.3g}",
                    "A dot is a seed, the bar their mean; the dashed line is the search's own ticket.",
                    8.6, 1.1 + 0.3 * len(cells), AtRound(facts, search, most),
                ))  # fmt: skip
        found.append(Picture(
            "early_stop_by_density", "How fast each learns: the early-stop iteration",
            "The iteration of least validation loss, found afterwards; lower is faster.",
            8.6, 4.2, ByDensity(facts, "early_stop", "early-stop iteration"),
        ))  # fmt: skip
        found.append(Picture(
            "validation_loss", f"Validation loss along the training: {facts.arms[0]}",
            "Mean over seeds; the dot is the lowest point of the line.", 8.6, 4.0, Curves(facts),
        ))  # fmt: skip
    for probe, rows in facts.probes.items():
        if facts.part(probe) in DRAWN:
            kind, columns, guide = DRAWN[facts.part(probe)]
            merged = over_seeds(rows)
            draw = Lines(merged, *columns) if kind == "lines" else Heat(merged, *columns)
            found.append(Picture(f"probe_{probe}", probe.replace("_", " "), guide, 8.6, 4.2, draw))
    return tuple(found)


def _density_ticks(axes: Axes, cells: Sequence[Cell]) -> None:
    ends = [float(-np.log2(cell.density)) for cell in cells]
    ticks = [d for d in (1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001) if -np.log2(d) <= max(ends) + 0.1]
    axes.set_xticks([float(-np.log2(d)) for d in ticks], [f"{d:g}" for d in ticks])
    axes.set_xlabel("density (share of prunable weights kept; sparser to the right)")
