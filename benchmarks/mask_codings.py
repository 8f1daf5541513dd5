"""What each mask coding costs in a whole study: python benchmarks/mask_codings.py STUDY [key=value ...].

The study runs as always; beside it, the mask of every payload is coded in every mode that its receiver could read.
Printed: bytes of all mask sections in a mode, and how many per cent more the study would move with them. A coding that
does not save 1 % of the bytes of any study is not worth its lines (docs/decisions.md).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from fedlth import api
from fedlth.models.layout import Layout
from fedlth.study.schema import load
from fedlth.wire import mask_bits, payload
from fedlth.wire.payload import Content

encode = payload.encode


def sections(layout: Layout, mask: np.ndarray, known: np.ndarray | None, floats: np.ndarray | None) -> dict[str, int]:
    """Return the bytes of a mask's section by coding; what is not shorter than a bitmap is one."""
    bitmap = (mask.size + 7) // 8
    ways = {"alone": (None, None), "on mask": (known, None), "on values": (None, floats), "on both": (known, floats)}
    coded = {name: mask_bits.encode(mask, layout.prunable, *held, bitmap - 1) for name, held in ways.items()}
    return {"bitmap": bitmap, **{name: bitmap if data is None else len(data) for name, data in coded.items()}}


def main(study: str, overrides: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:

        def watched(kind: str, layout: Layout, content: Content, **holds: Any) -> bytes:
            mask, known, reference = content.mask, holds.get("known_mask"), holds.get("reference")
            known = None if known is None or known.all() else known
            if not mask.all() and not (known is not None and np.array_equal(mask, known)):
                floats = None if reference is None else reference.floats[: mask.size]
                with (Path(folder) / f"{os.getpid()}.jsonl").open("a") as file:  # clients may run in forks
                    file.write(json.dumps(sections(layout, mask, known, floats)) + "\n")
            return encode(kind, layout, content, **holds)

        payload.encode = watched
        run = api.run(load(study, [f"out={folder}/run", "engine=inprocess", *overrides]))
        found = [json.loads(line) for file in Path(folder).glob("*.jsonl") for line in file.open()]
        ledger = [json.loads(line) for line in (run / "ledger.jsonl").open()]
    total = sum(row["payload_bytes"] for row in ledger)
    now = sum(row["mask_bytes"] or 0 for row in ledger)
    print(f"{study}: {total:,} B in all, {len(found)} masks sent, {now:,} B as they were sent")
    for name, size in sum((Counter(f) for f in found), Counter()).items():
        print(f"  all {name:<10} {size:>10,} B  {100 * (size - now) / total:+.3f} %")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
