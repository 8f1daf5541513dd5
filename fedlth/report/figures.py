"""The figures of a report, in reading order, each with one sentence on how to read it."""

from __future__ import annotations

from fedlth.report.arms import arm_of
from fedlth.report.canvas import Picture
from fedlth.report.figure_accuracy import ByDensity, before_after
from fedlth.report.figure_bytes import AtBytes
from fedlth.report.figure_tickets import LayerDensity, OverlapMaps, OverlapScatter
from fedlth.report.results import Results


def pictures(results: Results) -> tuple[Picture, ...]:
    """Return the figures that these results allow; an unfinished or dense-only run has fewer.

    The ticket figures are of the first seed: masks of two seeds start from different weights and do not compare.
    """
    found: list[Picture] = []
    units = "seeds and clients" if len(results.group) > 1 else "clients"
    if any(summary.choice.target_density < 1 for summary in results.summaries):
        found.append(Picture(
            "accuracy_by_density", "What sparsity costs, arm by arm",
            f"Higher is better, sparser is to the right; whiskers are 95 % bootstrap intervals over {units}, and "
            "horizontal lines are the dense models. Arms are compared on the same clients, so whiskers that overlap "
            "can still hide a clear paired difference: those are given in the text above.",
            8.6, 4.8, ByDensity(results),
        ))  # fmt: skip
    dumbbells = before_after(results)
    if dumbbells is not None:
        at = "" if dumbbells.after.target_density == 1 else f" at density {dumbbells.after.target_density:.3g}"
        found.append(Picture(
            "accuracy_by_client", f"Every client, before and after: {arm_of(dumbbells.after.arm).label}{at}",
            "One line for each client, from the global model (hollow) to its own model (filled); an orange line is "
            "a client that was hurt.",
            8.6, 4.2, dumbbells,
        ))  # fmt: skip
    if any(facts.rounds for facts in results.group) and any(t.unicast.total_bytes for t in results.traffics):
        found.append(Picture(
            "accuracy_at_bytes", "What the bytes buy",
            "The line is the accuracy of the model that the sampled clients received, on their validation data, as "
            "bytes add up over the rounds; the markers at the right end are the arms on the validation data of all "
            "clients after the last byte.",
            8.6, 4.2, AtBytes(results),
        ))  # fmt: skip
    if results.overlaps:
        first = results.overlaps[0]
        of = f", seed {results.group[0].header.seed}" if len(results.group) > 1 else ""
        layers = len(first.layer_density)
        found.append(Picture(
            "density_by_layer", f"Where the tickets keep their weights{of}",
            "A dot is the mean over clients, the bar behind it reaches from the sparsest client to the densest; no "
            "bar means that every client keeps the same number.",
            8.6, 1.2 + 0.34 * max(layers, 2), LayerDensity(first),
        ))  # fmt: skip
        found.append(Picture(
            "overlap_maps", f"Do similar clients get similar tickets?{of}",
            "Both maps list the clients in the same order; if labels shape tickets, the blocks on the left appear "
            "again on the right.",
            8.6, 4.2, OverlapMaps(first),
        ))  # fmt: skip
        found.append(Picture(
            "overlap_by_labels", f"Overlap of two tickets against the labels of their clients{of}",
            "One dot for each pair of clients. Height above the chance lines is mostly what tickets inherit from the "
            "shared start; the slope is what the clients' own data add.",
            8.6, 4.2, OverlapScatter(first),
        ))  # fmt: skip
    return tuple(found)
