"""A run in words and numbers, for page and terminal: what was done, what came out, what a reader must know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from textwrap import fill

import numpy as np

from fedlth.report.cost import cost_text
from fedlth.report.curve import curve_table, inflation, lost_evaluations
from fedlth.report.fleet import fleet_text, tiers_table
from fedlth.report.known_arms import arm_of, is_users
from fedlth.report.measure import Shown, others_of
from fedlth.report.results import Results
from fedlth.report.statistics import ArmSummary, Difference, difference
from fedlth.report.tables import COST, FURTHER, WIDTH, Table, aligned, chosen_table, summary_table, tasks_table
from fedlth.report.traffic import is_refused
from fedlth.report.units import percent, scaled, signed
from fedlth.storage.records import RoundRow

PERMUTATION_LEVEL = 0.01
# What columns of the summary are called in a terminal, and those that do not fit one.
TERMINAL = {"worst decile": "worst 10 %", "hurt vs global %": "hurt %"}
# Arms at equal density that the main arm is held against.
CONTROLS = ("global_mask", "init_mask", "one_shot", "shuffled_values", "reinit", "random", "handed")
# What the terminal's tables leave out: of the summary, and of the table by task.
LEFT_OUT = ("hurt vs local %", "diverged", *COST)
OF_TASKS = ("clients", "outputs", "sd", FURTHER)


@dataclass(frozen=True)
class Number:
    """One headline number: its value, what it is, and a second line in small print."""

    value: str
    label: str
    small: str


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def done(results: Results) -> str:
    """Return what was done, in two or three sentences."""
    header = results.group[0].header
    held = [sum(count > 0 for count in counts) for counts in header.client_labels]
    sizes = [sum(counts) for counts in header.client_labels]
    clients = _plural(header.num_clients, "client")
    examples = {row.client: row.num_train for row in results.group[0].metrics}
    if header.tasks:
        if examples:
            clients += f", each with about {np.median(list(examples.values())):.0f} training examples"
    elif examples and not any(header.client_labels):
        clients += f", each with about {np.median(list(examples.values())):.0f} training examples"
    elif held and sizes:
        clients += (
            f", each with about {np.median(sizes):.0f} training examples of {np.median(held):.0f} out of "
            f"{_plural(header.num_classes, 'class')}".replace("classs", "classes")
        )
    if results.tasks:
        told = [
            f"{t.name} ({_plural(t.num_clients, 'client')}, {_plural(t.num_classes, 'output')})" for t in results.tasks
        ]
        clients += f", and one of the tasks {', '.join(told)}"
    federated = _rounds(results, header.joining(1))
    rounds = _plural(federated, "federated round")
    sentences = [f"{clients}, trained one shared model in {rounds}." if federated else f"{clients}."]
    if header.unseen:
        unseen = _plural(len(header.unseen), "client")
        sentences.append(f"{unseen} stayed unseen in the rounds and took part only at the end.")
    if header.joiners:
        first = min(header.joiners.values())
        sentences.append(f"{_plural(len(header.joiners), 'client')} came later, from round {first} on.")
    if header.hostile:
        sentences.append(
            f"{_plural(len(header.hostile), 'client')} attacked ({header.attack}); all results are of the others."
        )
    if header.test == "own":
        sentences.append("A part of each client's own examples is its test part.")
    if header.label_noise:
        noisy = _plural(len(header.noisy), "client")
        sentences.append(f"Of {noisy}, some training and validation labels are wrong: {header.label_noise}.")
    if results.main is not None and results.main.arm in ("ticket", "refined"):
        sentences.append("Then every client found its own ticket, a sparse part of the model, and fine-tuned it.")
        refined = _rounds(results, header.joining(2))
        if refined:
            sentences.append(f"{_plural(refined, 'more federated round')} trained inside the tickets.")
    elif results.main is not None:
        sentences.append(f"Below, the method is represented by {arm_of(results.main.arm).meaning}.")
    if len(results.group) > 1:
        sentences.append(f"All of it was done with {len(results.group)} seeds.")
    return " ".join(sentences)


def _rounds(results: Results, phases: frozenset[str]) -> int:
    return len({(row.phase, row.round) for row in results.group[0].rounds if row.phase in phases})


def rivals(results: Results) -> list[ArmSummary]:
    """Return the arms that the main arm is held against: single ones, a user's own, then controls at equal density."""
    if results.main is None:
        return []
    same = [replace(results.main, arm=arm) for arm in CONTROLS]
    single = ("global", "local", "dense", "dense_total", "own_random", "own_global_mask", "frozen_random")
    users = dict.fromkeys(one.choice.arm for one in results.summaries if is_users(one.choice.arm))
    found = [results.best_known(arm) for arm in (*single, *users)]
    found += [results.summary(choice) for choice in same]
    return [one for one in found if one is not None and one.choice != results.main]


