"""Running statistics of norms in what is never trained: those of a client's own data under the mask, not 0 and 1."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fedlth
from fedlth.engines.forked import Forked
from fedlth.engines.inprocess import InProcess
from fedlth.errors import StudyError
from fedlth.experiment import device_ticket
from fedlth.experiment.experiment import Experiment
from fedlth.experiment.resolve import resolve
from fedlth.experiment.saved_ticket import kept_ticket, load_ticket
from fedlth.federation import session
from fedlth.lab import arms
from fedlth.lab.search import rounds
from fedlth.methods.client_update import THETA_G
from fedlth.methods.space import Frozen
from fedlth.models.layout import Params, layout_of, read
from fedlth.personalization.arms import ARMS
from fedlth.personalization.personalise import row_of
from fedlth.storage.client_state import ClientState
from fedlth.storage.run_folder import RunFolder
from fedlth.tickets.rewind import changed
from fedlth.training import statistics
from fedlth.training.flat_model import FlatModel
from fedlth.training.local_client import LocalClient
from fedlth.wire.payload import Content
from tests import tiny
from tests.lab import tiny_lottery
from tests.test_methods import step2_of

HERE = "tests.methods.test_untrained_norms"
DEEP: dict[str, Any] = {"name": f"{HERE}:deep", "options": {}}
STRONG = {"schedule": {"name": "rescore", "steps": 1}, "rewind": "frozen", "score": "edge_popup"}
METHODS = ("fedpm", "fedmask", "deltamask")


def deep(num_classes: int) -> nn.Module:
    """Convolutions with a BatchNorm behind each: what one adds to the scale of the signal, the next ones see."""
    layers: list[nn.Module] = []
    for channels in (1, 6, 6, 6):
        layers += [nn.Conv2d(channels, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, num_classes))


class OwnNorm(nn.Module):
    """A norm of the user's own, with running statistics."""

    running_mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x - self.running_mean


def own_norm(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), OwnNorm(), nn.ReLU(), nn.Linear(8, num_classes))


def study(name: str, **sections: Any) -> Any:
    sections = {"train": {"epochs": 2}, "evaluate": {"every": 2}, "tickets": "compact", **sections}
    return tiny.study(
        method={"name": name, "score_lr": 50.0}, model=DEEP, federate={"rounds": 4, "clients_per_round": 3},
        **sections,
    )  # fmt: skip


def at_work(experiment: Experiment, client: int, stage: str = "personalise", round: int = 0) -> LocalClient:
    return LocalClient(experiment.task_of(client), client, round, stage)


def states(folder: RunFolder) -> dict[int, ClientState]:
    versions = folder.progress().versions
    return {int(c): ClientState.from_bytes(folder.clients.get(int(c), v)) for c, v in versions.items()}


