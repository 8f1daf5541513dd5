"""CPU seconds and memory of a process and all its descendants, from /proc."""

from __future__ import annotations

import os
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")


def tree(pid: int) -> list[int]:
    """Return a process and its living descendants."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += tree(int(child))
    return found


def cpu_seconds(pid: int) -> float:
    """Return user and system time of the tree, and of children that have ended."""
    total = 0
    for one in tree(pid):
        fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        total += sum(int(f) for f in fields[11:15])
    return total / TICK


def memory_mb(pid: int) -> dict[str, float]:
    """Return the tree's PSS (shared pages counted once) and the sum of its RSS (shared pages counted in each)."""
    found = {"Pss": 0, "Rss": 0}
    for one in tree(pid):
        for line in Path(f"/proc/{one}/smaps_rollup").read_text().splitlines():
            name = line.partition(":")[0]
            if name in found:
                found[name] += int(line.split()[1])
    return {name: kb / 1024 for name, kb in found.items()}
