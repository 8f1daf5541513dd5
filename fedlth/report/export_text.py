"""A ticket that was exported, in a terminal: where it is, how well it agrees, what it takes beside the ticket."""

from __future__ import annotations

from fedlth.report.tables import Table, aligned
from fedlth.storage.export_record import Exported


def exported(written: Exported) -> str:
    """Return what was written, and what it takes beside the masked network."""
    a, b = written.ticket, written.export
    rows: list[tuple[str, float, float, str, str]]
    rows = [("parameters stored", a.parameters, b.parameters, ",d", "")]
    rows += [("file (of the ticket: dense)", a.file_bytes / 1e6, b.file_bytes / 1e6, ".3f", " MB")]
    rows += [("FLOPs an example", a.flops, b.flops, ",d", "")]
    rows += [("latency of a batch", a.latency_ms, b.latency_ms, ".2f", " ms")]
    rows += [("memory of a batch", a.memory_bytes / 1e6, b.memory_bytes / 1e6, ".2f", " MB")]
    cells = [(name, f"{x:{how}}{unit}", f"{y:{how}}{unit}", f"{y / x:.3f}") for name, x, y, how, unit in rows]
    inputs = "random inputs (no data beside a file alone)" if written.random else "test examples"
    table = aligned(Table("Export", ("", "ticket", written.form, "ratio"), tuple(cells), left=1))
    told = [
        f"{written.folder}: client {written.client}, {', '.join(written.files)}; opened by {written.opens}",
        f"  the ticket keeps {written.density:.4f} of its prunable weights, the export stores {written.kept:.4f} of "
        "all parameters",
        f"  largest difference of outputs on {written.examples} {inputs}: {written.difference:.1e}; a batch is "
        f"{' x '.join(map(str, written.batch))}, {written.threads} thread(s)",
        *(f"  {name}: {left}" for name, left in written.layers.items()),
    ]
    return "\n".join([*told, "", table, *_of_zeros(written)]) + "\n"


def _of_zeros(written: Exported) -> list[str]:
    """Say what the zeros of an unstructured ticket are worth in time."""
    if written.form == "small" or written.density == 1:
        return []
    plain = "zeros give no speed in dense kernels: whoever runs this file multiplies by all of them"
    if written.kernel_ms is None:
        return ["", f"{plain}; fedlth's kernel, which skips them, was not measured: {written.kernel_why}"]
    ratio = written.kernel_ms / written.ticket.latency_ms
    skips = f"takes {written.kernel_ms:.2f} ms for this batch, {ratio:.3f} of the ticket in torch"
    return ["", f"{plain}; fedlth's kernel, which skips them, {skips}"]
