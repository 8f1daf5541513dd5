"""The figures of the tickets themselves: where they keep weights, and how far they overlap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedlth.report.canvas import Theme
from fedlth.report.overlap import Overlap

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class LayerDensity:
    """Density by layer: the mean over clients and the range from the sparsest to the densest client."""

    overlap: Overlap

    def __call__(self, figure: Figure, theme: Theme) -> None:
        """Draw on an empty figure."""
        axes = figure.add_subplot()
        names = list(self.overlap.layer_density)
        values = [100 * self.overlap.layer_density[name] for name in names]
        y = np.arange(len(names))
        colour = theme.colour("ticket")
        axes.hlines(y, [v.min() for v in values], [v.max() for v in values], color=colour, linewidth=5, alpha=0.35)
        axes.plot([v.mean() for v in values], y, "o", color=colour, markersize=7)
        for place, one in enumerate(values):
            axes.annotate(f"{one.mean():.1f} %", (1.01, place), xycoords=axes.get_yaxis_transform(), va="center",
                          fontsize=9, annotation_clip=False)  # fmt: skip
        axes.axvline(100 * self.overlap.density, color=theme.ink, linewidth=1, linestyle="--")
        axes.annotate("whole ticket", (100 * self.overlap.density, 1), (4, 3), xycoords=("data", "axes fraction"),
                      textcoords="offset points", fontsize=9)  # fmt: skip
        axes.set_yticks(y, names)
        axes.invert_yaxis()
        axes.set_xlim(0, max(v.max() for v in values) * 1.12)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlabel("weights kept (%)")
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", visible=True)


def cluster_order(similarity: NDArray[np.float64]) -> list[int]:
    """Return an order of clients that puts alike labels side by side (average linkage, optimal leaf order)."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    if len(similarity) < 3:
        return list(range(len(similarity)))
    apart = np.clip(1 - similarity, 0, None)
    apart = (apart + apart.T) / 2
    np.fill_diagonal(apart, 0)
    # the optimal order is cubic in clients, and past a few hundred the eye cannot tell
    tree = linkage(squareform(apart, checks=False), "average", optimal_ordering=len(similarity) <= 200)
    return [int(leaf) for leaf in leaves_list(tree)]


@dataclass(frozen=True)
class OverlapMaps:
    """Two matrices side by side in one client order: label similarity and ticket overlap."""

    overlap: Overlap

    def __call__(self, figure: Figure, theme: Theme) -> None:
        """Draw on an empty figure."""
        order = cluster_order(self.overlap.similarity)
        left, right = figure.subplots(1, 2)
        clients = [str(self.overlap.clients[place]) for place in order]
        # the diagonal is 1 by definition; left out, the scale spans what the pairs really do
        for axes, matrix, title in (
            (left, self.overlap.similarity, "label similarity"),
            (right, self.overlap.jaccard, "ticket overlap (Jaccard)"),
        ):
            shown = matrix[np.ix_(order, order)].copy()
            np.fill_diagonal(shown, np.nan)
            image = axes.imshow(shown, cmap=theme.heat, interpolation="nearest")
            axes.set_title(title)
            axes.grid(visible=False)
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0)
            axes.set_facecolor(theme.page)
            ticks = range(len(clients)) if len(clients) <= 30 else []
            axes.set_xticks(ticks, [clients[t] for t in ticks], rotation=90, fontsize=7)
            axes.set_yticks(ticks, [clients[t] for t in ticks], fontsize=7)
            axes.set_xlabel("client, similar labels side by side")
            bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02)
            bar.outline.set_visible(False)


@dataclass(frozen=True)
class OverlapScatter:
    """Ticket overlap against label similarity, one dot a pair of clients, with the chance line."""

    overlap: Overlap

    def __call__(self, figure: Figure, theme: Theme) -> None:
        """Draw on an empty figure."""
        axes = figure.add_subplot()
        x, y = self.overlap.pairs(self.overlap.similarity), self.overlap.pairs(self.overlap.jaccard)
        axes.plot(
            x, y, "o", color=theme.colour("ticket"), markersize=4 if len(x) < 500 else 2.5,
            alpha=0.5 if len(x) < 500 else 0.25, markeredgewidth=0, rasterized=len(x) > 500,
        )  # fmt: skip
        edges = np.linspace(x.min(), x.max() + 1e-9, 9)
        bins = np.digitize(x, edges)
        means = [(x[bins == b].mean(), y[bins == b].mean()) for b in range(1, 9) if (bins == b).sum() >= 3]
        if len(means) > 1:
            axes.plot(
                *zip(*means, strict=True),
                color=theme.ink,
                linewidth=1.8,
                label="mean over pairs with about equal labels",
            )
        fair = float(self.overlap.pairs(self.overlap.chance).mean())
        axes.axhline(fair, color=theme.loss, linestyle="--", linewidth=1.4, label="chance, layer by layer")
        axes.axhline(self.overlap.plain_chance, color=theme.loss, linestyle=":", linewidth=1.4,
                     label="chance, density alone")  # fmt: skip
        low = min(self.overlap.plain_chance, fair, y.min())
        axes.set_ylim(low - 0.06 * (y.max() - low), y.max() + 0.06 * (y.max() - low))
        axes.set_xlabel("label similarity of two clients (1: equal shares, 0: no class in common)")
        axes.set_ylabel("ticket overlap (Jaccard)")
        figure.legend(loc="outside upper left", ncols=3, fontsize=9)
