"""A user's own model and data run the two steps under every buffer policy, without touching fedlth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from fedlth.engines.inprocess import InProcess
from fedlth.errors import NothingUsable, StudyError
from fedlth.experiment.saved_ticket import load_ticket
from fedlth.federation import session
from fedlth.forecast import forecast
from fedlth.models.layout import read
from fedlth.storage.client_state import ClientState
from fedlth.storage.run_folder import RunFolder
from fedlth.training.evaluation import evaluate
from fedlth.wire import mask as bitmap
from tests import tiny, user_model

POLICIES = ("aggregate", "local_statistics", "local_all")


def own(buffers: str, **sections: Any) -> Any:
    mine = {
        "data": {"name": "tests.user_model:sentences"},
        "model": {"name": "tests.user_model:reader", "options": {"width": 6}, "buffers": buffers},
        "federate": {"rounds": 3, "clients_per_round": 2},
    }
    return tiny.study(**{**mine, **sections})


def beyond(part: str) -> dict[str, Any]:
    """Return sentences whose last tenth, in the training or the test part, has a word that no embedding has."""
    data = user_model.sentences()
    data[f"x_{part}"][-len(data[f"x_{part}"]) // 10 :, 2] = user_model.VOCABULARY
    return data


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ("train", r"train: training fails on the examples of client 3: IndexError: index out of range"),
        ("test", r"model: an evaluation fails on the examples of client 3: IndexError: index out of range"),
    ],
)
def test_what_fails_on_a_clients_examples_alone_is_named_by_check(part: str, says: str) -> None:
    made = own(
        "aggregate",
        data={"name": f"{__name__}:beyond", "options": {"part": part}},
        partition={"name": f"{__name__}:InOrder"},
        clients={"count": 4, "test_samples": 90},
    )
    with pytest.raises(StudyError, match=f"^{says}"):
        forecast(made)


class InOrder:
    """A partition by position, the last client's part the largest."""

    by_key = False

    def __call__(self, labels: Any, keys: Any, num_clients: int, rng: Any) -> list[Any]:
        return np.split(np.arange(len(labels)), np.cumsum([40, 40, 40]))


def fails_where_many(outputs: torch.Tensor, y: torch.Tensor) -> float:
    if len(y) > 20:
        raise KeyError("many")
    return 0.5


def test_a_metric_that_raises_is_named(tmp_path: Path) -> None:
    name = f"{__name__}:fails_where_many"
    made = own("aggregate", metrics=[name], clients={"count": 4, "test_samples": 30})
    with pytest.raises(NothingUsable, match=f"MetricFails: metric {name} fails: KeyError: 'many'"):
        tiny.run(made, tmp_path / "r")


@pytest.mark.parametrize("buffers", POLICIES)
def test_two_steps_and_a_ticket_that_predicts_as_reported(tmp_path: Path, buffers: str) -> None:
    made = own(buffers, personalise={"epochs": 1, "arms": ["global", "dense", "ticket", "random"]})
    folder = tiny.run(made, tmp_path / "r")
    task = tiny.open_task(made.science())
    assert not [f for r in tiny.rows(tmp_path / "r", "rounds") for f in r["failed"]]
    names = {e.name for e in task.layout.prunable}
    assert names == {"head.weight", "lstm.weight_hh_l0", "lstm.weight_ih_l0"}, "not the embedding, not the frozen part"
    tied = next(e for e in task.layout.floats if "embed.weight" in (e.name, *e.aliases))
    assert {tied.name, *tied.aliases} == {"embed.weight", "decoder.weight"}
    rows = [r for r in tiny.rows(tmp_path / "r", "metrics") if r["arm"] == "ticket" and r["target_density"] == 0.2]
    assert len(rows) == 4
    for row in rows:
        model = load_ticket(tmp_path / "r", row["client"])
        part = task.part(row["client"], "test")
        with torch.inference_mode():
            right = int((model(part.tensor).argmax(-1) == part.y).sum())
        assert right / len(part) == row["test_accuracy"]
        named = dict(model.named_parameters())
        assert named["embed.weight"].data_ptr() == named.get("decoder.weight", named["embed.weight"]).data_ptr()
        with safe_open(tmp_path / "r" / "tickets" / f"client-{row['client']:04d}.safetensors", "numpy") as file:
            meta = file.metadata()
            masks = {n: file.get_tensor(f"{n}_mask") for n in names}
        kept = sum(int(np.unpackbits(m).sum()) for m in masks.values())
        assert kept == round(0.2 * task.layout.num_prunable) and float(meta["density"]) == row["density"]
        frozen = read(model, task.layout).floats, task.theta_0.floats
        for entry in task.layout.floats:
            if entry.name.startswith("frozen"):
                np.testing.assert_array_equal(frozen[0][entry.slice], frozen[1][entry.slice])
    assert folder.progress().step == 5


