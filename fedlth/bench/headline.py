"""What a bench says in plain English: did federation help, does a ticket beat its controls, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from fedlth.bench.board import Board, Line
from fedlth.bench.contrasts import FEWEST, LEVEL, Contrast
from fedlth.bench.controls import GLOBAL, RANDOM
from fedlth.bench.matrix import LOCAL, Matrix
from fedlth.bench.outcome import DONE, FAILED
from fedlth.bench.spending import federated_phases
from fedlth.report.measure import Shown
from fedlth.report.units import count

LARGE = 1.5  # standard deviations: a difference that one sees with the naked eye


def headline(board: Board) -> dict[str, str]:
    """Return what each partition's runs say, in sentences, the least flattering reading where there are two."""
    found = {}
    for partition in board.entries:
        sentences = [_best(board, partition), _federation(board, partition), *_masks(board, partition)]
        found[partition] = " ".join(one for one in sentences if one)
    return found or {board.matrix.name: "No cell has ended, so there is nothing to say."}


def _best(board: Board, partition: str) -> str:
    shown, first = board.shown, board.lines[partition][0]
    assert shown is not None
    entry = board.entries[partition][first.method]
    clients = first.summary.num_clients // max(1, first.summary.num_seeds)
    reached = f"{shown.text(first.summary.mean)}{shown.unit} {shown.bounds(first.interval)}"
    over = f"{clients} clients and {_seeds(len(entry.group))}"
    whole, held = board.complete(partition), board.entries[partition]
    among = "" if len(whole) == len(held) else f" of the {len(whole)} methods (of {len(held)}) that have all seeds"
    return f"{first.method} has the best mean test {shown.label}{among}, {reached} over {over}."


def _federation(board: Board, partition: str) -> str:
    """Say whether any federated method is better than every client alone."""
    shown, found = board.shown, board.contrasts(partition, LOCAL)
    assert shown is not None
    rounds = {name: federated_phases(board.entries[partition][name].group[0].header, 1) for name in found}
    federated = {name: one for name, one in found.items() if rounds[name]}
    if not federated:
        return ""
    ahead = {name: one for name, one in federated.items() if one.ahead}
    sure, length = _sure(federated), _length(board, partition, list(federated))
    worse = _worse(shown, "training alone (local)", federated)
    if not ahead:
        most = max(one.num_seeds for one in federated.values())
        whole = {name: one for name, one in federated.items() if one.num_seeds == most}
        name, best = max(whole.items(), key=lambda pair: float(shown.gain(pair[1].mean)))
        if shown.gain(best.mean) <= 0:
            none = f"none of {len(federated)} federated methods has a better mean than training alone (local)"
            return f"Federation did not help here: {none}.{worse}{length}"
        gap = f"{shown.difference(best.mean)}{_points(shown)} {shown.bounds(best.interval, signed=True)}"
        none = f"none of {len(federated)} federated methods is clearly better than training alone (local){sure}"
        said = f"Federation is not shown to help here: {none}; the largest gain is {name}'s, {gap}."
        return f"{said}{worse}{length}"
    told = [f"{name} by {shown.difference(one.mean)}" for name, one in _ranked(ahead)]
    are, unit = "is" if len(ahead) == 1 else "are", f", in{_points(shown)}" if shown.measure.percent else ""
    many = f"{len(ahead)} of {len(federated)} federated methods"
    return f"Better than training alone (local) {are} {many}{sure}{unit}: {_list(told)}.{worse}{length}"


def _worse(shown: Shown, phrase: str, found: Mapping[str, Contrast]) -> str:
    """Name who is clearly worse than what `phrase` says, the furthest first, as a sentence with a space before it."""
    behind = {name: one for name, one in found.items() if one.behind}
    if not behind:
        return ""
    told = [f"{name} by {shown.difference(one.mean)}" for name, one in _ranked(behind)]
    unit = f", in{_points(shown)}" if shown.measure.percent else ""
    return f" Worse than {phrase}{_sure(behind)}{unit}: {_list(told)}."


