"""Run the rows of the acceptance table and say which relations held: `python rows.py all`, or the rows' numbers.

Writes results.md beside this file. The runs go to --out (default runs/lottery_rows); a run that is there is used.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import others
import tickets
from facts import Facts, Outcome

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Row:
    """One row: its relation in words, the studies that it reads, the function that decides it."""

    number: int
    system: str
    relation: str
    studies: tuple[str, ...]
    decide: Callable[..., Outcome]


ROWS = (
    Row(1, "IMP ladder", "survivors equal the ladder 266200, 213060, ..., 7650", ("imp",), tickets.row_1),
    Row(2, "winning ticket against reinit", "at round 7, 8 or 9 (medians): ticket >= reinit + 0.2 pt, stops earlier, "
        ">= dense - 0.3 pt", ("imp",), tickets.row_2),
    Row(3, "speed", "least es(ticket) / es(dense) over rounds 4 to 7 <= 0.85, and es(16) > es(7)", ("imp",),
        tickets.row_3),
    Row(4, "one-shot against iterative", "at 3.6 % iterative > one-shot; at 51 % they differ by <= 0.3 pt", ("imp",),
        tickets.row_4),
    Row(5, "rearranged", "shuffled mask < ticket at every round from 11 on", ("imp",), tickets.row_5),
    Row(6, "Occam's hill", "best round >= dense, and neither first nor last", ("imp",), tickets.row_6),
    Row(7, "Gaussian noise", "0.5 sigma costs <= 0.3 pt, 3 sigma at least as much, and is >= reinit - 0.3 pt", ("imp",),
        tickets.row_7),
    Row(8, "dropout", "ticket with dropout >= dense with dropout - 0.3 pt at 21 %", ("imp",), tickets.row_8),
    Row(9, "late and LR rewinding", "start - wanted = 0 exactly; first rate is the schedule's there", ("imp",),
        tickets.row_9),
    Row(10, "instability", "barrier(k = 0) >= barrier(last k); < 2 pt; the line's ends are the stored accuracies",
        ("imp",), tickets.row_10),
    Row(11, "masking criterion", "large_final, magnitude_increase, movement >= random + 1 pt, small_final <= random, "
        "slow_movement >= random", ("criteria",), tickets.row_11),
    Row(12, "mask-0, mask-1", "dead zero >= frozen at init; signed constant >= reinit + 0.2 pt", ("imp",),
        tickets.row_12),
    Row(13, "supermask by criterion", "untrained same-sign mask >= 30 %, untrained dense <= 20 %", ("criteria",),
        tickets.row_13),
)  # fmt: skip
ROWS += tuple(Row(*one) for one in others.ROWS)


def main() -> int:
    """Run what the rows asked for need, then judge them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", help="all, or numbers of rows; then key=value overrides of every study")
    parser.add_argument("--out", type=Path, default=Path("runs/lottery_rows"))
    parser.add_argument("--judge", action="store_true", help="run nothing; judge the rows whose runs are there")
    args = parser.parse_args()
    asked = [r for r in args.rows if "=" not in r]
    overrides = [r for r in args.rows if "=" in r]
    wanted = sorted((r for r in ROWS if "all" in asked or str(r.number) in asked), key=lambda row: row.number)
    for study in dict.fromkeys(study for row in wanted for study in row.studies):
        if not args.judge and not (args.out / study / "report.html").exists():
            command = [
                sys.executable,
                "-m",
                "fedlth",
                "lottery",
                str(HERE / f"{study}.yaml"),
                f"out={args.out / study}",
            ]
            subprocess.run([*command, *overrides], check=True)
    lines = ["| row | system | relation | outcome | figures |", "|---|---|---|---|---|"]
    for row in wanted:
        if not all((args.out / study / "results.jsonl").exists() for study in row.studies):
            lines.append(f"| {row.number} | {row.system} | {row.relation} | not run | |")
            continue
        outcome = row.decide(*(Facts.read(args.out / study) for study in row.studies))
        relation = row.relation.replace("|", "\\|")  # a cell's own bars would end it
        told = "held" if outcome.held else "**not held**"
        lines.append(f"| {row.number} | {row.system} | {relation} | {told} | {outcome.figures} |")
    text = "\n".join(lines) + "\n"
    if "all" in asked:
        (HERE / "results.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
