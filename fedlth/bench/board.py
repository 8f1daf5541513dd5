"""A bench's results, worked out once from its run folders; tables, pictures and the page only lay them out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from fedlth.bench.contrasts import NO_INTERVAL, Contrast, contrast, corrected, gains, masked, over_seeds
from fedlth.bench.controls import DENSE, GLOBAL, KINDS, RANDOM, kinds_of
from fedlth.bench.matrix import LOCAL, Cell, Matrix
from fedlth.bench.outcome import DONE, UNFINISHED, Outcome, finished, read_outcome
from fedlth.bench.ranks import Ranking, ranking
from fedlth.bench.spending import Spending, federated_phases, mean_spending, spending
from fedlth.bench.time_to import Reached, time_to_worst
from fedlth.errors import StudyError
from fedlth.experiment.well_formed import method_of
from fedlth.report.choice import Choice, rows_of
from fedlth.report.facts import Facts, one_cell, read_run
from fedlth.report.intervals import Interval
from fedlth.report.measure import Shown, shown_of
from fedlth.report.results import Results, results_of
from fedlth.report.statistics import ArmSummary, summarise_arm
from fedlth.storage.records import MetricRow


@dataclass(frozen=True)
class Line:
    """One row of a table: a method's own result, or one of its controls (`control` says which; "" for the method).

    row: the row of the bench that is this control, "" where the method's own runs have it; against: contrasts with the
    methods that all are held against; beaten: the method's own row less this control; alone: the contrast with
    local, whether `against` has it or not; same: this control has the method's own mask; missing: seeds that other
    methods of the partition have and this one lacks; seeds: 95 % interval of the mean over seeds alone, with these
    clients; fewer: this control is of the clients that can have a mask, the method's own row of all; shift: added to
    its mean in pictures, so that it stands as far from the method's as it does on its clients.
    """

    method: str
    control: str
    summary: ArmSummary
    against: Mapping[str, Contrast]
    beaten: Contrast | None = None
    alone: Contrast | None = None
    same: bool = False
    missing: int = 0
    seeds: Interval = NO_INTERVAL
    fewer: bool = False
    shift: float = 0.0
    row: str = ""

    @property
    def against_it(self) -> str:
        """Name a control as what its method is held against."""
        return self.row or f"its {self.control}"

    @property
    def interval(self) -> Interval:
        """The 95 % interval of the mean: over seeds where they are enough, else a bootstrap over their clients."""
        return self.summary.interval if np.isnan(self.seeds.low) else self.seeds

    @property
    def drawn(self) -> float:
        """The mean, where pictures have it."""
        return self.summary.mean + self.shift


@dataclass(frozen=True)
class Entry:
    """A method on a partition: the runs of its finished seeds, what speaks for it, and what it took.

    own_masks: clients have masks of their own; kinds: what each control is called, by arm; beside: the rows of the
    bench that are its random controls, each with runs of its own.
    """

    label: str
    results: Results
    choice: Choice
    cost: Spending
    own_masks: bool = False
    kinds: Mapping[str, str] = field(default_factory=lambda: KINDS)
    beside: Mapping[str, Entry] = field(default_factory=dict)

    @property
    def group(self) -> tuple[Facts, ...]:
        return self.results.group

    @cached_property
    def masked(self) -> tuple[Facts, ...]:
        """The runs as its mask is held against its controls: without clients that can have none of their own."""
        return masked(self.group, self.choice.arm)

    @cached_property
    def controls(self) -> dict[str, Choice]:
        """The arms that the method's own row is held against within its runs, at its own density: arm -> choice."""
        found: dict[str, Choice] = {}
        for summary in self.results.summaries:
            one = summary.choice
            wanted = one.chosen == self.choice.chosen and one.target_density == self.choice.target_density
            dense = self.kinds.get(one.arm, "").startswith(DENSE) and one.target_density == 1 and not one.chosen
            own = one.arm in ("own_random", "own_global_mask", "frozen_random")
            if one.arm in self.kinds and one != self.choice and (dense or own or wanted) and self.makes_masks:
                found.setdefault(one.arm, one)
        return found

    @property
    def makes_masks(self) -> bool:
        """Say whether the method's own row is of masks: of its clients, of fewer weights, or with controls of them.

        FedSelect's say what crosses: its models have all weights.
        """
        arms = {summary.choice.arm for summary in self.results.summaries}
        summary = self.results.summary(self.choice)
        sparse = summary is not None and summary.density < 1 - 1e-9
        return self.own_masks or sparse or bool(arms & {"own_random", "frozen_random"})

    def of_kind(self, kind: str) -> Choice | None:
        """Return the control of a kind: the random mask, the global model's mask, or the dense twin."""
        return next((choice for arm, choice in self.controls.items() if self.kinds[arm] == kind), None)

    @cached_property
    def one_mask(self) -> bool:
        """Say whether the control of the global model's mask has the method's own mask, for every client and seed.

        Rows name their masks by digest; where a sparse one has none, equal numbers alone tell. Equal densities do not:
        who shares one mask may have revived weights in it that are still zero, which are then not the largest.
        """
        control = self.of_kind(GLOBAL)
        if control is None:
            return False
        runs = [(rows_of(facts, self.choice), rows_of(facts, control)) for facts in self.masked]
        pairs = [(own[client], its[client]) for own, its in runs for client in own if client in its]
        named = all(row.ticket or row.density == 1 for pair in pairs for row in pair)
        return bool(pairs) and all(a.ticket == b.ticket if named else _numbers(a) == _numbers(b) for a, b in pairs)

    def blocks(self, control: Choice | None = None) -> dict[int, float]:
        """Return the metric's mean over clients, by seed, of the method's own row or of a control's."""
        shown, choice = shown_of(self.group), control or self.choice
        return {
            facts.header.seed: float(np.mean([shown.of(row) for row in rows_of(facts, choice).values()]))
            for facts in (self.masked if control else self.group)
            if rows_of(facts, choice)
        }