def _length(board: Board, partition: str, names: Sequence[str]) -> str:
    """Warn where local has trained for fewer or more epochs than methods that it is held against."""
    held, label = board.entries[partition], board.matrix.label_of(LOCAL)
    assert label is not None
    epochs = {name: held[name].cost.round_epochs + held[name].cost.own_epochs for name in (label, *names)}
    longer = [f"{name} {_epochs(epochs[name])}" for name in names if epochs[name] > epochs[label] + 0.05]
    shorter = [name for name in names if epochs[name] < epochs[label] - 0.05]
    if not longer and not shorter:
        return ""
    usual = float(np.median([epochs[name] for name in names]))
    told = [f"fewer than {_list(longer)}"] if longer else []
    if shorter:
        among = f"{len(shorter)} of {len(names)} federated methods (the median of all is {_epochs(usual)})"
        told.insert(0, f"more than {among}")
    return (
        f" A caution: local trained for {_epochs(epochs[label])} epochs a client, {' and '.join(told)}: "
        "a part of such a difference may be the longer training."
    )


def _masks(board: Board, partition: str) -> list[str]:
    """Say for whose masks a random one, or the global model's own, is as good."""
    sentences = []
    for kind, phrase in ((RANDOM, "a random mask of the same density"), (GLOBAL, "the global model's own mask")):
        found = board.beaten(partition, kind)
        idle = {name: one for name, one in found.items() if not one.ahead and not one.behind}
        good = {name: one for name, one in found.items() if one.ahead}
        if idle:
            verb = "is not shown to beat" if len(idle) == 1 else "are not shown to beat"
            whose = "mask" if len(idle) == 1 else "masks"
            seen = _seen(board.shown, idle, sum(one.tested for one in found.values()))
            sentences.append(f"The {whose} of {_list(list(idle))} {verb} {phrase}{_sure(idle)}{seen}.")
        if good:
            sentences.append(f"Better than {phrase}{_sure(good)}: {_list(list(good))}.")
        if board.shown is not None and (worse := _worse(board.shown, phrase, found)):
            sentences.append(worse.strip())
    return sentences


def _sure(found: Mapping[str, Contrast]) -> str:
    """Say what stands behind verdicts: a test over seeds, or none; of whom, where that is not the same for all."""
    grounds: dict[tuple[bool, int, bool], list[str]] = {}
    for name, one in found.items():
        grounds.setdefault((not one.tested, -one.num_seeds, one.level), []).append(name)
    told = []
    for place, ((untested, seeds, level), names) in enumerate(sorted(grounds.items())):
        why = f"untested, {_seeds(-seeds)}{' that differ by the same' if level else ''}"
        ground = why if untested else f"paired t over {_seeds(-seeds)}, Holm, 5 %"
        told.append(f"{_list(names)}: {ground}" if place or (len(grounds) > 1 and untested) else ground)
    return f" ({'; '.join(told)})" if told else ""


def _seen(shown: Shown | None, idle: Mapping[str, Contrast], tests: int) -> str:
    """Say how large a difference would have been clear, where a test stands behind the verdicts."""
    sizes = {name: one.seen(tests) for name, one in idle.items() if one.tested}
    if shown is None or not sizes:
        return ""
    possible = {name: size for name, size in sizes.items() if size <= 1 or not shown.measure.percent}
    if not possible:
        return "; their seeds differ too much for any difference to have been clear"
    least, most = (pick(possible, key=lambda name: possible[name]) for pick in (min, max))
    low, high = (shown.difference(possible[name]).lstrip("+") for name in (least, most))
    wide = f"{low} ({least}) to {high}{_points(shown)} ({most})" if len(possible) > 1 else f"{low}{_points(shown)}"
    never = [name for name in sizes if name not in possible]
    return f"; a difference of {wide} would have been clear{f', for {_list(never)} none' if never else ''}"


