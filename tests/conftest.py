"""What holds for every test: no file waits for the disk, and no property fails since the machine is busy."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import Any, cast

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


@pytest.fixture
def unpainted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose every picture of a page and paint none: painting is the most of a tiny report's time.

    For tests that look at what stands beside the pictures, of reports whose like is painted in other tests.
    """
    import matplotlib
    from matplotlib.figure import Figure

    from fedlth.report import canvas

    def composed(picture: canvas.Picture) -> canvas.Drawn:
        with matplotlib.rc_context(cast(Any, canvas.LIGHT.settings())):
            picture.draw(Figure(figsize=(picture.width, picture.height)), canvas.LIGHT)
        return canvas.Drawn(picture, b"", b"", b"")

    for page in ("report.build", "report.lottery", "bench.leaderboard"):
        monkeypatch.setattr(f"fedlth.{page}.drawn", composed)


def pytest_collection_finish() -> None:
    """Have the garbage collector pass over what is imported, a million objects that stay."""
    gc.collect()
    gc.freeze()
