"""The result tables as rows of text, and rows of text as Markdown, LaTeX (booktabs) and CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedlth.report.choice import baseline_of, rows_of
from fedlth.report.known_arms import arm_of
from fedlth.report.measure import Shown, others_of
from fedlth.report.results import Results, TaskResults, dense_flops, inference_flops_effective
from fedlth.report.statistics import ArmSummary
from fedlth.report.traffic import Flow
from fedlth.report.units import NOTHING, count, percent, scaled


@dataclass(frozen=True)
class Table:
    """A table of text: header (columns,), rows (rows, columns); `left` counts the columns that hold words."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1

    def columns(self, names: Sequence[str]) -> Table:
        """Return the table with only these columns, in this order."""
        places = [self.header.index(name) for name in names]
        rows = tuple(tuple(row[place] for place in places) for row in self.rows)
        return Table(self.title, tuple(names), rows, sum(place < self.left for place in places))


WIDTH = 100  # of a terminal
FURTHER = "further metrics"
COST = ("search + tune epochs", "train FLOPs", "train effective", "inference FLOPs", "inference effective")


def summary_header(results: Results) -> tuple[str, ...]:
    """Return what the summary's columns are called: what came out, further metrics, and last COST."""
    shown = results.shown
    return (
        "arm", "density", f"mean {shown.column}", "95 % interval", "sd", shown.tail, "worst decile",
        "hurt vs global %", "hurt vs local %", f"unseen {shown.column}", "diverged",
        *(f"{other.label}{other.unit}" for other in others_of(results.group)), *COST,
    )  # fmt: skip


def summary_table(results: Results) -> Table:
    """Return one row an arm and density: the study's metric over clients, harm, and what it cost a client."""
    dense = float(np.mean([dense_flops(facts.header) for facts in results.group]))
    rows, shown, others = [], results.shown, others_of(results.group)
    for found in results.summaries:
        cells = (
            arm_of(found.choice.arm).label,
            found.density_text,
            shown.text(found.mean),
            shown.bounds(found.interval),
            shown.text(found.standard_deviation),
            shown.text(found.tail),
            shown.text(found.worst_decile),
            percent(found.hurt_global, digits=0),
            percent(found.hurt_local, digits=0),
            shown.text(found.unseen),
            str(found.diverged),
            *(other.text(value) for other, value in zip(others, found.others, strict=True)),
            f"{count(found.search_epochs)} + {count(found.epochs)}",
            scaled(found.train_flops, "") if found.train_flops else NOTHING,
            scaled(found.train_flops_effective, "") if found.train_flops_effective else NOTHING,
            scaled(dense or None, ""),
            scaled(inference_flops_effective(results, found.choice), ""),
        )
        rows.append(cells)
    title = f"Test {shown.label} over clients, by arm and density"
    return Table(title, summary_header(results), tuple(rows))


def tasks_table(results: Results, *, arms: Sequence[str] | None = None) -> Table:
    """Return a block of rows for each task, one row an arm (of `arms`, or every one) and density over its clients."""
    rows, further = [], any(task.others for task in results.tasks)
    for task in results.tasks:
        for found in task.summaries:
            if arms is None or found.choice.arm in arms or found.choice == results.main:
                rows.append((
                    task.name, task.shown.label, str(task.num_clients), str(task.num_classes),
                    arm_of(found.choice.arm).label, found.density_text, _with_unit(task.shown, found.mean),
                    task.shown.bounds(found.interval), _with_unit(task.shown, found.standard_deviation),
                    percent(found.hurt_global, digits=0), _with_unit(task.shown, found.unseen),
                    *([_further(task, found)] if further else ()),
                ))  # fmt: skip
    header = ("task", "metric", "clients", "outputs", "arm", "density", "mean", "95 % interval", "sd", "hurt %",
              "unseen", *([FURTHER] if further else ()))  # fmt: skip
    return Table("Test results over the clients of each task", header, tuple(rows), left=2)


def _further(task: TaskResults, found: ArmSummary) -> str:
    told = [f"{one.label} {_with_unit(one, value)}" for one, value in zip(task.others, found.others, strict=True)]
    return ", ".join(told) or NOTHING


def _with_unit(shown: Shown, value: float | None) -> str:
    text = shown.text(value)
    return text if text == NOTHING else f"{text}{shown.unit}"


def clients_table(results: Results) -> Table:
    """Return one row a client (and seed): its data, the baselines and the main arm."""
    shown = results.shown
    arms = [arm for arm in ("global", "local", "dense") if baseline_of(results.group, arm)]
    chosen = [found for arm in arms if (found := baseline_of(results.group, arm)) and found != results.main]
    main = [results.main] if results.main else []
    names = [arm_of(choice.arm).label for choice in (*chosen, *main)]
    column = f" {shown.column}" if results.one_metric else ""  # else each client has its own task's
    header = ("seed", "client", "unseen", "train examples", "classes", *(f"{name}{column}" for name in names))
    own = ("density",) if results.main and results.main.chosen else ()
    rows = []
    for facts in results.group:
        tables = [rows_of(facts, choice) for choice in (*chosen, *main)]
        for client in sorted(set().union(*tables)):
            held = [table.get(client) for table in tables]
            known = next(row for row in held if row is not None)
            labels = facts.header.client_labels
            held_labels = labels[client] if client < len(labels) else []  # real numbers have none
            classes = str(sum(number > 0 for number in held_labels)) if held_labels else NOTHING
            of = Shown(facts.header.judges(client))
            values = (of.text(of.of(row) if row else None) for row in held)
            place = (str(facts.header.seed), str(client), "yes" if known.unseen else "no")
            last = tuple(f"{held[-1].density:.3g}" if held[-1] else NOTHING for _ in own)
            rows.append((*place, str(known.num_train), classes, *values, *last))
    title = (
        f"Test {shown.label} of every client" if results.one_metric else "Every client on its test data, by its metric"
    )
    return Table(title, (*header, *own), tuple(rows), left=0)