def verdict(found: Difference, shown: Shown) -> str:
    """Return what a paired difference says: ahead, behind, or no clear difference (its interval holds zero)."""
    if np.isnan(found.interval.low):
        return "too few clients to tell"
    if not found.interval.excludes(0):
        return "no clear difference"
    return "ahead" if shown.gain(found.mean) > 0 else "behind"


def against(results: Results) -> Table:
    """Return the main arm's paired differences from its rivals, one row each."""
    rows, shown = [], results.shown
    for rival in rivals(results):
        found = difference(results.group, results.main, rival.choice) if results.main else None
        if found is not None:
            gap = (shown.difference(found.mean), shown.bounds(found.interval, signed=True))
            rows.append((arm_of(rival.choice.arm).label, shown.text(rival.mean), *gap, verdict(found, shown)))
    gap_head = "difference, points" if shown.measure.percent else "difference"
    header = ("against", f"its mean {shown.column}", gap_head, "95 % interval", "so the main arm is")
    return Table("The main arm against the others, paired by client", header, tuple(rows))


def reached(results: Results) -> str:
    """Return the main arm's own result in one sentence."""
    main = results.summary(results.main)
    if not results.one_metric:
        ours = [(task, task.summary(results.main)) for task in results.tasks]
        told = [
            f"{task.name} {task.shown.text(one.mean)}{task.shown.unit} ({task.shown.label})"
            for task, one in ours
            if one is not None
        ]
        return f"By task, whose metrics have no common mean: {', '.join(told) or 'nothing evaluated'}."
    if main is None:
        return "No client was evaluated, so there is no result to report."
    label = arm_of(main.choice.arm).label
    shown, mean = results.shown, results.shown.text(main.mean)
    reaches = f"{mean} % mean test {shown.label}" if shown.measure.percent else f"a mean test {shown.label} of {mean}"
    text = (
        f"The {label}{main.at_text} reaches {reaches} {shown.bounds(main.interval)}; the worst tenth "
        f"of clients {shown.text(main.worst_decile)}{shown.unit}"
    )
    if main.unseen is not None:
        text += f"; clients unseen in the rounds {shown.text(main.unseen)}{shown.unit}"
    if main.hurt_global is not None:
        text += f". It hurts {percent(main.hurt_global, digits=0)} % of clients ({_below(shown)} the global model)"
    return f"{text}."


def _below(shown: Shown) -> str:
    return "below" if shown.measure.name == "accuracy" else "worse than"


def overlapping(results: Results) -> str:
    """Return what the tickets have in common, in one sentence; "" where no two tickets were saved."""
    return _overlap(results) if results.overlaps else ""


def _overlap(results: Results) -> str:
    values = [float(one.pairs(one.jaccard).mean()) for one in results.overlaps]
    fair = [float(one.pairs(one.chance).mean()) for one in results.overlaps]
    text = f"Two clients' tickets overlap by {np.mean(values):.2f} (Jaccard), chance alone gives {np.mean(fair):.2f}"
    first = results.overlaps[0]
    if first.saved > len(first.clients):
        text += f" ({len(first.clients)} drawn of {first.saved:,} clients)"
    # several seeds: the least clear one is told, which cannot flatter
    test = max((one.test for one in results.overlaps), key=lambda one: one.p_value if one.permutations else 2)
    if not test.permutations:
        return f"{text}; whether similar labels mean similar tickets cannot be tested here."
    told = f"Spearman {signed(test.correlation)}, permutation p {'<' if test.p_value < 0.001 else '='} " + (
        "0.001" if test.p_value < 0.001 else f"{test.p_value:.3f}"
    )
    alike = "overlap more" if test.p_value < PERMUTATION_LEVEL else "do not clearly overlap more"
    return f"{text}; clients with similar labels {alike} ({told})."


