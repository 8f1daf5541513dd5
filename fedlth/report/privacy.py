"""The privacy card of a report: who sees what of a client in this run, what is not protected, what an audit found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fedlth.report.facts import Facts, grouped
from fedlth.report.units import NOTHING, percent
from fedlth.storage.audit_records import ALL, AUDIT, HIDDEN, NONE, SHUFFLED
from fedlth.storage.json_lines import read_object
from fedlth.storage.records import LedgerRow, client_of
from fedlth.storage.spent_privacy import SpentPrivacy

SENT = {
    "values": "trained values",
    "mask": "masks on their own, without values",
    "scores": "scores of weights",
    "thresholds": "thresholds of rows of weights",
    "statistics": "statistics of its own data or training",
}


def privacy_card(group: Sequence[Facts]) -> list[str]:
    """Return the card's sentences, those of the first run and what was audited in any."""
    facts = group[0]
    return [*_seen(facts), *_unprotected(facts), *(line for one in group for line in _audited(one))]


def _seen(facts: Facts) -> Iterator[str]:
    """Yield who sees which of a client's messages, as the ledger has them."""
    up = [row for row in facts.ledger if client_of(row.sender) is not None and row.kind in SENT]
    peers = [row for row in up if client_of(row.receiver) is not None]
    server = [row for row in up if client_of(row.receiver) is None]
    for rows, who in ((peers, "Other clients see"), (server, "The server sees")):
        if not rows:
            continue
        told = []
        for kind in [kind for kind in SENT if any(row.kind == kind for row in rows)]:
            phases = dict.fromkeys(row.phase for row in rows if row.kind == kind)
            own = kind == "values" and _personal(row for row in rows if row.kind == kind)
            told.append(f"{SENT[kind]}{' under a mask of its own' if own else ''} (in {', '.join(phases)})")
        yield f"{who} of a client: {'; '.join(told)}."
    if not up:
        yield "No model, mask or statistic leaves a client in this run."
    elif any(row.kind == "mask" for row in up) or _personal(row for row in up if row.kind == "values"):
        yield "So a client's personal mask is seen by whoever receives it."
    else:
        yield "Personal masks, where a client finds a ticket at the end, stay with it."
    counted = "number of examples and its" if facts.spent else "number of examples, its loss and its"
    yield (
        "In step 2 each client reports its accuracies and losses, the size of its parts, the densities of its layers "
        f"and a hash of every mask; in a round its {counted} validation score."
    )


def _personal(rows: Iterable[LedgerRow]) -> bool:
    """Say whether clients of one round sent values under different masks."""
    rounds = grouped(((row.phase, row.round), row.ticket) for row in rows if row.status == "ok" and row.ticket)
    return any(len(set(found)) > 1 for found in rounds.values())


def _unprotected(facts: Facts) -> Iterator[str]:
    header, noise = facts.header, "losses or scores" if facts.spent else "values, losses or scores"
    yield (
        "Not protected: whoever receives a message reads it in plain. There is no secure aggregation, no encryption "
        f"against the receiver, and no noise on {noise}."
    )
    yield from _spent(facts.spent)
    yield (
        f"Defence of masks: {header.defence}; bits are many and depend on each other, so a whole mask has no such "
        "small epsilon. Accuracies, layer densities and the hash of the undefended mask still leave the client."
        if header.defence
        else "Defence of masks: none (privacy.mask)."
    )
    held = ["metrics.jsonl holds every client's results"]
    if any(header.client_labels):  # of data that live with the clients (data.own) a server has none
        held.append("header.json its label counts")
    held.append(
        "devices/ its mask and values, where it was on this machine"
        if header.engine == "flower"
        else "state/ and tickets/ its mask and values"
    )
    yield f"Who reads this run's folder reads more: {', '.join(held)}."


def _spent(spent: SpentPrivacy | None) -> Iterator[str]:
    """Yield what noise there was in training (privacy.dp), and what it comes to."""
    if spent is None:
        yield "Noise in local training: none (privacy.dp)."
        return
    found = sorted(one.epsilon for one in spent.clients)
    assumed = sum(one.assumed for one in spent.clients)
    yield (
        f"Noise in local training (privacy.dp): each example's gradient has a norm of at most {spent.max_grad_norm:g}, "
        f"and the sum of a batch noise of {spent.noise_multiplier:g} times that. Over all noisy steps of this run, "
        f"those of controls included, a client's training examples have epsilon at most {found[-1]:.2f} at delta "
        f"{spent.delta:g} (the least {found[0]:.2f}; accountant {spent.accountant}, {spent.sampling} batches"
        + (f"; {assumed} steps of visits without a usable answer are assumed" if assumed else "")
        + "). Masks and values that are made of such weights have no other; validation and test scores are not covered."
    )


def _audited(facts: Facts) -> Iterator[str]:
    """Yield what RUN/audit found, or that nobody has looked."""
    if not (facts.path / AUDIT / "audit.json").is_file():
        yield "Not audited: fedlth audit measures what this run's tickets disclose."
        return
    found = read_object(facts.path / AUDIT / "audit.json")
    scores = {(one["defence"], one["attack"]): one for one in found["label_inference"]}
    whole, hidden, control = (scores.get((NONE, attack)) for attack in (ALL, HIDDEN, SHUFFLED))
    seed = f"Audit of seed {facts.header.seed}"
    if whole:
        yield (
            f"{seed}: from the bits of a ticket's mask alone an attacker names {_share(whole)} of the client's "
            f"classes ({_share(hidden)} from hidden layers; chance {percent(whole['chance'])} %, control with shuffled "
            f"labels {_share(control)}); {whole['victims']} clients, {found['shadows']} shadow clients."
        )
    if found["linked"]:
        link = found["linked"]
        yield f"{seed}: {_share(link, 'share')} of the masks are recognised by a second search on the same data."
    for one in found["membership"]:
        yield (
            f"{seed}: own training examples of the {one['model']} stand out by {one['attack']} with an AUC of "
            f"{one['auc']:.3f} ({percent(one['tpr_at_1_percent_fpr'])} % found at 1 % false alarms)."
        )


def _share(one: Mapping[str, Any] | None, key: str = "mean") -> str:
    return NOTHING if one is None else f"{percent(one[key])} %"
