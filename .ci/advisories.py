"""Hold the pinned packages against the published security advisories (pip-audit); say so where none can be read.

Exit code 1 where a pinned package has a known vulnerability, or where what is installed is not what is pinned.
pip-audit itself passes without a word of failure where it reaches nothing: here a run offline is told from a clean one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

PINS = Path(__file__).parents[1] / "constraints.txt"
TIMEOUT_S = 10


def canonical(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def pins(text: str) -> dict[str, str]:
    """Return the pinned version of each package."""
    lines = (line.partition("#")[0].partition(";")[0].strip() for line in text.splitlines())
    return {canonical(name): version for name, _, version in (line.partition("==") for line in lines) if version}


def drift(pinned: dict[str, str], installed: dict[str, str]) -> list[str]:
    """Say which installed packages have another version than the pinned one; torch's local label does not count."""
    return [
        f"{name}: pinned {pinned[name]}, installed {version}"
        for name, version in sorted(installed.items())
        if name in pinned and version.partition("+")[0] != pinned[name].partition("+")[0]
    ]


def judged(report: dict[str, Any] | None) -> tuple[int, str]:
    """Return the exit code and the line to print for a report of pip-audit; None: it gave none."""
    found = report["dependencies"] if report else []
    read = [one for one in found if "skip_reason" not in one]
    bad = [f"{one['name']} {one['version']}: {v['id']}" for one in read for v in one["vulns"]]
    if bad:
        return 1, "advisories: " + "; ".join(bad)
    if not read:
        return 0, "advisories: NOT CHECKED, no advisory could be read from here; versions are as pinned"
    left = f"; {len(found) - len(read)} could not be checked" if len(read) < len(found) else ""
    return 0, f"advisories: none for {len(read)} pinned packages{left}"


def main() -> int:
    """Run both checks."""
    installed = {canonical(d.metadata["Name"]): d.version for d in distributions()}
    if wrong := drift(pins(PINS.read_text()), installed):
        print("advisories: " + "; ".join(wrong))
        return 1
    asked = [
        sys.executable, "-m", "pip_audit", "-r", str(PINS), "--no-deps", "--disable-pip", "--format", "json",
        "--progress-spinner", "off", "--timeout", str(TIMEOUT_S),
    ]  # fmt: skip
    done = subprocess.run(asked, capture_output=True, text=True)
    try:
        report = json.loads(done.stdout)
    except ValueError:
        report = None
    code, line = judged(report)
    print(line)
    return code


if __name__ == "__main__":
    sys.exit(main())