def numbers(results: Results) -> tuple[Number, ...]:
    """Return the headline numbers: the main arm, what it is held against, and the bytes both ways."""
    found: list[Number] = []
    main = results.summary(results.main)
    shown = results.shown
    held: Sequence[ArmSummary | None] = [main, *(results.best_known(arm) for arm in ("global", "dense", "local"))]
    for one in dict.fromkeys(item for item in held if item is not None):
        arm = arm_of(one.choice.arm)
        value, metric = (
            f"{shown.text(one.mean)}{shown.unit}",
            "" if shown.measure.name == "accuracy" else f", {shown.label}",
        )
        interval = f"95 % interval {shown.bounds(one.interval)}"
        found.append(Number(value, f"{arm.label}{one.at_text}{metric}", interval))
    for task in results.tasks if not results.one_metric else ():
        if (its := task.summary(results.main)) is not None:
            label = f"{task.name}: {arm_of(its.choice.arm).label}"
            value = f"{task.shown.text(its.mean)}{task.shown.unit}"
            found.append(Number(value, label, f"{task.shown.label}, {task.shown.bounds(its.interval)}"))
    moved = [
        (one.unicast.up_bytes, one.unicast.down_bytes, one.unicast.total_bytes, one.dense_bytes)
        for one in results.traffics
    ]
    up, down, both, dense = (float(mean) for mean in np.mean(moved, axis=0))
    found.append(Number(scaled(up, "B"), "payload up", f"{scaled(both, 'B')} both ways"))
    found.append(Number(scaled(down, "B"), "payload down", _saved(both, dense)))
    return tuple(found)


def _saved(total: float, dense: float) -> str:
    if not dense:
        return "no visit in the ledger"
    share = 1 - total / dense
    side = "below" if share >= 0 else "above"
    return f"both ways {abs(100 * share):.1f} % {side} dense FedAvg's {scaled(dense, 'B')}"


def _clients(row: RoundRow) -> str:
    return ", ".join(f"client {one.client} ({one.distance:.2f})" for one in row.mask_outliers)


def honest_notes(results: Results) -> tuple[str, ...]:
    """Return what a reader must know before believing: unfinished runs, refused messages, missing clients."""
    notes = list(results.notes)
    for facts, moved in zip(results.group, results.traffics, strict=True):
        seed = f"seed {facts.header.seed}: " if len(results.group) > 1 else ""
        if moved.refused.messages:
            told = sorted({row.status for row in facts.ledger if is_refused(row)})
            shown = "; ".join(told[:3]) + ("; ..." if len(told) > 3 else "")
            messages = _plural(moved.refused.messages, "message")
            notes.append(f"{seed}{messages} refused or failed ({shown}); bytes counted")
        met = Counter(one.fault for row in facts.rounds for one in row.injected)
        if met:
            counted = ", ".join(f"{fault} {count}" for fault, count in sorted(met.items()))
            notes.append(f"{seed}faults were put into {_plural(met.total(), 'visit')} on purpose (chaos): {counted}")
        notes += [
            f"{seed}round {row.round} of {row.phase}: "
            f"{f'undone: {row.undone}' if row.undone else 'no client could use the global model'}; rolled back to "
            f"{row.rolled_back_to}"
            for row in facts.rounds
            if row.rolled_back_to
        ]
        if void := [f"{row.phase} {row.round}" for row in facts.rounds if row.void]:
            shown = ", ".join(void[:5]) + (", ..." if len(void) > 5 else "")
            notes.append(f"{seed}rounds with too few usable replies, in which everything stayed as it was: {shown}")
        if away := sum(bool(row.absent) for row in facts.rounds):
            notes.append(
                f"{seed}not every client could be reached in {_plural(away, 'round')} (absent in rounds.jsonl)"
            )
        if facts.curve and not results.one_metric:
            notes.append(f"{seed}the curve is in curve.jsonl alone: tasks have different metrics, which have no mean")
        if lost := lost_evaluations(facts):
            notes.append(
                f"{seed}{_plural(lost, 'evaluation')} between the rounds failed; their points are of the others"
            )
        evaluated = {row.client for row in facts.metrics}
        missing = sorted(set(range(facts.header.num_clients)) - evaluated - set(facts.header.hostile))
        far = [f"{row.phase} {row.round}: {_clients(row)}" for row in facts.rounds if row.mask_outliers]
        if far:
            notes.append(
                f"{seed}masks far from all others of their round (a report, no judgement): {'; '.join(far[:5])}"
                + ("; ..." if len(far) > 5 else "")
            )
        if missing:
            shown = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
            clients = _plural(len(missing), "client")
            notes.append(f"{seed}{clients} without any result ({shown}); means are over the others")
    kinds = {row.test_accuracy is None for facts in results.group for row in facts.metrics}
    guesses = {False: "a uniform guess among the classes", True: "the mean of its training targets"}
    guess = " or ".join(guesses[kind] for kind in sorted(kinds))
    for found in results.summaries or [one for task in results.tasks for one in task.summaries]:
        if found.diverged:
            at = f"{arm_of(found.choice.arm).label} at {found.choice.target_density:.3g}"
            clients = f"{found.diverged} of {_plural(found.num_clients, 'client')}"
            notes.append(f"{at}: the training of {clients} diverged; each counts as {guess}")
        per_seed = found.num_clients / max(found.num_seeds, 1)
        largest = max((one.num_clients / max(one.num_seeds, 1) for one in results.summaries), default=0.0)
        if per_seed < largest:
            at = f"{arm_of(found.choice.arm).label} at {found.density_text}"
            notes.append(f"{at}: {per_seed:g} clients a seed, others {largest:g}; its mean is over fewer clients")
        if found.num_seeds < sum(1 for facts in results.group if facts.metrics):
            at = f"{arm_of(found.choice.arm).label} at {found.density_text}"
            notes.append(f"{at}: its mean is over {_plural(found.num_seeds, 'seed')} of {len(results.group)}")
    return tuple(notes)


