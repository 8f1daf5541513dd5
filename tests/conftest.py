"""What holds for every test: no file waits for the disk, and no property fails since the machine is busy."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import hypothesis
import pytest

hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")


@pytest.fixture(scope="session", autouse=True)
def unflushed() -> Iterator[None]:
    """Leave what is written to the operating system: a tiny run flushes 30 files, and no test cuts the power.

    Tests of what flushes do put their own function here.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


def pytest_collection_finish() -> None:
    """Have the garbage collector pass over what is imported, a million objects that stay."""
    gc.collect()
    gc.freeze()
