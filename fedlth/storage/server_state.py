"""What the server knows between rounds: the global model, and what an aggregation rule remembers beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fedlth.models.layout import Params


@dataclass(frozen=True)
class ServerState:
    """The global state `theta`, and a rule's own `memory` by name (a momentum, say), checkpointed with it.

    `mask` (num_prunable of the exchanged part,) bool is everyone's, where a rule has found one: a broadcast then holds
    nothing else; a rule that gives none leaves it as it was. Treat as immutable. The memory is that of the rule that
    joined last; a rule without any leaves it empty.
    """

    theta: Params
    memory: Mapping[str, np.ndarray] = field(default_factory=dict)
    mask: np.ndarray | None = None
