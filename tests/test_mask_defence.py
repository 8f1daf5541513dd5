"""privacy.mask: a ticket's mask is flipped before it leaves, both ends go on with it, and nothing else changes."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlth import api, forecast
from fedlth.engines.forked import Forked
from fedlth.errors import StudyError
from fedlth.federation.rounds import STEP_2
from fedlth.methods.defence import RandomisedResponse
from fedlth.report.diff import diff
from fedlth.report.facts import read_group
from fedlth.report.privacy import privacy_card
from fedlth.rng import SECRET
from fedlth.storage.client_state import ClientState
from fedlth.storage.header import read_header
from fedlth.storage.run_folder import RunFolder
from fedlth.wire import mask as bitmap
from tests import tiny

FLIP = {"name": "randomised_response", "flip": 0.1}
REFINED: dict[str, Any] = {
    "finder": {"densities": [0.2], "rewind": "init"}, "personalise": {"arms": ["ticket"], "epochs": 1},
    "refine": {"rounds": 2, "clients_per_round": 3}, "workers": 1,
}  # fmt: skip


def defended(**sections: Any) -> Any:
    return tiny.study(**{**REFINED, "privacy": {"mask": FLIP}, **sections})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.run(defended(), tmp_path_factory.mktemp("defence") / "run").root


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.run(tiny.study(**REFINED), tmp_path_factory.mktemp("defence") / "plain").root


def states(run: Path) -> dict[int, ClientState]:
    folder = RunFolder(run)
    versions = folder.progress().versions
    return {int(c): ClientState.from_bytes(folder.clients.get(int(c), v)) for c, v in versions.items()}


def test_the_servers_mask_is_the_clients_and_neither_is_what_was_found(run: Path, plain: Path) -> None:
    folder, found = RunFolder(run), states(run)
    before = {r["client"]: r for r in tiny.rows(plain, "metrics") if r["arm"] == "ticket"}
    assert before == {r["client"]: r for r in tiny.rows(run, "metrics") if r["arm"] == "ticket"}, "step 2 is untouched"
    for client, state in found.items():
        version = folder.progress().mirrors[str(client)]
        mirrored = folder.mirror(client, version, state.masks["shared"].size)
        assert mirrored is not None and np.array_equal(mirrored, state.masks["shared"])
        assert np.array_equal(state.masks["ticket"], mirrored), "the refined ticket lies in the flipped mask"
        assert bitmap.digest(mirrored) != before[client]["ticket"]
        own = states(plain)[client].masks["ticket"]
        assert 0.05 < np.mean(own ^ mirrored) < 0.16, "a tenth of the bits is turned"
        values = state.vectors["ticket"][: np.count_nonzero(mirrored)]
        assert np.count_nonzero(values) > 0.97 * values.size, "what was flipped in is trained"


def test_the_ledger_says_what_crossed(run: Path) -> None:
    found = states(run)
    sent = [r for r in tiny.rows(run, "ledger") if r["kind"] == "mask" and r["sender"] != "server"]
    assert len(sent) == 4
    for row in sent:
        mask = found[int(row["sender"].removeprefix("client:"))].masks["shared"]
        assert row["ticket"] == bitmap.digest(mask) and row["density"] == np.count_nonzero(mask) / mask.size
    ups = [r for r in tiny.rows(run, "ledger") if r["phase"] == "refine" and r["kind"] == "values"]
    up = [row for row in ups if row["sender"] != "server"]
    assert up and all(row["ticket"] in {one["ticket"] for one in sent} for row in up)
    card = " ".join(privacy_card(read_group(run)))
    assert "masks on their own, without values (in personalise)" in card and "epsilon 2.20 for one bit alone" in card
    assert "a client's personal mask is seen by whoever receives it" in card
    assert read_header(run).defence == "RandomisedResponse(flip=0.1), epsilon 2.20 for one bit alone"


def test_engines_and_a_stop_change_nothing(run: Path, tmp_path: Path) -> None:
    engine = Forked(2)
    assert tiny.facts(tiny.run(defended(), tmp_path / "forked", engine=engine).root) == tiny.facts(run)
    folder = RunFolder(tmp_path / "cut")
    folder.create(tiny.experiment(defended()).study)
    tiny.opened(folder).run(stop_after=4)  # after the first wave of step 2
    api.resume(folder.root)
    assert tiny.facts(folder.root) == tiny.facts(run)


@pytest.mark.long
# Ray's own: it forgets its daemons and what it opened for them when it is shut down.
@pytest.mark.filterwarnings("ignore:'click.utils:DeprecationWarning")  # typer's, which Flower imports
@pytest.mark.filterwarnings(r"ignore:subprocess \d+ is still running:ResourceWarning")
@pytest.mark.filterwarnings(r"ignore:unclosed file <_io\.\w+ name='/dev/null':ResourceWarning")
@pytest.mark.parametrize("engine", ["ray", "flower"])
def test_other_engines_change_nothing(engine: str, run: Path, tmp_path: Path) -> None:
    out = api.run(defended(engine=engine, out=str(tmp_path / engine)))
    assert engine == "flower" or tiny.facts(out) == tiny.facts(run)  # Flower's rows have framed bytes
    assert diff(run, out) == []
    gc.collect()


def test_a_devices_secret_makes_other_flips(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET, "known here alone")
    other = states(tiny.run(defended(), tmp_path / "secret").root)
    assert not any(np.array_equal(s.masks["shared"], other[c].masks["shared"]) for c, s in states(run).items())


def test_the_model_that_tickets_grew_from_is_kept(run: Path) -> None:
    folder = RunFolder(run)
    assert folder.has_params(STEP_2)
    assert folder.load_params(STEP_2).digest() != folder.load_params(folder.progress().theta).digest()


def test_an_audit_finds_the_masks_behind_the_flips(run: Path, plain: Path) -> None:
    """The row without defence is what masks would say: those of the same run without it."""
    from fedlth.privacy.measure import measured
    from fedlth.privacy.subject import subject_of

    root = str(run.resolve())
    found = measured(root, 10, "victim", 1)
    size = subject_of(root).task.layout.num_prunable
    assert np.array_equal(
        np.unpackbits(found["mask none"], count=size).astype(bool), states(plain)[1].masks["ticket"]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"refine": {"rounds": 0}}, "no personal mask leaves its client"),
        ({"method": {"name": "fedavg"}, "personalise": {"arms": None}, "refine": {"rounds": 0}}, "no personal mask"),
        ({"method": {"name": "lotteryfl"}, "refine": {"rounds": 0}}, "for method lotteryfl: the masks of its rounds"),
        ({"method": {"name": "fedpm"}, "refine": {"rounds": 0}, "personalise": {"arms": None}}, "for method fedpm"),
        ({"privacy": {"mask": {"name": "randomised_response", "flip": 0.5}}}, r"privacy.mask.flip must be in \(0, 0.5"),
        ({"privacy": {"mask": "nothing"}}, "privacy.mask.name: must be one of randomised_response"),
        ({"clients": {"count": 4, "capacity": [{"clients": [0], "density": 0.5}]}}, "clients carry less than all"),
    ],
)
def test_what_cannot_be_defended_is_refused(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(StudyError, match=words):
        tiny.experiment(defended(**sections))


def test_the_check_says_the_epsilon_and_counts_the_denser_masks() -> None:
    told = forecast.foreseen(defended())
    assert "privacy.mask: RandomisedResponse(flip=0.1), epsilon 2.20 for one bit alone" in told.text
    assert told.up_bytes > forecast.foreseen(tiny.study(**REFINED)).up_bytes


@dataclass(frozen=True)
class Turned:
    """A defence of a user's."""

    def __call__(self, mask: np.ndarray, rng: np.random.Generator, /) -> np.ndarray:
        return ~mask


def test_a_defence_of_your_own(tmp_path: Path, plain: Path) -> None:
    made = defended(privacy={"mask": "tests.test_mask_defence:Turned"})
    found = states(tiny.run(made, tmp_path / "own").root)
    assert np.array_equal(found[0].masks["shared"], ~states(plain)[0].masks["ticket"])


def test_randomised_response_is_what_its_epsilon_says() -> None:
    one = RandomisedResponse(0.25)
    mask = np.arange(40_000) % 5 == 0
    turned = one(mask, np.random.default_rng(0)) ^ mask
    assert abs(turned.mean() - 0.25) < 0.01 and one.epsilon == pytest.approx(np.log(3)) and one.density(0.2) == 0.35
