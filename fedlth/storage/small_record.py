"""What is told of a ticket that left as a smaller network: what both take, measured on the same batch."""

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
class SmallTicket:
    """What was written: `units` are the heads and channels that each layer keeps, `of` how many it had.

    `kept` is the share of parameters that are left. `plain`: transformers alone can load the folder. `difference` is
    the largest between outputs of the ticket and of the smaller network, on `batches` of the client's test part.
    """

    folder: Path
    client: int
    units: dict[str, int]
    of: dict[str, int]
    kept: float
    plain: bool
    difference: float
    batches: int
    batch: list[int]
    threads: int
    ticket: Size
    small: Size