def chosen_table(results: Results) -> Table:
    """Return how many clients keep a ticket of each density, where each has one of its own; else no rows."""
    shown = results.shown
    header = ("density", "clients", "share %", f"mean {shown.column}")
    if results.main is None or not results.main.chosen:
        return Table("", header, ())
    held = [(facts.chosen[c], row) for facts in results.group for c, row in rows_of(facts, results.main).items()]
    rows = []
    for density in sorted({density for density, _ in held}, reverse=True):
        got = [shown.of(row) for one, row in held if one == density]
        share, number = percent(len(got) / len(held)), count(len(got) / len(results.group))
        rows.append((f"{density:.3g}", number, share, shown.text(float(np.mean(got)))))
    return Table("The densities that clients keep", header, tuple(rows))


def bytes_table(results: Results) -> Table:
    """Return the wire in bytes, mean over seeds: totals, by kind, by phase, refused, and the dense baseline."""

    def row(name: str, flows: list[Flow]) -> tuple[str, ...]:
        means = [float(np.mean([getattr(flow, key) for flow in flows])) for key in ("up_bytes", "down_bytes")]
        number = float(np.mean([flow.messages for flow in flows]))
        both = float(np.mean([flow.total_bytes for flow in flows]))
        return (name, count(number), *(scaled(mean, "B") for mean in (*means, both)))

    all_of = results.traffics
    nothing = Flow(0, 0, 0)
    rows = [row("all messages, each receiver counted", [one.unicast for one in all_of])]
    rows.append(row("the same, a broadcast counted once", [one.once for one in all_of]))
    for phase in dict.fromkeys(phase for one in all_of for phase in one.by_phase):
        rows.append(row(f"phase: {phase}", [one.by_phase.get(phase, nothing) for one in all_of]))
    for kind in sorted({kind for one in all_of for kind in one.by_kind}):
        rows.append(row(f"kind: {kind}", [one.by_kind.get(kind, nothing) for one in all_of]))
    rows.append(row("of these refused or failed", [one.refused for one in all_of]))
    nodes = {"a client" if name.startswith("client") else f"the {name}" for name, _ in (one.busiest for one in all_of)}
    rows.append(row(f"the busiest node, {' or '.join(sorted(nodes))}", [one.busiest[1] for one in all_of]))
    if any(one.late.messages for one in all_of):
        rows.append(row("of these after the deadline", [one.late for one in all_of]))
    dense = [float(np.mean([getattr(one, key) for one in all_of])) for key in ("dense_up_bytes", "dense_down_bytes")]
    rows.append(("dense FedAvg for the same visits", NOTHING, *(scaled(mean, "B") for mean in (*dense, sum(dense)))))
    if any(one.evaluation.messages for one in all_of):
        rows.append(row("beside all these: evaluation between rounds", [one.evaluation for one in all_of]))
    return Table("Payload bytes that crossed the wire", ("what", "messages", "up", "down", "both"), tuple(rows))


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


def markdown(table: Table) -> str:
    """Return the table as GitHub Markdown; what would be markup in a cell is escaped."""

    def line(cells: tuple[str, ...]) -> str:
        escaped = (re.sub(r"([\\|<>*_`]|(?<=\])\()", r"\\\1", cell.replace("\n", " ")) for cell in cells)
        return "| " + " | ".join(escaped) + " |"

    rule = "|" + "|".join("---" if place < table.left else "---:" for place in range(len(table.header))) + "|"
    return "\n".join([line(table.header), rule, *map(line, table.rows)]) + "\n"


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "–": "--", "−": "$-$", "\n": " ", "[": "{[}", "]": "{]}",
}  # fmt: skip


def latex_escaped(text: str) -> str:
    """Return text that LaTeX prints as it stands; brackets are braced, for after `\\\\` they would be an option."""
    return "".join(_LATEX.get(sign, sign) for sign in text)


def latex(table: Table) -> str:
    """Return the table as a LaTeX tabular in booktabs rules."""
    columns = "l" * table.left + "r" * (len(table.header) - table.left)
    lines = [" & ".join(map(latex_escaped, cells)) + r" \\" for cells in (table.header, *table.rows)]
    top = [f"% {' '.join(table.title.split())}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule", lines[0], r"\midrule"]
    return "\n".join([*top, *lines[1:], r"\bottomrule", r"\end{tabular}"]) + "\n"


def csv_text(table: Table) -> str:
    """Return the table as CSV (RFC 4180 quoting, line feeds); a minus is the sign that programs read as one."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([table.header, *table.rows])
    return out.getvalue().replace("−", "-")


RENDERERS = {"md": markdown, "tex": latex, "csv": csv_text}
