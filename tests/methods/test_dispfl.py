"""DisPFL: personal masks of one density that move, averaged over holders; each option changes what it says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlth.errors import StudyError
from fedlth.experiment.resolve import read
from fedlth.methods.client_update import UPDATE, Keep
from fedlth.methods.dispfl import Moved
from fedlth.methods.evolve import Evolve
from fedlth.methods.gossip import GossipUpdate
from fedlth.storage.client_state import ClientState
from fedlth.training.local_client import LocalClient
from tests import tiny


def study(**more: Any) -> Any:
    method = {"name": "dispfl", **tiny.METHODS["dispfl"], **more.pop("method", {})}
    return tiny.study(method=method, federate={"rounds": 4, "clients_per_round": 3}, **more)


def ran(out: Path, **options: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    tiny.run(study(method=options), out)
    return tiny.digests(out), [r for r in tiny.rows(out, "ledger") if "server" not in (r["sender"], r["receiver"])]


def test_the_density_is_constant_and_masks_are_personal(tmp_path: Path) -> None:
    _, edges = ran(tmp_path / "r", topology="full")
    size = 64 * 12 + 12 * 4
    assert {round(r["density"] * size) for r in edges} == {round(0.4 * size)}
    masks = {(r["round"], r["sender"]): r["ticket"] for r in edges if r["phase"] == "federate"}
    assert len(set(masks.values())) == len(masks), "each client's own, and another after each visit"


def test_one_visit_averages_trains_then_moves_its_mask() -> None:
    made = tiny.experiment(study())
    local = LocalClient(made.task_of(1), 1, 1, "federate")
    state = made.first_state(1)
    moving = GossipUpdate(after=Moved(Evolve(0.5, "random")))
    still = GossipUpdate()
    before = state.masks["active"]
    got, plain = moving(local, {}, state), still(local, {}, state)
    new, trained = got.state.masks["active"], plain.contents[UPDATE].floats
    sent = got.contents[UPDATE]
    assert trained is not None and sent.floats is not None and (sent.mask == new).all()
    assert new.sum() == before.sum() and (new != before).any()
    came = new & ~before
    assert came.any() and not sent.floats[: new.size][came].any(), "what comes back is zero, and counts as held"
    stays = new & before
    np.testing.assert_array_equal(sent.floats[: new.size][stays], trained[: new.size][stays])
    for e in made.layout.prunable:  # in each layer the smaller half leaves at first; some of it may come back
        gone, size = (before & ~new)[e.slice], np.abs(trained[e.slice])
        half = np.sort(size[before[e.slice]])[: -(-int(before[e.slice].sum()) // 2)]
        assert gone.sum() <= half.size and size[gone].max(initial=0) <= half[-1]


def test_without_masks_it_is_dfedavg_bit_for_bit(tmp_path: Path) -> None:
    """At density one there is nothing to move."""
    spec = {"topology": "ring"}
    tiny.run(study(method={"density": 1.0, **spec}, personalise={"arms": ["own", "own_tuned"]}), tmp_path / "dispfl")
    dense = tiny.study(method={"name": "dfedavg", **spec}, federate={"rounds": 4, "clients_per_round": 3},
                       personalise={"arms": ["own", "own_tuned"]})  # fmt: skip
    tiny.run(dense, tmp_path / "dfedavg")
    names = ("metrics.jsonl", "ledger.jsonl", "rounds.jsonl")
    for name in names:
        assert (tmp_path / "dispfl" / name).read_bytes() == (tmp_path / "dfedavg" / name).read_bytes(), name


def test_each_option_changes_what_it_says(tmp_path: Path) -> None:
    theta: dict[str, str] = {}
    for name, options in {
        "plain": {}, "random": {"by": "random"}, "drop": {"drop": 0.2}, "density": {"density": 0.6},
        "same": {"same": True}, "topology": {"topology": "full"},
    }.items():  # fmt: skip
        digests, edges = ran(tmp_path / name, **options)
        theta[name] = digests["theta_g"]
        wanted = round(0.6 * 816) if name == "density" else round(0.4 * 816)
        assert {round(r["density"] * 816) for r in edges} == {wanted}
    assert len(set(theta.values())) == len(theta)


def test_masks_that_do_not_move_stay_the_first_and_may_be_the_same_for_all(tmp_path: Path) -> None:
    for same in (True, False):
        _, edges = ran(tmp_path / str(same), drop=0.0, same=same, topology="full")
        tickets = {r["sender"]: {x["ticket"] for x in edges if x["sender"] == r["sender"]} for r in edges}
        assert {len(of) for of in tickets.values()} == {1}
        assert len(set.union(*tickets.values())) == (1 if same else len(tickets))


def test_its_random_control_has_the_layers_counts(tmp_path: Path) -> None:
    tiny.run(study(personalise={"arms": ["own", "own_random"]}), tmp_path / "r")
    rows = {(r["client"], r["arm"]): r for r in tiny.rows(tmp_path / "r", "metrics")}
    for client in range(4):
        own, control = rows[client, "own"], rows[client, "own_random"]
        assert own["layer_density"] == control["layer_density"] and own["ticket"] != control["ticket"]


def test_own_and_tuned_keep_the_clients_mask_and_the_unseen_have_their_first(tmp_path: Path) -> None:
    made = tiny.experiment(study())
    tiny.run(study(personalise={"arms": ["own", "own_tuned"]}), tmp_path / "r")
    rows = tiny.rows(tmp_path / "r", "metrics")
    for client in range(4):
        own, tuned = (r for r in rows if r["client"] == client)
        assert own["ticket"] == tuned["ticket"] and tuned["epochs"] == 1
    assert [r["unseen"] for r in rows].count(True) == 2
    assert (made.first_state(0).masks["active"] == made.method.first_mask(made.task, 0)).all()


def test_a_personal_head_stays_home(tmp_path: Path) -> None:
    made = study(model={"personal": ["3.*"]}, wire="raw")
    tiny.run(made, tmp_path / "r")
    layout = tiny.experiment(made).layout
    edges = [r for r in tiny.rows(tmp_path / "r", "ledger") if "server" not in (r["sender"], r["receiver"])]
    assert edges and {e.name.split(".")[0] for e in layout.entries} == {"1"}
    assert max(r["payload_bytes"] for r in edges) < 4 * layout.num_floats


def test_options_are_checked() -> None:
    for options, said in (
        ({"density": 0.0}, "method.density"), ({"drop": 1.0}, "method.drop"), ({"by": "luck"}, "method.by"),
    ):  # fmt: skip
        with pytest.raises(StudyError, match=said):
            read(study(method=options))


def test_the_parts_are_frozen_values() -> None:
    one = GossipUpdate(after=Moved(Evolve(0.3)))
    assert one == replace(one) and hash(one) == hash(replace(one)) and one != GossipUpdate(after=Keep())
    assert ClientState().masks == {}
