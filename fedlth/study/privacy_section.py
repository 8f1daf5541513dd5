"""The section `privacy` of a study file: what clients do to what they disclose."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

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