@dataclass(frozen=True)
class Board:
    """Everything a leaderboard shows. `entries` by partition and method; `outcomes` of every cell, by its name."""

    matrix: Matrix
    root: Path
    entries: Mapping[str, Mapping[str, Entry]]
    outcomes: Mapping[str, Outcome]
    problems: tuple[str, ...]

    @cached_property
    def shown(self) -> Shown | None:
        """The metric; None where nothing has ended."""
        groups = [entry.group for held in self.entries.values() for entry in held.values()]
        return shown_of(groups[0]) if groups else None

    @cached_property
    def references(self) -> dict[str, str]:
        """What all methods are held against: the name of the method -> its label in this bench."""
        found = {}
        for wanted in self.matrix.against:
            if (label := self.matrix.label_of(wanted)) is not None:
                found[wanted] = label
        return found

    def cost_of(self, partition: str, line: Line) -> Spending:
        """Return what the runs of a line took: those of its method, or of the row that it is."""
        entry = self.entries[partition][line.method]
        return (entry.beside[line.row] if line.row else entry).cost

    def complete(self, partition: str) -> set[str]:
        """Return the methods that have all seeds of those that have most: only they can be the best."""
        seeds = {name: frozenset(entry.blocks()) for name, entry in self.entries[partition].items()}
        counts = Counter(seeds.values())
        most = max(counts, key=lambda one: (len(one), counts[one]), default=frozenset())
        return {name for name, ours in seeds.items() if ours >= most}

    @cached_property
    def lines(self) -> dict[str, tuple[Line, ...]]:
        """The table of each partition: methods from best to worst, under each its controls."""
        return {partition: self._lines(held) for partition, held in self.entries.items()}

    @cached_property
    def ranking(self) -> Ranking | None:
        """Average ranks over (partition, seed), of the methods that have every block that any has."""
        if self.shown is None:
            return None
        scores: dict[str, dict[str, float]] = {}
        for partition, held in self.entries.items():
            for label, entry in held.items():
                values = {f"{partition}, seed {seed}": value for seed, value in entry.blocks().items()}
                scores.setdefault(label, {}).update(values)
        most = max((len(values) for values in scores.values()), default=0)
        whole = {label: values for label, values in scores.items() if len(values) == most}
        return ranking(whole, higher_is_better=self.shown.measure.higher_is_better)

    @cached_property
    def reached(self) -> dict[str, Reached]:
        """On each partition, what all federated methods reach, and the simulated time that each takes to it."""
        return {
            partition: time_to_worst({
                name: entry.group for name, entry in held.items() if federated_phases(entry.group[0].header, 1)
            })
            for partition, held in self.entries.items()
        }  # fmt: skip

    @property
    def timed(self) -> bool:
        """Say whether any run has simulated time."""
        return any(e.cost.simulated_s is not None for held in self.entries.values() for e in held.values())

    def contrasts(self, partition: str, reference: str) -> dict[str, Contrast]:
        """Return every method less a reference on a partition, Holm-corrected over the methods."""
        held, label = self.entries[partition], self.matrix.label_of(reference)
        if label is None or label not in held:
            return {}
        base = held[label]
        return corrected({
            name: contrast(gains(e.group, e.choice, base.group, base.choice), better=self._better)
            for name, e in held.items() if name != label
        })  # fmt: skip

    def beaten(self, partition: str, kind: str) -> dict[str, Contrast]:
        """Return every method less its control of a kind, Holm-corrected over the methods that have one.

        A method whose own mask is the global model's is not held against itself.
        """
        found: dict[str, Contrast | None] = {}
        for name, entry in self.entries[partition].items():
            if (control := entry.of_kind(kind)) is not None and not (kind == GLOBAL and entry.one_mask):
                found[name] = contrast(gains(entry.masked, entry.choice, entry.masked, control), better=self._better)
            for row, other in entry.beside.items() if kind == RANDOM else ():
                pairs = gains(entry.masked, entry.choice, other.masked, other.choice)
                found[against_row(name, row)] = contrast(pairs, better=self._better)
        return corrected(found)

    @property
    def _better(self) -> bool:
        return self.shown is None or self.shown.measure.higher_is_better

    def _lines(self, held: Mapping[str, Entry]) -> tuple[Line, ...]:
        partition = next(name for name, one in self.entries.items() if one is held)
        against = {name: self.contrasts(partition, name) for name in self.references}
        kinds = {kind: self.beaten(partition, kind) for kind in dict.fromkeys(KINDS.values())}
        alone, whole = self.contrasts(partition, LOCAL), self.complete(partition)
        most = max((len(entry.blocks()) for entry in held.values()), default=0)
        found: list[Line] = []
        for label, entry in sorted(held.items(), key=lambda pair: (pair[0] not in whole, self._rank(pair[1]))):
            missing = 0 if label in whole else max(1, most - len(entry.blocks()))
            main = entry.results.summary(entry.choice)
            assert main is not None
            ours = {name: one[label] for name, one in against.items() if label in one}
            seeds = over_seeds(entry.blocks().values())
            found.append(Line(label, "", main, ours, alone=alone.get(label), missing=missing, seeds=seeds))
            for arm, choice in entry.controls.items():
                kind = entry.kinds[arm]
                beaten = kinds[kind].get(label) if entry.of_kind(kind) == choice else None
                same = kind == GLOBAL and entry.one_mask
                found.append(_control(entry, entry, kind, choice, beaten, main, same=same, missing=missing))
            for row, other in entry.beside.items():
                beaten, lacks = kinds[RANDOM].get(against_row(label, row)), max(0, most - len(other.blocks()))
                found.append(_control(entry, other, RANDOM, other.choice, beaten, main, missing=lacks, row=row))
        return tuple(found)

    def _rank(self, entry: Entry) -> float:
        main = entry.results.summary(entry.choice)
        assert main is not None
        return -main.mean if self._better else main.mean


