"""An audit in words: its tables, and what a reader must know of them."""

from __future__ import annotations

from fedlth.report.audit_statistics import FALSE_ALARMS, Score, defended, linked, membership, scores
from fedlth.report.tables import Table
from fedlth.report.units import NOTHING, bounds, percent, scaled
from fedlth.storage.audit_records import ALL, FEW, HIDDEN, NONE, PRIVATE, Audit

UNLINKED = "a second search on the same data, with other streams"


def attacks_table(audit: Audit) -> Table:
    """Return each attack on undefended masks, and the control with private weights."""
    header = ("attack", "classes right %", "95 % interval", "chance %", "victims")
    found = scores(audit.guesses)
    wanted = [one for (defence, _), one in found.items() if defence == NONE]
    wanted += [found[PRIVATE, attack] for attack in (ALL, HIDDEN) if (PRIVATE, attack) in found]
    rows = []
    for one in wanted:
        name = one.attack if one.defence == NONE else f"{one.defence}, {one.attack}"
        rows.append((name, percent(one.mean), bounds(one.interval), percent(one.chance), str(one.victims)))
    return Table("Classes read from mask bits", header, tuple(rows))


def defences_table(audit: Audit) -> Table:
    """Return each defence: what it leaves to the attacker, and its price."""
    header = ("defence", "epsilon per bit", "all bits %", "95 % interval", "hidden layers %", "chance %",
              "test accuracy %", "density", "one mask, coded")  # fmt: skip
    rows = []
    for one in defended(audit):
        left = one.all_bits
        rows.append((
            one.name, NOTHING if one.epsilon is None else f"{one.epsilon:.2f}", _mean(left),
            NOTHING if left is None else bounds(left.interval), _mean(one.hidden),
            NOTHING if left is None else percent(left.chance), percent(one.accuracy),
            NOTHING if one.density is None else f"{one.density:.3f}", scaled(one.mask_bytes, "B"),
        ))  # fmt: skip
    return Table("Defences, and what they cost", header, tuple(rows))


def _mean(score: Score | None) -> str:
    return NOTHING if score is None else percent(score.mean)


def membership_table(audit: Audit) -> Table:
    """Return how well own training examples stand out against others of the same classes."""
    low = f"found at {percent(FALSE_ALARMS, digits=0)} % false alarms, %"
    header = ("model", "attack", "AUC", low, "mean AUC of a victim", "95 % interval", "members", "others")
    rows = tuple(
        (
            one.model, one.attack, f"{one.auc:.3f}", percent(one.found_at_low), f"{one.own_auc:.3f}",
            NOTHING if one.interval.low != one.interval.low else f"[{one.interval.low:.3f}, {one.interval.high:.3f}]",
            str(one.examples), str(one.others),
        )
        for one in membership(audit)
    )  # fmt: skip
    return Table("Membership of training examples", header, rows, left=2)


def linked_table(audit: Audit) -> Table:
    """Return how often a mask is recognised by a second search on the same data."""
    found = linked(audit)
    header = ("recognised by", "share %", "95 % interval", "chance %", "Jaccard, own", "Jaccard, best other", "masks")
    rows = () if found is None else ((
        UNLINKED, percent(found.share), bounds(found.interval), percent(found.chance), f"{found.own:.3f}",
        f"{found.best_other:.3f}", str(found.victims),
    ),)  # fmt: skip
    return Table("Recognising a client by its mask", header, rows)


def coverage_table(audit: Audit) -> Table:
    """Return what each round's tickets cover together, and what a secure sum over them would cost one client."""
    header = ("round", "clients", "one mask", "union", "kept by one alone, % of it", f"by fewer than {FEW}, %",
              "up, one common mask", "up, union", "up, all weights")  # fmt: skip
    rows = tuple(
        (
            f"{one.phase} {one.round}", str(one.clients), f"{one.density:.3f}", f"{one.union:.3f}", percent(one.alone),
            percent(one.few), scaled(one.common_bytes, "B"), scaled(one.union_bytes, "B"), scaled(one.dense_bytes, "B"),
        )
        for one in audit.coverages
    )  # fmt: skip
    return Table("What a secure sum over tickets would cost", header, rows)


def tables(audit: Audit) -> dict[str, Table]:
    """Return the tables that have rows, by name."""
    found = {
        "attacks": attacks_table(audit), "defences": defences_table(audit), "membership": membership_table(audit),
        "linked": linked_table(audit), "coverage": coverage_table(audit),
    }  # fmt: skip
    return {name: table for name, table in found.items() if table.rows}


def notes(audit: Audit) -> tuple[str, ...]:
    """Return what a reader must know: what was measured, and what it does not show."""
    told = [
        f"Attackers of the first two tables see mask bits alone, at density {audit.density:g}. They know the study, "
        "the shared weights that searches begin with, the finder, and how many classes a client has; they learn from "
        f"{audit.num_shadows} shadow clients with examples of the data set's test split, which no victim has trained "
        "on. Whoever knows less, or has other data, reads less; values, which go up with most masks, say more.",
        "Under every defence the shadows are defended alike: the attacker knows of it. Accuracies are of tickets that "
        "were trained once under the defended mask; in later rounds a mask that changes each time says more each time.",
        "Epsilon is that of one bit. A mask has very many bits, and they depend on each other: what all of them say "
        "together is bounded by no small epsilon, which is why a flip of .1 may change nothing for the attacker.",
        "The common mask costs no bytes, since everybody who has the global model makes it, and says nothing of any "
        "client; what little an attack seems to read from it is chance.",
    ]
    if audit.applied:
        told.append(f"The run itself defends its masks: {audit.applied}. The row without defence is what it would say.")
    if audit.coverages:
        told.append(
            "There is no secure aggregation here: the last table says what it would cost. A sum hides who sent what "
            "only where several clients send the same position; masked integers (16 bits, and what a sum needs) "
            "cannot be coded shorter. The union must be known to all, which tells of every mask; a common mask tells "
            "of none."
        )
    others = min((one.others for one in membership(audit)), default=0)
    if audit.members:
        few = others < 1 / FALSE_ALARMS
        told.append(
            "Membership: own training examples against as many of the same classes from the client's test part. The "
            "global model has seen most of these training examples too, which weakens the attack that is calibrated "
            "by it; an attacker with shadow models (LiRA) may find more."
            + (f" With {others} others no threshold has a false alarm rate of 1 %." if few else "")
        )
    return (*told, *audit.notes)
