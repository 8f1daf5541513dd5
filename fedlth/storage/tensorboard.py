"""A run's rounds as TensorBoard events, for those who watch there; an extra."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from fedlth.errors import StudyError
from fedlth.storage.records import RoundRow, read_header, read_log


def require() -> None:
    """Raise StudyError where TensorBoard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise StudyError("tensorboard: must be false, or install the extra: pip install 'fedlth[tensorboard]'")


def write(run: Path) -> None:
    """Write one scalar a round and direction into RUN/tensorboard, x being the number of commits."""
    from torch.utils.tensorboard import SummaryWriter

    for old in (run / "tensorboard").glob("events.*"):  # a resume that visited lost clients again writes all anew
        old.unlink()
    metric = read_header(run).metrics[0].name
    with SummaryWriter(str(run / "tensorboard")) as writer:
        for step, row in enumerate(read_log(run, RoundRow)[0], 1):
            for name in ("val_accuracy", "val_metric", "up_bytes", "down_bytes"):
                if (value := getattr(row, name)) is not None:
                    told = f"val_{metric}" if name == "val_metric" else name
                    writer.add_scalar(f"{row.phase}/{told}", value, step)
