"""One made-up run for the tests that only read it."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_run import write_run


@pytest.fixture(scope="session")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "fake")


@pytest.fixture(scope="session")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("group")
    for seed in (0, 1, 10):
        write_run(folder / f"seed-{seed}", seed=seed, num_clients=10, rounds=4)
    return folder
