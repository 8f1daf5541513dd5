"""Print this study's tables and draw its figure from run folders: python tables.py OUT [FIGURE.png]."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from fedlth.report.build import read_results
from fedlth.report.choice import Choice
from fedlth.report.results import Results
from fedlth.report.statistics import Difference, difference

PARTITIONS = ("dirichlet_0.1", "dirichlet_0.3", "classes_3", "iid")
DENSITIES = (0.5, 0.2, 0.1, 0.05)
SPARSE = ("ticket", "ticket_0", "one_shot", "global_mask", "random")


def points(found: Difference | None) -> str:
    if found is None:
        return "-"
    low, high = found.interval.low, found.interval.high
    return f"{100 * found.mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def accuracy_table(results: dict[str, Results]) -> str:
    lines = ["| arm | density | " + " | ".join(results) + " |", "|---|---|" + "---|" * len(results)]
    rows = [(arm, 1.0) for arm in ("global", "local", "dense", "dense_total")]
    rows += [(arm, d) for arm in SPARSE for d in DENSITIES]
    for arm, density in rows:
        cells = []
        for one in results.values():
            s = one.summary(Choice(arm, density))
            cells.append(f"{100 * s.mean:.1f} [{100 * s.interval.low:.1f}, {100 * s.interval.high:.1f}]" if s else "-")
        lines.append(f"| {arm} | {density:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def claims_table(results: dict[str, Results]) -> str:
    asked = [("dense - global", ("dense", 1.0), ("global", 1.0))]
    asked += [(f"ticket - dense, {d:g}", ("ticket", d), ("dense", 1.0)) for d in DENSITIES]
    asked += [("ticket - dense_total, 0.2", ("ticket", 0.2), ("dense_total", 1.0))]
    for other in ("global_mask", "one_shot", "ticket_0", "random"):
        asked += [(f"ticket - {other}, {d:g}", ("ticket", d), (other, d)) for d in DENSITIES]
    lines = ["| difference, points | " + " | ".join(results) + " |", "|---|" + "---|" * len(results)]
    for label, a, b in asked:
        cells = [points(difference(one.group, Choice(*a), Choice(*b))) for one in results.values()]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def overlap_table(results: dict[str, Results]) -> str:
    lines = ["| partition | overlap | chance at equal layer counts | Spearman with label similarity | p, each seed |"]
    lines.append("|---|---|---|---|---|")
    for name, one in results.items():
        if one.overlaps:
            mean = float(np.mean([o.pairs(o.jaccard).mean() for o in one.overlaps]))
            chance = float(np.mean([o.pairs(o.chance).mean() for o in one.overlaps]))
            rho = float(np.mean([o.test.correlation for o in one.overlaps]))
            p = ", ".join(f"{o.test.p_value:.4f}" for o in one.overlaps)
            lines.append(f"| {name} | {mean:.3f} | {chance:.3f} | {rho:.2f} | {p} |")
    return "\n".join(lines)


def cost_table(results: dict[str, Results]) -> str:
    lines = [
        "| partition | seeds | MB up a run | MB down a run | hours a run (sum of client steps) |",
        "|---|---|---|---|---|",
    ]
    for name, one in results.items():
        rows = [f.ledger for f in one.group]
        up = np.mean([sum(r.payload_bytes for r in ledger if r.receiver == "server") for ledger in rows]) / 1e6
        down = np.mean([sum(r.payload_bytes for r in ledger if r.sender == "server") for ledger in rows]) / 1e6
        spent = [sum(t.get("seconds", 0.0) for t in f.times if t.get("client") is not None) for f in one.group]
        lines.append(f"| {name} | {len(one.group)} | {up:.1f} | {down:.1f} | {np.mean(spent) / 3600:.2f} |")
    return "\n".join(lines)


def draw(results: dict[str, Results], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = dict(zip(SPARSE, ("#0072b2", "#56b4e9", "#009e73", "#d55e00", "#777777"), strict=True))
    figure, axes = plt.subplots(1, len(results), figsize=(4.2 * len(results), 4.2), sharey=False, squeeze=False)
    for axis, (name, one) in zip(axes[0], results.items(), strict=True):
        for shift, arm in enumerate(SPARSE):
            found = [(d, s) for d in DENSITIES if (s := one.summary(Choice(arm, d)))]
            x = np.array([DENSITIES.index(d) for d, _ in found]) + 0.05 * (shift - 2)
            y = np.array([100 * s.mean for _, s in found])
            low = [100 * (s.mean - s.interval.low) for _, s in found]
            high = [100 * (s.interval.high - s.mean) for _, s in found]
            axis.errorbar(
                x, y, yerr=[low, high], color=colours[arm], marker="o", ms=4, lw=1.5, elinewidth=0.8, label=arm
            )
        for arm, style in (("global", ":"), ("local", "-."), ("dense", "-"), ("dense_total", "--")):
            s = one.summary(Choice(arm, 1.0))
            if s:
                axis.axhline(100 * s.mean, color="black", lw=0.9, ls=style, label=arm)
        axis.set_title(name)
        axis.set_xticks(range(len(DENSITIES)), [f"{d:g}" for d in DENSITIES])
        axis.set_xlabel("density")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("mean test accuracy over clients (%)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=9, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=110)


def main() -> None:
    out = Path(sys.argv[1])
    results = {name: read_results(out / name) for name in PARTITIONS if (out / name).is_dir()}
    for table in (accuracy_table, claims_table, overlap_table, cost_table):
        print(table(results), end="\n\n")
    if len(sys.argv) > 2:
        draw(results, Path(sys.argv[2]))


if __name__ == "__main__":
    main()
