"""Crossovers that are measured layer by layer, and what a table with crossovers does otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("numba")
pytestmark = pytest.mark.timeout(600)  # the first use on a machine compiles

from fedlth.kernel import columns as col  # noqa: E402
from fedlth.kernel import crossover, kernel  # noqa: E402
from fedlth.kernel.step_time import TRAINING_STEPS, StepTimer, in_turns  # noqa: E402
from fedlth.models.registry import build  # noqa: E402
from tests.kernel.nets import Case, Residual, case  # noqa: E402
from tests.kernel.test_backends import agrees  # noqa: E402


def network(density: float | None = 0.5) -> Case:
    torch.manual_seed(0)
    return case(build("lenet5", num_classes=10, input_shape=(1, 28, 28), options={}), (1, 28, 28), density=density)


def listed(found: Case) -> list[int]:
    rows = kernel.prepared(found.table, 16, found.mask).plan.rows
    return [int(row[col.SPARSE]) for row, op in zip(rows, found.table.ops, strict=True) if op.weighted]


def test_a_list_begins_where_its_line_meets_the_dense_layer() -> None:
    assert crossover.met(dense=3.0, half=5.0, thin=3.0) == 0.25
    assert crossover.met(dense=4.0, half=3.0, thin=2.0) == 0.75
    assert crossover.met(dense=9.0, half=3.0, thin=2.0) == 1.0 and crossover.met(dense=1.0, half=9.0, thin=8.0) == 0.0
    assert crossover.met(dense=4.0, half=2.01, thin=2.0) is None is crossover.met(dense=4.0, half=1.0, thin=2.0)


def test_every_layer_is_measured_alone_and_equal_ones_once(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"dense": 4.0, "half": 3.0, "thin": 2.0}
    asked = list[str]()

    def told(runs: dict[tuple[object, str], StepTimer], cpu_s: float) -> dict[tuple[object, str], float]:
        asked.extend(what for _, what in runs)  # in less than no time nothing is trained
        return {key: times[key[1]] * (cpu_s < 0 or run() > 0) for key, run in runs.items()}

    monkeypatch.setattr(crossover, "in_turns", told)
    table = network().table
    assert crossover.lists_below(table, 16, 1.0) == (0.75,) * 5 and len(asked) == 15
    asked.clear()
    twice = replace(table, ops=(*table.ops, table.ops[-2]))
    assert len(crossover.lists_below(twice, 16, -1.0)) == 6 and len(asked) == 15
    head = next(op for op in reversed(table.ops) if op.weighted)
    unpruned = replace(table, num_prunable=head.weight)  # the last weights lie behind what is prunable
    assert crossover.lists_below(unpruned, 16, -1.0) == (0.75,) * 4 + (0.4,)
    assert set(crossover.lists_below(case(Residual(), (1, 9, 9)).table, 16, 1.0)) == {0.75}, (
        "strides, groups, shortcuts"
    )


def test_a_table_lists_what_it_is_told_to() -> None:
    found = network()
    assert listed(found) == [1, 1, 0, 0, 0], "below .6 a convolution, below .4 a linear layer"
    turned = replace(found, table=found.table.with_lists_below((0.0, 0.9, 0.9, 0.0, 0.6)))
    assert listed(turned) == [0, 1, 1, 0, 1]
    assert "a list of kept weights below density 0.9" in "\n".join(turned.table.describe())
    agrees(turned)
    assert not np.array_equal(turned.kernel().floats, found.kernel().floats), "in another order, so it is recorded"


def test_a_table_says_how_many_examples_go_side_by_side_and_what_torch_trains() -> None:
    found = network()
    for narrow, lanes in ((None, 16), (0.45, 32), (0.55, 16)):
        assert kernel.prepared(replace(found.table, narrow_below=narrow), 32, found.mask).lanes == lanes
    share = kernel.share(found.table, found.mask)
    assert 0.5 < share < 1
    for above, ticket, dense in ((None, True, True), (math.inf, True, True), (1.0, True, False), (share, False, False)):
        table = replace(found.table, torch_above=above)
        assert (kernel.suits(table, found.mask), kernel.suits(table, None)) == (ticket, dense)


def test_a_timer_ends_a_training_after_a_few_steps_and_takes_more_of_short_ones() -> None:
    begun = list[int]()

    def train(step: Callable[[], None]) -> None:
        begun.append(0)
        for _ in range(TRAINING_STEPS + 1):
            step()
            begun[-1] += 1
        pytest.fail("a timer looks at no more steps")

    timer = StepTimer(train, lambda: sum(range(200_000)))
    first = timer()
    assert timer.steps == TRAINING_STEPS and timer() < first + 1.0
    assert begun == [1, TRAINING_STEPS]
    assert timer() > StepTimer(train)(), "what is prepared counts, spread over a training"


def test_turns_give_the_least_and_leave_out_the_first() -> None:
    said = {"a": iter([0.1, 5.0, 4.0, *[6.0] * 9]), "b": iter([0.1, *[3.0] * 11])}
    assert in_turns({key: said[key].__next__ for key in said}, 60.0) == {"a": 4.0, "b": 3.0}
    calls = list[int]()

    def long() -> float:
        calls.append(sum(range(300_000)))
        return 1.0

    in_turns({"a": long}, 1e-9)
    assert len(calls) == 2, "a turn beyond the first, whatever it takes"
