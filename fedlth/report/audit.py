"""The files of an audit: audit.json, audit.md, audit.csv and label_inference.png in RUN/audit."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlth.report.audit_statistics import Score, defended, linked, membership, scores
from fedlth.report.audit_tables import notes, tables
from fedlth.report.build import write_file
from fedlth.report.canvas import Picture, Theme, drawn_png
from fedlth.report.intervals import Interval
from fedlth.report.tables import Table, aligned, csv_text, markdown
from fedlth.storage.audit_records import ALL, AUDIT, HIDDEN, NONE, Audit

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def audit_text(audit: Audit) -> str:
    """Return an audit's tables and notes in a terminal."""
    return "\n\n".join([*(f"{t.title}\n{aligned(t)}" for t in tables(audit).values()), *notes(audit)])


def write_audit(run: Path, audit: Audit) -> Path:
    """Write the four files; return the path of audit.md."""
    folder = run / AUDIT
    write_file(folder / "audit.json", (json.dumps(record(audit), indent=1, allow_nan=False) + "\n").encode())
    write_file(folder / "audit.csv", csv_text(values_table(audit)).encode())
    write_file(folder / "label_inference.png", drawn_png(picture(audit)))
    parts = [f"## {table.title}\n\n{markdown(table)}" for table in tables(audit).values()]
    told = "\n".join(f"- {note}" for note in notes(audit))
    text = "\n".join([f"# {audit.study}: what its tickets disclose\n", *parts, f"## How to read it\n\n{told}\n"])
    write_file(folder / "audit.md", text.encode())
    return folder / "audit.md"


def record(audit: Audit) -> dict[str, Any]:
    """Return an audit as plain values: means with intervals, and each victim's own."""
    link = linked(audit)
    return {
        "study": audit.study, "method": audit.method, "seed": audit.seed, "density": audit.density,
        "shadows": audit.num_shadows, "victims": list(audit.victims), "applied": audit.applied,
        "label_inference": [
            {"defence": one.defence, "attack": one.attack, "mean": one.mean, **_ends(one.interval),
             "chance": one.chance, "victims": one.victims}
            for one in scores(audit.guesses).values()
        ],
        "defences": [
            {"defence": one.name, "epsilon_per_bit": one.epsilon, "test_accuracy": one.accuracy,
             "density": one.density, "mask_bytes": one.mask_bytes, "diverged": one.diverged}
            for one in defended(audit)
        ],
        "membership": [
            {"model": one.model, "attack": one.attack, "auc": one.auc, "tpr_at_1_percent_fpr": one.found_at_low,
             "mean_own_auc": one.own_auc, **_ends(one.interval), "members": one.examples, "others": one.others}
            for one in membership(audit)
        ],
        "linked": None if link is None else {
            "share": link.share, **_ends(link.interval), "chance": link.chance, "jaccard_own": link.own,
            "jaccard_best_other": link.best_other, "masks": link.victims,
        },
        "secure_sum": [asdict(one) for one in audit.coverages],
        "guesses": [
            [one.defence, one.attack, one.victim, one.hits, one.num_true, one.num_classes] for one in audit.guesses
        ],
        "notes": list(notes(audit)),
    }  # fmt: skip


def _ends(found: Interval) -> dict[str, float | None]:
    return {k: None if math.isnan(v) else v for k, v in (("low", found.low), ("high", found.high))}


def values_table(audit: Audit) -> Table:
    """Return one row a number, in plain numbers, for programs."""
    header = ("what", "of", "attack", "value", "low", "high", "chance")

    def row(what: str, of: str, attack: str, value: float | None, ends: Interval | None, chance: float | None) -> Any:
        low, high = (None, None) if ends is None else (ends.low, ends.high)
        told = (value, low, high, chance)
        return what, of, attack, *("" if v is None or math.isnan(v) else repr(float(v)) for v in told)

    def rows() -> Iterator[Any]:
        for one in scores(audit.guesses).values():
            yield row("classes right", one.defence, one.attack, one.mean, one.interval, one.chance)
        for price in defended(audit):
            yield row("test accuracy", price.name, "", price.accuracy, None, None)
            yield row("density", price.name, "", price.density, None, None)
            yield row("mask bytes", price.name, "", price.mask_bytes, None, None)
            yield row("epsilon per bit", price.name, "", price.epsilon, None, None)
        for found in membership(audit):
            yield row("AUC", found.model, found.attack, found.auc, None, 0.5)
            yield row("AUC of a victim", found.model, found.attack, found.own_auc, found.interval, 0.5)
            yield row("TPR at 1 % FPR", found.model, found.attack, found.found_at_low, None, 0.01)
        if (link := linked(audit)) is not None:
            yield row("recognised", "second search", "", link.share, link.interval, link.chance)

    return Table("Audit, a row a number", header, tuple(rows()), left=3)


@dataclass(frozen=True)
class Bars:
    """Every attack and defence as a row: the mean with its interval, and a line at chance."""

    rows: tuple[tuple[str, Score | None, Score | None], ...]

    def __call__(self, figure: Figure, theme: Theme) -> None:
        """Draw on an empty figure."""
        axes = figure.add_subplot()
        styles = ((1, "all bits", theme.gain, "o"), (2, "hidden layers alone", theme.loss, "s"))
        for place, one in enumerate(self.rows):
            for side, label, colour, marker in styles:
                score = one[side]
                if not isinstance(score, Score):
                    continue
                at = place + (0.16 if side == 2 else -0.16 if one[2] is not None else 0.0)
                if one[2] is None:  # an attack that looks at other bits
                    colour, label = theme.ink, "the bits or labels named"
                if not math.isnan(score.interval.low):
                    axes.plot([score.interval.low, score.interval.high], [at, at], color=colour, lw=1.6, alpha=0.7)
                axes.plot([score.mean], [at], marker, color=colour, ms=6, ls="none", label=label)
        chances = [s.chance for _, *both in self.rows for s in both if s is not None]
        if chances:
            axes.axvline(sum(chances) / len(chances), color=theme.ink, lw=1, ls="--")
            axes.text(sum(chances) / len(chances), -0.75, "chance", ha="center", va="bottom", fontsize=8)
        axes.set_yticks(range(len(self.rows)), [name for name, *_ in self.rows])
        axes.set_ylim(len(self.rows) - 0.4, -0.6)
        axes.set_xlim(0, 1.02)
        axes.set_xlabel("share of a client's classes that the attacker names")
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", visible=True)
        handles, labels = axes.get_legend_handles_labels()
        seen = dict(zip(labels, handles, strict=True))
        axes.legend(seen.values(), seen.keys(), loc="lower right", fontsize=8)


def picture(audit: Audit) -> Picture:
    """Return what attackers read from masks, without and with each defence, as a picture."""
    found = scores(audit.guesses)
    rows: list[tuple[str, Score | None, Score | None]] = []
    for defence, attack in found:
        if defence == NONE and attack not in (ALL, HIDDEN):
            rows.append((f"no defence: {attack}", found[defence, attack], None))
        elif attack == ALL:
            name = "no defence" if defence == NONE else defence
            rows.append((name, found[defence, ALL], found.get((defence, HIDDEN))))
    return Picture(
        "label_inference", "Classes read from mask bits",
        "Each row is an attack or a defence: the mean share of a client's classes that the attacker names from mask "
        "bits alone, with a 95 % bootstrap interval over clients; the dashed line is chance.",
        7.5, 1.2 + 0.36 * len(rows), Bars(tuple(rows)),
    )  # fmt: skip