def _control(
    entry: Entry, ran: Entry, kind: str, choice: Choice, beaten: Contrast | None, main: ArmSummary, *,
    same: bool = False, missing: int = 0, row: str = "",
) -> Line:  # fmt: skip
    """Return the line of a control of `entry`, whose runs are those of `ran`: the same entry, or a row beside it."""
    of_all = ran.results.summary(choice)
    group = masked(ran.group, entry.choice.arm)
    summary = replace(summarise_arm(group, choice), unseen=of_all.unseen if of_all else None)
    fewer = summary.num_clients < main.num_clients
    return Line(
        entry.label, kind, summary, {}, beaten, same=same, missing=missing, row=row, fewer=fewer,
        seeds=over_seeds(ran.blocks(choice).values()),
        shift=main.mean - beaten.mean - summary.mean if fewer and beaten else 0.0,
    )  # fmt: skip


def against_row(method: str, row: str) -> str:
    """Name the contrast of a method with a row that is its control, in words and as a key."""
    return f"{method} (against {row})"


def read_board(matrix: Matrix, root: Path) -> Board:
    """Return the results of the cells that have ended, from their run folders alone."""
    entries: dict[str, dict[str, Entry]] = {}
    problems: list[str] = []
    outcomes = {cell.name: _outcome(cell.folder(root)) for cell in matrix.cells}
    for partition in matrix.partitions:
        held: dict[str, Entry] = {}
        for label in matrix.methods:
            ours = [c for c in matrix.cells if (c.partition, c.method) == (partition, label)]
            ended = [cell.folder(root) for cell in ours if finished(cell.folder(root))]
            if not ended:
                continue
            try:
                held[label] = _entry(ours[0], ended)
                problems += _lacking(ours[0], held[label]) if label in matrix.ranked else []
            except StudyError as error:
                problems.append(f"{partition}/{label} is left out: {error}")
        problems += _unlike(partition, held)
        lone = [row for row, of in matrix.control_of.items() if row in held and of not in held]
        problems += [f"{partition}/{row} is left out: nothing of {matrix.control_of[row]} has ended" for row in lone]
        if ranked := [label for label in matrix.ranked if label in held]:
            entries[partition] = {label: _with_controls(matrix, held, label) for label in ranked}
    known = {cell.folder(root) for cell in matrix.cells}
    others = sorted(str(file.parent.relative_to(root)) for file in root.glob("*/*/*/header.json")
                    if file.parent not in known)  # fmt: skip
    if others:
        problems.append(f"runs that the bench no longer names are left out: {', '.join(others[:5])}")
    return Board(matrix, root, entries, outcomes, tuple(problems))


