"""The colours of a figure, for light and dark pages, told apart by the colour-blind (after Okabe and Ito)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Style:
    """How one arm is drawn. Marker and dashes say the same as the colour, for print without colour."""

    light: str
    dark: str
    marker: str
    dashes: str = "-"


_STYLES = {
    "ticket": Style("#0067a5", "#5bb4f0", "o"),
    "refined": Style("#5b3fa0", "#b39bf0", "h"),
    "own_tuned": Style("#0067a5", "#5bb4f0", "o"),
    "own": Style("#3a3f8f", "#9aa2ff", "p"),
    "ticket_0": Style("#3f97c9", "#9fd8ff", "s", "--"),
    "one_shot": Style("#00815f", "#2fc79b", "^"),
    "global_mask": Style("#c4500a", "#ff8f4d", "D"),
    "random": Style("#7a7a7a", "#a8a8a8", "v", ":"),
    "own_random": Style("#7a7a7a", "#a8a8a8", "v", ":"),
    "frozen_random": Style("#7a7a7a", "#a8a8a8", "v", ":"),
    "dense": Style("#1a1a1a", "#f0f0f0", "*"),
    "dense_total": Style("#555555", "#c8c8c8", "*", "-."),
    "local": Style("#a87500", "#e8b93c", "P", "--"),
    "global": Style("#a8487c", "#ec94c0", "X", "-."),
}


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
        """Return how `arm` is drawn; an unknown arm is drawn in ink."""
        return _STYLES.get(arm, Style("#1a1a1a", "#f0f0f0", "o"))

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