def summary_text(results: Results) -> str:
    """Return the result of a run in a terminal's width: table, bytes, findings, notes."""
    header, shown = results.group[0].header, results.shown
    seeds = ", ".join(str(facts.header.seed) for facts in results.group)
    parts = [f"{header.study} · {header.method} · seed {seeds} · {header.num_clients} clients"]
    if results.summaries:
        whole = summary_table(results)
        others = [f"{other.label}{other.unit}" for other in others_of(results.group)]
        table = whole.columns([name for name in whole.header if name not in (*LEFT_OUT, *others)])
        parts.append(aligned(replace(table, header=tuple(TERMINAL.get(name, name) for name in table.header))))
        better = "" if shown.measure.name == "accuracy" else f" ({shown.better.lower()} is better)"
        parts.append(
            f"hurt: clients {_below(shown)} the global model.  Test {shown.label}{better}, read once at the end."
        )
        if others:
            parts.append(aligned(whole.columns(["arm", "density", *others])))
    more = [table for table in (chosen_table(results), tiers_table(results)) if table.rows]
    parts += [f"{table.title}\n\n{aligned(table)}" for table in more]
    if results.tasks:
        # Without a mean over all clients it is the one table of what came out.
        arms = ("global", "local", "dense") if results.summaries else None
        whole = tasks_table(results, arms=arms)
        parts.append(aligned(whole.columns([name for name in whole.header if name not in OF_TASKS])))
        if FURTHER in whole.header:
            parts.append(aligned(whole.columns(["task", "arm", "density", FURTHER])))
    wire = [one for one in numbers(results) if one.label.startswith("payload")]
    parts.append("\n".join(f"{one.label}: {one.value}  ({one.small})" for one in wire))
    parts.append(fill(reached(results), WIDTH))
    if told := inflation(results):
        parts += [aligned(curve_table(results)), fill(told, WIDTH)]
    rivals = against(results)
    if rivals.rows:
        parts.append(aligned(rivals))
    parts += [fill(text, WIDTH) for text in (overlapping(results), cost_text(results), fleet_text(results)) if text]
    notes = honest_notes(results)
    if notes:
        parts.append("\n".join(fill(f"note: {note}", WIDTH, subsequent_indent="      ") for note in notes))
    return "\n\n".join(parts) + "\n"
