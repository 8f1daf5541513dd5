"""From a drawing function to PNG or SVG bytes in a light or dark theme, without pyplot and its global state."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from fedlth.report.known_arms import Style, arm_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import LayoutEngine

DPI = 200  # of a PNG, and of the images inside an SVG


@dataclass(frozen=True)
class Theme:
    """The ground of a figure: page colour, ink, faint ink (rules, axes), and which of an arm's colours to use."""

    name: str
    page: str
    ink: str
    faint: str
    gain: str
    loss: str
    heat: str

    def style(self, arm: str) -> Style:
        """Return how `arm` is drawn."""
        return arm_of(arm).style

    def colour(self, arm: str) -> str:
        """Return the colour of `arm` on this ground."""
        style = self.style(arm)
        return style.light if self.name == "light" else style.dark

    def settings(self) -> dict[str, Any]:
        """Return matplotlib's rc settings of this theme."""
        return {
            "font.family": ["DejaVu Sans"],
            "font.size": 10,
            "axes.titlesize": 11,
            "axes.labelsize": 10,
            "figure.facecolor": self.page,
            "axes.facecolor": self.page,
            "savefig.facecolor": self.page,
            "text.color": self.ink,
            "axes.labelcolor": self.ink,
            "axes.edgecolor": self.faint,
            "xtick.color": self.ink,
            "ytick.color": self.ink,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.grid.axis": "y",
            "axes.axisbelow": True,
            "grid.color": self.faint,
            "grid.alpha": 0.35,
            "grid.linewidth": 0.6,
            "legend.frameon": False,
            "lines.linewidth": 1.8,
            "svg.fonttype": "path",  # the page then looks the same where DejaVu is not installed
            "svg.hashsalt": "fedlth",  # equal facts give equal files
        }


LIGHT = Theme("light", "#ffffff", "#1c1f23", "#9aa1a9", "#0067a5", "#c4500a", "Blues")
DARK = Theme("dark", "#1b1e23", "#e6e8eb", "#6b727b", "#5bb4f0", "#ff8f4d", "Blues_r")


@dataclass(frozen=True)
class Picture:
    """A figure that can be drawn in any theme: file name, title, one sentence on how to read it, size in inches."""

    name: str
    title: str
    guide: str
    width: float
    height: float
    draw: Callable[[Figure, Theme], None]


@dataclass(frozen=True)
class Drawn:
    """A picture, drawn: SVG for either colour scheme, and the PNG that stands beside the page."""

    picture: Picture
    light: bytes
    dark: bytes
    png: bytes


def drawn(picture: Picture) -> Drawn:
    """Return the picture in every form that a report needs; equal facts give equal bytes."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    # Written by the canvases: savefig would draw each figure a second time, unseen, to find its places again.
    light, dark = io.BytesIO(), io.BytesIO()
    with matplotlib.rc_context(cast(Any, LIGHT.settings())):  # its stub wants literal keys
        figure = _placed(picture)
        canvas: Any = FigureCanvasSVG(figure)
        canvas.print_svg(light, metadata={"Date": None})
        png = _png(figure)
    with matplotlib.rc_context(cast(Any, DARK.settings())):
        other, _ = _figure(picture, DARK)
        canvas = FigureCanvasSVG(other)
        _place(other, figure)
        canvas.print_svg(dark, metadata={"Date": None})
    return Drawn(picture, light.getvalue(), dark.getvalue(), png)


def drawn_png(picture: Picture) -> bytes:
    """Return the PNG alone, with the bytes that it has beside a page; the SVGs are two thirds of the time."""
    import matplotlib

    with matplotlib.rc_context(cast(Any, LIGHT.settings())):
        return _png(_placed(picture))


def _placed(picture: Picture) -> Figure:
    """Return the picture on the light ground, laid out."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    figure, layout = _figure(picture, LIGHT)
    FigureCanvasSVG(figure)
    layout.execute(figure)
    figure.set_layout_engine("none")
    figure.dpi = DPI  # an SVG's canvas leaves its own behind
    return figure


def _png(figure: Figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    png = io.BytesIO()
    figure.dpi = DPI
    canvas: Any = FigureCanvasAgg(figure)
    canvas.print_png(png, metadata={"Software": None})
    return png.getvalue()


def _figure(picture: Picture, theme: Theme) -> tuple[Figure, LayoutEngine]:
    """Return the picture in a theme, with the layout that has not been made yet."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    figure = Figure(figsize=(picture.width, picture.height), dpi=DPI, layout=layout)
    picture.draw(figure, theme)
    return figure, layout


def _place(figure: Figure, other: Figure) -> None:
    """Put everything where a figure of the same picture has it: finding the places is a third of the time."""
    figure.set_layout_engine("none")
    for axes, there in zip(figure.axes, other.axes, strict=True):
        axes.set_position(there.get_position(original=True))
        axes.set_anchor(there.get_anchor())
        axes.set_box_aspect(there.get_box_aspect())
        axes.set_aspect(there.get_aspect())
    for text, like in zip(figure.texts, other.texts, strict=True):
        text.set_position(like.get_position())


def spread(places: Sequence[float], *, gap: float) -> list[float]:
    """Return places moved apart, in the same order, so that neighbours lie at least `gap` apart (labels at lines)."""
    order = sorted(range(len(places)), key=lambda item: places[item])
    groups: list[list[int]] = []
    centres: list[float] = []
    for item in order:
        groups.append([item])
        centres.append(places[item])
        # a run of labels that touch is centred on the mean of its places
        while len(groups) > 1:
            room = gap * (len(groups[-2]) + len(groups[-1])) / 2
            if centres[-1] - centres[-2] >= room:
                break
            merged = groups[-2] + groups[-1]
            groups[-2:], centres[-2:] = [merged], [sum(places[one] for one in merged) / len(merged)]
    moved = [0.0] * len(places)
    for members, centre in zip(groups, centres, strict=True):
        for rank, item in enumerate(members):
            moved[item] = centre + gap * (rank - (len(members) - 1) / 2)
    return moved


def end_labels(axes: Axes, labels: Sequence[tuple[float, str, str]], *, gap: float) -> None:
    """Write (height, text, colour) labels right of the axes, moved apart to stay `gap` data units from each other."""
    heights = spread([height for height, _, _ in labels], gap=gap)
    for (height, text, colour), moved in zip(labels, heights, strict=True):
        axes.annotate(
            text, xy=(1, height), xytext=(1.06, moved), xycoords=axes.get_yaxis_transform(),
            textcoords=axes.get_yaxis_transform(), color=colour, va="center", ha="left", fontsize=9,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.8, "alpha": 0.6, "shrinkA": 1, "shrinkB": 1},
            annotation_clip=False,
        )  # fmt: skip