def test_what_each_policy_sends() -> None:
    tasks = {b: tiny.open_task(own(b).science()) for b in POLICIES}
    layout = tasks["aggregate"].layout
    assert tasks["aggregate"].exchange is layout.moving
    frozen = {"frozen.weight", "frozen.bias"}
    assert {e.name for e in layout.entries} - {e.name for e in layout.moving.entries} == frozen
    kept = {b: {e.name for e in layout.moving.entries} - {e.name for e in w.exchange.entries} for b, w in tasks.items()}
    statistics = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert kept == {
        "aggregate": set(), "local_statistics": statistics, "local_all": statistics | {"norm.weight", "norm.bias"},
    }  # fmt: skip


@pytest.mark.parametrize("buffers", ["local_statistics", "local_all"])
def test_what_stays_local_is_the_clients_own(tmp_path: Path, buffers: str) -> None:
    made = own(buffers, federate={"rounds": 3, "clients_per_round": 3}, personalise={"arms": ["global"]})
    folder = tiny.run(made, tmp_path / "r")
    task, versions = tiny.open_task(made.science()), folder.progress().versions
    away = {e.name for e in task.layout.moving.entries} - {e.name for e in task.exchange.entries}
    local = [e for e in task.layout.floats if e.name in away]
    states = {c: ClientState.from_bytes(folder.clients.get(int(c), v)) for c, v in versions.items()}
    seen = [tiny.kept_by(task, s).floats for s in states.values() if "home" in s.vectors]
    assert len(seen) == 3
    sizes = {s.vectors["home"].size for s in states.values() if "home" in s.vectors}
    assert sizes == {sum(e.size for e in local)}, "and nothing else"
    for entry in local:
        values = [v[entry.slice].tobytes() for v in seen]
        assert len(set(values)) == 3, f"{entry.name} differs between clients"
    (row,) = [r for r in tiny.rows(tmp_path / "r", "metrics") if r["client"] == int(next(iter(states)))]
    client = row["client"]
    theta = folder.load_params(folder.progress().theta)
    mine = task.merge(theta, tiny.kept_by(task, states[str(client)]))
    accuracy = evaluate(task.flat_model, mine, task.part(client, "test")).accuracy
    assert accuracy == row["test_accuracy"]


def test_a_prunable_norm_may_stay_local(tmp_path: Path) -> None:
    model = {"name": "tests.user_model:reader", "buffers": "local_all", "prunable": ["*weight*"], "options": {}}
    folder = tiny.run(tiny.study(data={"name": "tests.user_model:sentences"}, model=model), tmp_path / "r")
    task = tiny.task_of(folder.root)
    assert any(e.norm for e in task.layout.prunable) and not any(e.norm for e in task.exchange.entries)
    assert not [f for r in tiny.rows(folder.root, "rounds") for f in r["failed"]]
    assert len(tiny.digests(folder.root)["tickets"]) == 4