def _outcome(folder: Path) -> Outcome:
    """Return how a cell stands; what its run says of itself counts more than what was noted beside it."""
    found = read_outcome(folder)
    if finished(folder):
        return Outcome(DONE, "", found.seconds, found.peak_memory_mb)
    return Outcome(UNFINISHED, "", found.seconds, found.peak_memory_mb) if found.status == DONE else found


def _numbers(row: MetricRow) -> tuple[object, ...]:
    return row.client, row.density, row.test_accuracy, row.test_loss, row.val_accuracy


def _entry(cell: Cell, folders: Sequence[Path]) -> Entry:
    group = one_cell([read_run(folder) for folder in folders])
    if len(group[0].header.judged) > 1:
        raise StudyError("its clients are judged by several metrics, which have no common mean")
    results = results_of(group)
    if results.main is None:
        raise StudyError("no client was evaluated")
    choice = results.main
    method, spent = method_of(cell.study), mean_spending([spending(facts, choice) for facts in group])
    return Entry(cell.method, results, choice, spent, method.own_masks, kinds_of(cell.study))


def _lacking(cell: Cell, entry: Entry) -> list[str]:
    """Name the controls that a method has by now, and that runs of an earlier version lack."""
    found = []
    for arm in (cell.study.personalise.arms or method_of(cell.study).arms) if entry.makes_masks else ():
        seeds = [facts.header.seed for facts in entry.group if all(row.arm != arm for row in facts.metrics)]
        if seeds and arm in entry.kinds:
            which = f"{entry.kinds[arm]} (arm {arm}) in seeds {', '.join(map(str, seeds))}"
            found.append(
                f"{cell.partition}/{cell.method} has no {which}, which were run before the method had it: remove "
                "their folders to run them again"
            )
    return found


def _with_controls(matrix: Matrix, held: Mapping[str, Entry], label: str) -> Entry:
    """Return a method's entry with the rows that are its controls."""
    rows = {row: held[row] for row, of in matrix.control_of.items() if of == label and row in held}
    return replace(held[label], beside=rows)


def _unlike(partition: str, held: Mapping[str, Entry]) -> list[str]:
    """Say where methods of one partition do not have the same data, so that no pairing would be fair, or network."""
    found, seen = [], dict[int, tuple[str, str]]()
    for label, entry in held.items():
        for facts in entry.group:
            digests = (facts.header.data_digest, facts.header.partition_digest)
            if seen.setdefault(facts.header.seed, digests) != digests:
                found.append(f"{partition}/{label}, seed {facts.header.seed}: other data than the methods before it")
    sizes = {label: entry.group[0].header.num_parameters for label, entry in held.items()}
    usual = Counter(sizes.values()).most_common(1)[0][0] if sizes else 0
    others = "the others" if len(set(sizes.values())) == 2 else "most others"
    for size in sorted(set(sizes.values()) - {usual}):
        names = [label for label in sizes if sizes[label] == size]
        has = f"{' and '.join(names)} {'has' if len(names) == 1 else 'have'}"
        found.append(f"{partition}: {has} {size:,} parameters, {others} {usual:,}: another network.")
    return found
