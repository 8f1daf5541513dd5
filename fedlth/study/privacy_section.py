"""The section `privacy` of a study file: what clients do to what they disclose."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from fedlth.study.sections import Node, Positive, Spec


class Dp(Node):
    """DP-SGD: noise of `noise_multiplier` times the norm that an example's gradient is clipped to; epsilon's delta."""

    noise_multiplier: Positive
    max_grad_norm: Positive = 1.0
    delta: Annotated[float, Field(gt=0, lt=1)]


class Privacy(Node):
    """`mask` changes a personal mask before it leaves its client; `dp` is how all local training is noisy."""

    mask: Spec | None = None
    dp: Dp | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_secure_sums(cls, given: Any) -> Any:
        if isinstance(given, dict) and "secure_aggregation" in given:
            raise ValueError(
                "has no secure_aggregation: of masks that differ a sum shows what one client alone keeps, and Flower's "
                "SecAgg+ is not for the API that runs here; `fedlth audit` says what it would cost"
            )
        return given