def test_masks_are_named_by_their_bits(tmp_path: Path) -> None:
    made = own("aggregate")
    folder = tiny.run(made, tmp_path / "r")
    for row in tiny.rows(tmp_path / "r", "metrics"):
        if row["arm"] == "ticket" and row["target_density"] == 0.2:
            version = folder.progress().versions[str(row["client"])]
            state = ClientState.from_bytes(folder.clients.get(row["client"], version))
            assert bitmap.digest(state.masks["ticket"]) == row["ticket"]


def test_no_ticket_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="no ticket of client 7"):
        load_ticket(tmp_path, 7)


@pytest.mark.parametrize("method", ["two_step", "lotteryfl", "fedselect", "fedpm"])
def test_what_nothing_trains_never_crosses(tmp_path: Path, method: str) -> None:
    """Row 34: a frozen part costs what a constant of the model costs, nothing, and the results are the same."""
    arms = {"epochs": 1, "arms": ["global", "ticket" if method == "two_step" else "own_tuned"]}
    runs = {}
    for name in ("Mixed", "frozen_as_constant"):
        model = {"name": f"tests.user_model:{name}", "options": {}}
        made = tiny.of_method(method, model=model, personalise=arms, wire="raw")
        runs[name] = tiny.run(made, tmp_path / name)
    assert not [f for r in tiny.rows(tmp_path / "Mixed", "rounds") for f in r["failed"]]
    ledgers, metrics = (
        [tiny.rows(tmp_path / name, kind) for name in runs] for kind in ("ledger", "metrics")
    )  # fmt: skip
    assert [r["payload_bytes"] for r in ledgers[0]] == [r["payload_bytes"] for r in ledgers[1]]
    for one, other in zip(*metrics, strict=True):
        # What a constant's product costs to differentiate nobody knows: of a network that trains as a whole it counts.
        for name in ("train_flops", "train_flops_effective"):
            mixed, constant = one.pop(name), other.pop(name)
            # A model that is not trained costs nothing, or the forwards that its norms are measured in.
            assert 0 < mixed < constant or (mixed == constant and one["epochs"] == 0)
        assert one == other
    tasks = [tiny.task_of(tmp_path / name) for name in runs]
    assert tasks[0].layout.num_floats == tasks[1].layout.num_floats + 64 * 16 + 16
    headers = [json.loads((tmp_path / name / "header.json").read_bytes()) for name in runs]
    told = ("num_exchanged", "dense_payload_bytes", "dense_raw_bytes")
    assert [headers[0][key] for key in told] == [headers[1][key] for key in told]
    states = [
        {c: f.clients.get(int(c), v) or b"" for c, v in f.progress().versions.items()} for f in runs.values()
    ]  # fmt: skip
    assert {c: len(s) for c, s in states[0].items()} == {c: len(s) for c, s in states[1].items()}
    for client in range(4):
        one, other = (load_ticket(tmp_path / name, client).eval() for name in runs)
        assert np.array_equal(one.features.weight.detach(), other.features.weight), "theta_0's, in the file too"
        x = tasks[0].part(client, "test").tensor
        assert one(x).equal(other(x))


def test_a_frozen_tensor_is_prunable_under_no_name() -> None:
    model = {"name": "tests.user_model:Mixed", "options": {}, "prunable": ["features.weight"]}
    with pytest.raises(StudyError, match="'features.weight' matches no trainable parameter"):
        tiny.open_task(tiny.study(model=model).science())


def test_a_run_goes_on_with_what_crossed(tmp_path: Path) -> None:
    """Row 34: a checkpoint of another exchange (an older version's, a model frozen since) is refused in one line."""
    made = tiny.study(model={"name": "tests.user_model:Mixed", "options": {"trains": True}})
    engine, folder = InProcess(), RunFolder(tmp_path / "r")
    folder.create(made)
    session._write_header(folder, tiny.experiment(made), engine)
    tiny.opened(folder, engine).run(stop_after=1)
    text = (folder.root / "config.yaml").read_text()
    (folder.root / "config.yaml").write_text(text.replace("trains: true", "trains: false"))
    with pytest.raises(StudyError, match="must continue with the 1173 numbers that crossed, got 133"):
        session.resume(folder.root, engine)