def warnings(board: Board) -> tuple[str, ...]:
    """Return what a reader must know before believing: few seeds, failed cells, masks without a control."""
    found = [*board.problems, *idle(board.matrix)]
    seeds = [len(entry.group) for held in board.entries.values() for entry in held.values()]
    if seeds and min(seeds) < FEWEST:
        found.append(
            f"Some methods have {_seeds(min(seeds))}. Below {FEWEST} seeds nothing is tested: intervals are over "
            "clients, who share one federation, so another seed may rank the methods otherwise."
        )
    elif seeds and (spread := needed(min(seeds), len(board.matrix.ranked) - 1)) > LARGE:
        found.append(
            f"With {_seeds(min(seeds))} and {len(board.matrix.ranked)} methods a test sees large differences only: "
            f"the first that Holm lets pass is {spread:.1f} times its standard deviation over seeds. No clear "
            "difference does not mean that there is none."
        )
    found += _level(board)
    failed: dict[str, list[str]] = {}
    for name, one in board.outcomes.items():
        if one.status == FAILED:
            failed.setdefault(one.reason, []).append(name)
    found += [f"{_list(names)} failed: {reason}" for reason, names in failed.items()]
    rest = sum(one.status not in (DONE, FAILED) for one in board.outcomes.values())
    if rest:
        found.append(f"{rest} of {len(board.outcomes)} cells have not ended; the tables are of the others.")
    if board.ranking is not None:
        left = {name for held in board.entries.values() for name in held} - set(board.ranking.names)
        if left:
            found.append(f"Not ranked, since they lack a block that others have: {_list(sorted(left))}.")
    for partition, held in board.entries.items():
        for name, entry in held.items():
            if entry.makes_masks and entry.of_kind(RANDOM) is None and not entry.beside:
                found.append(f"{partition}/{name} makes masks, but no random mask stands beside it.")
        found += [_diverged(partition, line) for line in board.lines[partition] if line.summary.diverged]
    return tuple(found)


def _diverged(partition: str, line: Line) -> str:
    """Say of how many clients the training diverged, of a method's own row or of a control's, then by its arm."""
    arm = f", its {line.control} (arm {line.summary.choice.arm})" if line.control and not line.row else ""
    many = line.summary.diverged
    told = "1 client diverged; it is a guess" if many == 1 else f"{many} clients diverged; each is a guess"
    return f"{partition}/{line.row or line.method}{arm}: the training of {told}."


def idle(matrix: Matrix) -> list[str]:
    """Say which methods cannot do what they are for, as their studies stand."""
    return [f"{_list(names)} cannot do what the method is for: {why}." for why, names in matrix.idle.items()]


def _level(board: Board) -> list[str]:
    """Say which differences have no spread over seeds, so that nothing could be tested."""
    found = []
    for partition, lines in board.lines.items():
        pairs = [(line.method, name, one) for line in lines for name, one in line.against.items()]
        pairs += [(line.method, line.against_it, line.beaten) for line in lines if line.beaten is not None]
        flat = [f"{method} less {name}" for method, name, one in pairs if one.level]
        if flat:
            found.append(f"{partition}: untested, since all seeds differ by exactly the same: {_list(flat)}.")
    return found


def needed(seeds: int, methods: int) -> float:
    """Return how many standard deviations over seeds the largest of so many differences must be to be clear."""
    from scipy.stats import t

    return float(t.ppf(1 - LEVEL / max(1, methods) / 2, seeds - 1)) / math.sqrt(seeds)


def _seeds(number: int) -> str:
    return f"{number} seed{'' if number == 1 else 's'}"


def _epochs(number: float) -> str:
    return count(round(number, 1))


def _points(shown: Shown) -> str:
    return " points" if shown.measure.percent else ""


def _ranked(found: dict[str, Contrast]) -> list[tuple[str, Contrast]]:
    return sorted(found.items(), key=lambda pair: -abs(pair[1].mean))


def _list(names: Sequence[str]) -> str:
    shown = list(names[:6]) + ([f"{len(names) - 6} more"] if len(names) > 6 else [])
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
