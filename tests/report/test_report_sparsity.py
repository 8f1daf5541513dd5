"""The sparsity that a client reaches, on cases that a hand can check."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fedlth.report.build import read_results, write_report
from fedlth.report.facts import Facts, read_run
from fedlth.report.results import Results, results_of
from fedlth.report.sparsity import sparsity_table, told
from fedlth.report.tables import Table
from fedlth.storage.header import Measure
from fedlth.storage.records import MetricRow

TICKET, RANDOM, INIT = {0.7: 0.82, 0.5: 0.8, 0.3: 0.76, 0.1: 0.5}, {0.7: 0.6, 0.5: 0.7}, {0.7: 0.81, 0.5: 0.75}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    from fake_run import write_run

    return read_run(write_run(tmp_path_factory.mktemp("sparsity") / "run", num_clients=4))


def one(base: Facts, seed: int = 0, dense: float = 0.8, shift: float = 0.0, num_test: int = 100) -> Facts:
    """Return a run of one client: its dense twin and three sparse arms, all of them moved by `shift`."""
    row = MetricRow(0, False, "dense", 1.0, 1.0, 0.5, dense, 10, num_test=num_test)
    rows = [row] + [
        replace(row, arm=arm, density=d, target_density=d, test_accuracy=value + shift)
        for arm, values in (("ticket", TICKET), ("random", RANDOM), ("init_mask", INIT))
        for d, value in values.items()
    ]
    return replace(base, metrics=tuple(rows), tickets=(), header=replace(base.header, seed=seed))


def table(*group: Facts) -> Table:
    return sparsity_table(results_of(group))


def test_one_seed_has_the_standard_error_of_its_test_part(base: Facts) -> None:
    found = table(one(base))  # sqrt(.8 x .2 / 100) is .04, so .76 is the least
    assert found.header[4:] == ("personal ticket, %", "theta_0's own mask, %", "random ticket, %")
    assert found.rows == (("0", "100", "80.0 %", "4.0", "70", "30", "none"),)
    assert "binomial" in found.title and "one seed says nothing of another" in told([one(base)])
    (wider,) = table(one(base, num_test=16)).rows  # .1
    assert wider[3:] == ("10.0", "70", "50", "50")


def test_several_seeds_have_their_own_deviation(base: Facts) -> None:
    """Dense .79 and .81: mean .8, deviation .01414, so .78586; tickets are at their means."""
    found = table(one(base, 0, dense=0.79), one(base, 1, dense=0.81))
    assert found.rows == (("0", "100", "80.0 %", "1.4", "50", "30", "none"),)
    assert "binomial" not in found.title and "over seeds" in told([base, base])
    # The mean over seeds counts: one seed's .9 does not carry another's .62.
    (row,) = table(one(base, 0, dense=0.79, shift=0.1), one(base, 1, dense=0.81, shift=-0.18)).rows
    assert row[4:] == ("none", "none", "none")


def test_a_density_that_one_seed_lacks_does_not_count(base: Facts) -> None:
    first, second = one(base, 0, dense=0.79), one(base, 1, dense=0.81)
    kept = tuple(r for r in second.metrics if (r.arm, r.target_density) != ("ticket", 0.5))
    assert table(first, replace(second, metrics=kept)).rows[0][4] == "30"


def test_less_may_be_better_and_has_no_binomial_error(base: Facts) -> None:
    """A metric without a binomial error has no bound from one seed; of two, the bound lies above the dense mean."""
    loss = Measure("loss", higher_is_better=False, percent=False)

    def lossy(facts: Facts) -> Facts:
        rows = tuple(replace(row, test_loss=1 - (row.test_accuracy or 0)) for row in facts.metrics)
        return replace(facts, metrics=rows, header=replace(facts.header, metrics=[loss]))

    assert table(lossy(one(base))).rows[0][3:] == ("–", "–", "–", "–")
    found = table(lossy(one(base, 0, dense=0.79)), lossy(one(base, 1, dense=0.81)))
    assert found.rows[0][2:] == ("0.2", "0.0141", "50", "30", "none")


def test_it_stands_in_the_report_where_there_is_a_dense_twin(fake: Path, tmp_path: Path) -> None:
    results = read_results(fake)
    found = sparsity_table(results)
    assert len(found.rows) == 20 and {len(row) for row in found.rows} == {len(found.header)}
    bare = [replace(f, metrics=tuple(r for r in f.metrics if r.arm != "dense")) for f in results.group]
    assert not sparsity_table(results_of(bare)).rows
    assert isinstance(results, Results)
    page = write_report(fake).read_text()
    assert (fake / "tables" / "sparsity.csv").exists() and found.title.replace("'", "&#39;") in page
