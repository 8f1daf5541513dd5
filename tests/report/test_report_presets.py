"""The presets: a published column recomputed, four messages by hand, and what does not apply says so."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_run
import pytest

from fedlth.report.facts import Facts, read_run
from fedlth.report.presets import MIB, PRESETS, Cell, FedDST, FedPM, LotteryFL, Preset, Sizes, lotteryfl_bytes, sizes_of
from fedlth.storage.header import Layer
from fedlth.storage.records import LedgerRow

ROOT = Path(__file__).parents[2]
MASKABLE, HEAD, BIAS = 8, 4, 2


@pytest.mark.parametrize(
    ("weights", "rounds", "clients", "published"),
    [
        (21_750, 400, 5, 165.94), (21_750, 400, 10, 331.88), (21_750, 400, 20, 663.76),
        (61_770, 2000, 5, 2356.34), (61_770, 2000, 10, 4712.68), (61_770, 2000, 20, 9425.35),
    ],
)  # fmt: skip
def test_r1_lotteryfls_published_fedavg_column(weights: int, rounds: int, clients: int, published: float) -> None:
    found = lotteryfl_bytes(weights, rounds=rounds, clients_per_round=clients) / MIB
    assert found == pytest.approx(published, abs=0.01)


def message(round: int, client: int, up: bool, **values: Any) -> LedgerRow:
    ends = (f"client:{client}", "server") if up else ("server", f"client:{client}")
    return fake_run.message(round, *ends, 99, **values)


def run_of(fake: Path, *rows: LedgerRow) -> Facts:
    layers = [
        Layer("a.weight", [2, 4], MASKABLE, True), Layer("head.weight", [2, 2], HEAD, False),
        Layer("a.bias", [2], BIAS, False), Layer("frozen", [9, 9], 81, True, frozen=True),
    ]  # fmt: skip
    facts = read_run(fake)
    return replace(facts, header=replace(facts.header, layers=layers), ledger=rows)


@pytest.fixture
def sparse(fake: Path) -> Facts:
    """Two clients in round 1 from a broadcast; client 1 prunes to 4 of 8, and gets and sends that slice in round 2."""
    ticket: dict[str, Any] = {"density": 0.5, "ticket": "aa"}
    return run_of(
        fake,
        message(1, 1, False, broadcast=True), message(1, 1, True, **ticket), message(1, 1, True, kind="metrics"),
        message(1, 2, False, broadcast=True), message(1, 2, True, status="refused: shape"),
        message(2, 1, False, **ticket), message(2, 1, True, **ticket),
        message(3, 1, False, kind="evaluation", phase="personalise"), message(3, 1, True, kind="none", status="failed"),
    )  # fmt: skip


def test_sizes_are_those_of_the_layers(sparse: Facts) -> None:
    assert sizes_of(sparse) == Sizes(MASKABLE, HEAD, BIAS)


def test_lotteryfl_counts_weights_one_way(sparse: Facts) -> None:
    found = LotteryFL()(sparse)
    assert (found.up_bytes, found.down_bytes) == (4 * (4 + HEAD) * 2, None)
    assert found.total_bytes == found.up_bytes and found.printed.endswith("MiB")


def test_feddst_counts_bits_and_calls_the_first_download_a_seed(sparse: Facts) -> None:
    found, kept = FedDST()(sparse), 32 * (4 + HEAD + BIAS)
    assert found.up_bytes == (2 * kept + 4) / 8, "the mask of round 1 is new and costs density x n bits"
    assert found.down_bytes == kept / 8, "round 1 is a seed; in round 2 the client holds the mask already"


def test_feddst_counts_a_mask_that_the_client_does_not_hold(fake: Path) -> None:
    rows = (message(1, 1, False), message(2, 1, False, density=0.5, ticket="bb"), message(2, 1, True))
    assert FedDST()(run_of(fake, *rows)).down_bytes == (32 * (4 + HEAD + BIAS) + MASKABLE) / 8


def test_cell_counts_a_broadcast_once_and_a_ticket_each(sparse: Facts) -> None:
    dense, kept = 4 * (MASKABLE + HEAD + BIAS), 4 * (4 + HEAD + BIAS)
    assert (Cell()(sparse).up_bytes, Cell()(sparse).down_bytes) == (2 * kept, dense + kept)
    assert Cell(once=False)(sparse).down_bytes == 2 * dense + kept


def test_fedpm_counts_the_entropy_of_bare_masks(fake: Path) -> None:
    rows = (message(1, 1, False, kind="scores"), message(1, 1, True, kind="mask", density=0.25))
    entropy = 2 - 0.75 * math.log2(3)
    found = FedPM()(run_of(fake, *rows))
    assert found.up_bytes == pytest.approx((MASKABLE * entropy + 3) / 8) and found.down_bytes is None


def test_what_does_not_apply_says_so(fake: Path, sparse: Facts) -> None:
    scores = run_of(fake, message(1, 1, False, kind="scores"), message(1, 1, True, kind="mask", density=0.25))
    alone = run_of(fake, message(1, 1, True, kind="metrics", phase="personalise"))
    for preset in (LotteryFL(), FedDST(), Cell()):
        assert preset(scores).total_bytes is None and "no weights" in preset(scores).printed
        assert preset(alone).total_bytes is None and "no federated rounds" in preset(alone).printed
    assert FedPM()(sparse).total_bytes is None
    assert run_of(fake).ledger == () and all(preset(run_of(fake)).total_bytes is None for preset in PRESETS)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.name)
def test_every_preset_is_in_the_protocol(preset: Preset) -> None:
    assert f"| `{preset.name}` |" in (ROOT / "docs" / "protocol.md").read_text()
    assert preset.counts and preset.leaves_out and preset.paper