@pytest.fixture(scope="module", params=METHODS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    arms = ["global", "own", "own_tuned", "frozen_random"]
    return tiny.run(study(request.param, personalise={"arms": arms}), tmp_path_factory.mktemp("norms") / "r")


def test_own_models_are_those_of_the_mask_after_a_pass_over_the_clients_data(run: RunFolder) -> None:
    experiment, state = Experiment.of(run.study()), tiny.opened(run).state
    theta, found = state.theta, {(r["client"], r["arm"]): r for r in tiny.rows(run.root, "metrics")}
    own: Any = experiment.method.own
    content, improved = Content(np.ones(theta.floats.size, bool), theta.floats, theta.ints), []
    for client, kept in states(run).items():
        task, row = experiment.task_of(client), found[client, "own"]
        held = own.own(at_work(experiment, client), {THETA_G: content}, kept)
        raw = own.frozen(task).masked(held.mask)
        wanted, test = at_work(experiment, client).normalised(raw, held.mask), task.part(client, "test")
        assert held.params.digest() == wanted.digest() != raw.digest()
        local = at_work(experiment, client)
        assert row["test_loss"] == local.evaluate(wanted, test).loss
        improved.append(local.evaluate(raw, test).loss - row["test_loss"])
        flops = task.model.flops[""] * local.num_train
        for arm in ("global", "own", "frozen_random"):
            one = found[client, arm]
            assert (one["epochs"], one["search_epochs"]) == (0, 1) and one["train_flops"] == pytest.approx(flops)
        assert found[client, "own_tuned"]["epochs"] == 2
        if (shared := found[client, "global"])["ticket"] == row["ticket"]:
            assert shared["test_loss"] == row["test_loss"]
    assert np.mean(improved) > 0, "the statistics of theta_0 are worse"


def test_a_run_its_kept_tickets_and_what_is_loaded_again_agree(run: RunFolder, tmp_path: Path) -> None:
    experiment, rows = Experiment.of(run.study()), tiny.rows(run.root, "metrics")
    found = {r["client"]: r for r in rows if r["arm"] == "own_tuned"}
    for client, state in states(run).items():
        task = experiment.task_of(client)
        params, mask = kept_ticket(task, state)
        module = load_ticket(run.root, client)
        again = read(module, layout_of(module, [e.name for e in task.layout.prunable]))
        assert again.digest() == params.digest(), "statistics are kept"
        file = device_ticket.keep(experiment, client, "personalise", state, tmp_path, name="norms")
        assert file is not None
        device = load_ticket(file)
        told = fedlth.export_ticket(run.root, client, to="compact", out=tmp_path / f"{client}")
        (written,) = told.folder.glob("*.safetensors")
        exported = load_ticket(written)
        local = at_work(experiment, client)
        test = task.part(client, "test")
        assert local.evaluate(params, test).loss == found[client]["test_loss"]
        assert mask.sum() == round(found[client]["density"] * mask.size)
        with torch.no_grad():
            x = test.tensor
            assert torch.equal(device(x), module(x)) and torch.equal(exported(x), module(x))


def test_visits_and_the_curve_tell_of_the_same_model(run: RunFolder) -> None:
    experiment = Experiment.of(run.study())
    (phase,), start = experiment.federated_phases, experiment.initial()
    content = Content(np.ones(start.floats.size, bool), start.floats, start.ints)
    local, twin = (at_work(experiment, 0, "federate", 1) for _ in range(2))
    update = phase.update(local, {THETA_G: content}, ClientState())
    mask = start.floats > 0
    own: Any = experiment.method.own
    wanted = twin.normalised(own.frozen(twin.task).masked(mask), mask)
    assert update.metrics["val_accuracy"] == twin.visit_scores(wanted)["val_accuracy"]
    assert [float(cost.epochs) for cost in local.log] == [1, 2] and local.log[0] == replace(
        twin.log[0], cpu_s=local.log[0].cpu_s
    )
    last = [r for r in tiny.rows(run.root, "curve") if r["arm"] == "global"][-1]
    row = next(r for r in tiny.rows(run.root, "metrics") if r["arm"] == "global" and r["client"] == last["client"])
    assert last["density"] == row["density"] and last["test_loss"] == pytest.approx(row["test_loss"], rel=0.2)


@pytest.mark.parametrize("name", ["fedpm", "fedmask"])
def test_other_engines_and_a_resumed_run_have_the_same_statistics(name: str, tmp_path: Path) -> None:
    made = study(name)
    tiny.run(made, tmp_path / "one")
    tiny.run(made, tmp_path / "lists", engine=tiny.Lists())
    assert tiny.facts(tmp_path / "lists") == tiny.facts(tmp_path / "one")
    if sys.platform == "linux":
        tiny.run(made, tmp_path / "forked", engine=Forked(2))
        assert tiny.facts(tmp_path / "forked") == tiny.facts(tmp_path / "one")
    folder = RunFolder(tmp_path / "stopped")
    folder.create(resolve(made)[0].study)
    tiny.opened(folder).run(stop_after=3)
    session.resume(folder.root, InProcess())
    assert tiny.facts(tmp_path / "stopped") == tiny.facts(tmp_path / "one")


# Tickets that the finder leaves untrained


def test_a_strong_ticket_has_the_statistics_of_its_own_mask() -> None:
    step = step2_of(tiny.study(model=DEEP, finder={**STRONG, "densities": [0.6, 0.4]}))
    for one in ARMS["ticket"](step):
        rewind, theta_0 = step.finder.rewind, step.anchor("theta_0")
        raw = changed(rewind, theta_0, one.mask, step.local.task.layout, step.local.rng("rewind")).masked(one.mask)
        twin = LocalClient(step.local.task, 0, 0, "personalise")
        wanted = twin.normalised(raw, one.mask)
        assert one.params.digest() == wanted.digest() != raw.digest()
        assert (one.epochs, one.search_epochs) == (0, 3 + 1)
        row = row_of(step.local, one)
        assert row.test_loss == twin.evaluate(wanted, twin.task.part(0, "test")).loss


def test_a_kept_strong_ticket_agrees_with_its_row(tmp_path: Path) -> None:
    made = tiny.study(
        model=DEEP, finder={**STRONG, "densities": [0.5]}, personalise={"arms": ["ticket"]}, tickets="compact"
    )
    folder = tiny.run(made, tmp_path / "r")
    experiment = Experiment.of(folder.study())
    for row in tiny.rows(folder.root, "metrics"):
        local, module = at_work(experiment, row["client"]), load_ticket(folder.root, row["client"])
        params = read(module, layout_of(module, [e.name for e in local.task.layout.prunable]))
        assert params.floats[local.task.layout.num_params :].std() > 0
        assert local.evaluate(params, local.task.part(row["client"], "test")).loss == row["test_loss"]


def test_the_laboratorys_strong_tickets_and_untrained_arms_likewise() -> None:
    arm = {"of": "imp", "rounds": [1], "start": {"name": "frozen", "weights": "init"}}
    searches = {"imp": {"rounds": 1}, "strong": {**STRONG, "densities": [0.5]}}
    bench = tiny_lottery.bench(model=DEEP, searches=searches, arms={"arm": arm})
    (strong,) = (one for one in rounds(bench, "strong") if one.number)
    mask, run = arms.controlled(bench, "arm", list(rounds(bench, "imp"))[1])
    assert strong.run.final.digest() == strong.start.digest() == bench.normalised(strong.start).digest()
    raw = bench.theta_0.masked(mask)
    assert run.final.digest() == bench.normalised(raw).digest() != raw.digest()
    assert run.test_final == bench.accuracy(run.final)


# Without such norms nothing happens; what cannot be done is refused


def test_a_net_without_running_statistics_stays_as_it_is() -> None:
    experiment = tiny.experiment(tiny.of_method("fedpm"))
    local = at_work(experiment, 0)
    mask = np.arange(local.full.size) % 2 == 0
    held = Frozen().under(local, mask)
    assert held.params.digest() == Frozen()(local.task).masked(mask).digest() and not local.log


@pytest.mark.parametrize(
    ("sections", "what"),
    [
        ({"method": {"name": "fedpm"}}, "method fedpm"),
        ({"finder": {**STRONG, "densities": [0.5]}, "personalise": {"arms": ["ticket"]}}, "finder.rewind"),
    ],
)
def test_a_norm_that_is_not_torchs_is_refused_with_its_name(sections: dict[str, Any], what: str) -> None:
    made = tiny.study(model={"name": f"{HERE}:own_norm", "options": {}}, **sections)
    with pytest.raises(StudyError, match=rf"model: 2 \(OwnNorm\) has running .* {what} never trains.* GroupNorm"):
        resolve(made)
    resolve(tiny.study(model={"name": f"{HERE}:own_norm", "options": {}}, personalise={"arms": ["global"]}))


def test_instance_norm_has_the_plain_mean_over_the_batches() -> None:
    module = nn.Sequential(nn.InstanceNorm2d(1, track_running_stats=True), nn.Flatten(), nn.Linear(64, 4))
    local = at_work(tiny.experiment(tiny.study()), 0)
    layout = layout_of(module, ("2.weight",))
    batches = [np.arange(4), np.arange(4, 8), np.arange(8, 12)]
    start = read(module, layout)
    found: Params = statistics.normalised(FlatModel(module, layout, "cpu"), start, local.train_part, batches)
    (mean,) = (e for e in layout.floats if e.name.endswith("running_mean"))
    assert found.floats[mean.slice] == pytest.approx(float(local.train_part.tensor[:12].mean()), abs=1e-5)
    assert module[0].momentum == 0.1
