"""What a run says of a round that has ended: a row of rounds.jsonl, and one line of live progress."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedlth.experiment.chaos import fault_of
from fedlth.federation.replies import Replies
from fedlth.methods.mask_outliers import outliers
from fedlth.storage.records import Diverged, Failed, FarMask, Injected, RoundRow
from fedlth.training.metrics import Metric

CLIENTS_SHOWN, REASON_SHOWN = 5, 100  # of failures on a line


def summary_of(replies: Replies) -> RoundRow:
    """Return a round's row of rounds.jsonl."""
    return RoundRow(
        round=replies.round,
        phase=replies.phase.name,
        clients=list(replies.clients),
        val_accuracy=_mean(replies.seen, replies),
        val_metric=_mean(replies.seen_metric, replies),
        up_bytes=sum(r.payload_bytes for r in replies.rows if r.sender != "server"),
        down_bytes=sum(r.payload_bytes for r in replies.rows if r.receiver != "server"),
        failed=replies.failed,
        diverged=[Diverged(r["client"], r["arm"], r["target_density"]) for r in replies.metrics if r.get("diverged")],
        simulated_s=replies.clock.whole(replies.came_s, replies.gone_s),
        mask_outliers=[FarMask(client, distance) for client, distance in outliers(replies.shared).items()],
        injected=_injected(replies),
        noisy=list(replies.noisy),
    )


def _injected(replies: Replies) -> list[Injected]:
    """Return the faults of this round; who dropped out by the fleet's clock was not asked at all."""
    study, phase, round = replies.experiment.study, replies.phase.name, replies.round
    met = {c: fault_of(study, phase, round, c) for c in replies.clients if c not in replies.dropped}
    return [Injected(client, fault) for client, fault in met.items() if fault]


def _mean(seen: Sequence[float], replies: Replies) -> float | None:
    """Return the mean of what clients saw; of tasks with different metrics there is none."""
    return float(np.mean(seen)) if seen and replies.experiment.one_metric else None


def line(summary: RoundRow, done: int, total: int, seconds: float, metric: Metric) -> str:
    """Return one line of live progress, with the study's metric on validation data."""
    seen = summary.val_accuracy if metric.name == "accuracy" else summary.val_metric
    said = f"{len(summary.clients)} clients"
    if seen is not None:
        said = f"val {100 * seen:5.1f} %" if metric.percent else f"val {metric.name.rpartition(':')[2]} {seen:.4g}"
    failed = f"  {len(summary.failed)} failed: {_failures(summary.failed)}" if summary.failed else ""
    for arm in dict.fromkeys(one.arm for one in summary.diverged):
        failed += f"  {arm} diverged for {len({d.client for d in summary.diverged if d.arm == arm})}"
    if summary.mask_outliers:
        failed += f"  masks far from others: clients {_names([one.client for one in summary.mask_outliers])}"
    mb = 1e-6
    if summary.void and summary.clients:
        failed += "  void: too few usable replies"
    took = "" if summary.simulated_s is None else f"  simulated {summary.simulated_s:.4g} s"
    return (
        f"[{done}/{total}] {summary.phase} {summary.round}: {said}  up {summary.up_bytes * mb:.2f} MB  "
        f"down {summary.down_bytes * mb:.2f} MB  {seconds:.1f} s{took}{failed}"
    )


def _failures(failed: Sequence[Failed]) -> str:
    """Say who failed and why, each kind once with its first client's reason."""
    kinds: dict[str, list[Failed]] = {}
    for one in failed:
        kinds.setdefault(one.kind, []).append(one)
    return "; ".join(
        f"client{'s' * (len(of) > 1)} {_names([f.client for f in of])}: {kind}: {of[0].reason[:REASON_SHOWN]}"
        for kind, of in kinds.items()
    )


def _names(clients: Sequence[int]) -> str:
    return ", ".join(map(str, clients[:CLIENTS_SHOWN])) + (", ..." if len(clients) > CLIENTS_SHOWN else "")
