"""The result table as aligned plain text, for the terminal after a run."""

from __future__ import annotations

from textwrap import fill

from fedlth.report.arms import arm_of
from fedlth.report.cost import cost_text
from fedlth.report.headline import against, honest_notes, numbers, overlapping, reached
from fedlth.report.results import Results
from fedlth.report.tables import Table
from fedlth.report.units import bounds, percent

WIDTH = 100


def aligned(table: Table) -> str:
    """Return the table as columns of text: words to the left, numbers to the right."""
    lines = (table.header, *table.rows)
    widths = [max(len(line[place]) for line in lines) for place in range(len(table.header))]

    def text(cells: tuple[str, ...]) -> str:
        padded = (
            cell.ljust(width) if place < table.left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(padded).rstrip()

    return "\n".join([text(table.header), "-" * (sum(widths) + 2 * (len(widths) - 1)), *map(text, table.rows)])


def terminal_table(results: Results) -> Table:
    """Return the columns that fit a terminal of a hundred characters."""
    header = ("arm", "density", "mean %", "95 % interval", "sd", "10th pct", "worst 10 %", "hurt %", "unseen %")
    rows = [
        (
            arm_of(found.choice.arm).label,
            found.density_text,
            percent(found.mean),
            bounds(found.interval),
            percent(found.standard_deviation),
            percent(found.p10),
            percent(found.worst_decile),
            percent(found.hurt_global, digits=0),
            percent(found.unseen),
        )
        for found in results.summaries
    ]
    return Table("Test accuracy over clients", header, tuple(rows))


def summary_text(results: Results) -> str:
    """Return the result of a run in a terminal's width: table, bytes, findings, notes."""
    header = results.group[0].header
    seeds = ", ".join(str(facts.header.seed) for facts in results.group)
    parts = [f"{header.study} · {header.method} · seed {seeds} · {header.num_clients} clients"]
    if results.summaries:
        parts.append(aligned(terminal_table(results)))
        parts.append("hurt: clients below the global model.  Test accuracy, read once at the end.")
    wire = [one for one in numbers(results) if one.label.startswith("payload")]
    parts.append("\n".join(f"{one.label}: {one.value}  ({one.small})" for one in wire))
    parts.append(fill(reached(results), WIDTH))
    rivals = against(results)
    if rivals.rows:
        parts.append(aligned(rivals))
    parts += [fill(text, WIDTH) for text in (overlapping(results), cost_text(results)) if text]
    notes = honest_notes(results)
    if notes:
        parts.append("\n".join(fill(f"note: {note}", WIDTH, subsequent_indent="      ") for note in notes))
    return "\n\n".join(parts) + "\n"
