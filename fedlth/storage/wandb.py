"""A run in Weights & Biases, online or with WANDB_MODE=offline in RUN/wandb."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlth.errors import require

STARTS_S, ENDS_S = 30, 60


@dataclass(frozen=True)
class WandB:
    """Weights & Biases; neither code, git, packages nor the machine are told, only the run's numbers and config."""

    project: str = "fedlth"
    entity: str | None = None

    def require(self) -> None:
        require("trackers: wandb", "wandb", extra="wandb")

    def open(self, run: Path, name: str, config: Mapping[str, Any], id: str, /) -> WandBRun:
        import wandb

        settings = wandb.Settings(
            silent=True, quiet=True, console="off", show_emoji=False, symlink=False, init_timeout=STARTS_S,
            finish_timeout=ENDS_S, disable_git=True, disable_code=True, save_code=False, disable_job_creation=True,
            x_disable_meta=True, x_disable_stats=True, x_disable_machine_info=True, x_save_requirements=False,
            host="", program="", username="",
        )  # fmt: skip
        opened = wandb.init(
            project=self.project, entity=self.entity, name=name, id=id or None, resume="allow",
            reinit="create_new", dir=run, config=dict(config), settings=settings,
        )  # fmt: skip
        return WandBRun(opened, opened.id)


@dataclass
class WandBRun:
    """An open run. A commit that is told twice, by a kill between two files, has the same step and counts once."""

    run: Any
    id: str
    given: int | None = None

    def log(self, commit: int, scalars: Mapping[str, float], /) -> None:
        self.run.log(dict(scalars), step=commit)

    def end(self, scalars: Mapping[str, float], texts: Mapping[str, str], /) -> None:
        self.run.summary.update({**scalars, **texts})
        self.run.finish()

    def stop(self) -> None:
        self.run.finish(exit_code=1)
