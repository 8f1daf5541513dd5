"""What is said of a ticket that was exported: what it and the export take, measured on the same batch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Size:
    """What one network takes: parameters, its file, and of a forward pass of one batch FLOPs an example, time, memory.

    `latency_ms` is the median of 20 passes, both networks by turns; `memory_bytes` are the weights and the most that a
    pass holds beside them in tensors, what an operator needs inside itself left out.
    """

    parameters: int
    file_bytes: int
    flops: int
    latency_ms: float
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written. `files` lie in `folder`, the one that `export` measures first.

    `density` is the share of prunable weights that the ticket keeps, `kept` the share of parameters that the export
    stores, zeros not counted where it leaves them out. `difference` is the largest between outputs of the ticket and of
    the export, read again, relative to the largest output where that is above 1, on `examples` of the client's test
    part, or that are `random`. `layers`: of a smaller network, layer -> what of its channels is left, as text.
    `kernel_ms`: the median of a forward pass of the same batch in fedlth's kernel, which skips zeros; None where
    `kernel_why` says that there is none. `opens`: what opens the export, as text.
    """

    folder: Path
    files: tuple[str, ...]
    client: int
    form: str
    density: float
    kept: float
    difference: float
    examples: int
    random: bool
    batch: tuple[int, ...]
    threads: int
    opens: str
    ticket: Size
    export: Size
    layers: dict[str, str]
    kernel_ms: float | None
    kernel_why: str
