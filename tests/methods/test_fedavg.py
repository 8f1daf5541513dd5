"""FedAvg of one client that has all data is plain SGD, in plain torch, to the bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.methods.plain import batches_of, flat, load, network, ran, sgd, theta_of


def test_one_client_with_all_data_is_plain_sgd(tmp_path: Path) -> None:
    alone = {"clients": {"count": 1, "unseen": 0.0}, "federate": {"rounds": 3, "clients_per_round": 1}}
    experiment, folder = ran({"name": "fedavg"}, tmp_path / "r", train={"epochs": 2}, **alone)
    net = load(network(), experiment.task.theta_0, experiment.task)
    for round in (1, 2, 3):
        sgd(net, batches_of(experiment.task, 0, round, 2), 0.1)
    np.testing.assert_array_equal(theta_of(folder).floats, flat(net, experiment.task))
