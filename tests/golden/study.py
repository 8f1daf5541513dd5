"""What a golden file holds: every message of a tiny run in short, and the digests of what it ended in."""

from __future__ import annotations

import platform
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests import tiny

HERE = Path(__file__).parent


def where() -> dict[str, str]:
    """Name what the last bit of a float depends on; libraries of matrix products go by the vendor, too."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    vendor = next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "unknown")
    cpu = f"{torch.backends.cpu.get_cpu_capability()} {vendor}"
    return {"torch": torch.__version__, "machine": platform.machine(), "cpu": cpu}


def message(row: dict[str, Any]) -> str:
    """Return one ledger row as a line that a person can read in a diff."""
    flag = " broadcast" if row["broadcast"] else ""
    # How many ones a sampled mask has hangs on the last bit of a score; its bytes do not.
    density = "sampled" if row["kind"] == "mask" else f"{row['density']:.6f}"
    return (
        f"{row['phase']} {row['round']}: {row['sender']} > {row['receiver']} {row['kind']} {row['name']} "
        f"{row['payload_bytes']} B density {density} {row['status']}{flag}"
    )


def record(name: str) -> dict[str, Any]:
    """Run the method's tiny study and return its golden record."""
    # Raw payloads: a coded one's length hangs on the last bit of a float.
    made = tiny.of_method(
        name, federate={"rounds": 3, "clients_per_round": 2}, train={"epochs": 2}, wire="raw",
        clients={"count": 4, "unseen": 0.25},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        tiny.run(made, out)
        return {
            "method": name,
            "ledger": [message(r) for r in tiny.rows(out, "ledger")],
            "where": where(),
            "digests": tiny.digests(out),
        }
