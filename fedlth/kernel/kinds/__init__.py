"""The table of the layers without a matrix of weights: a new kind is a file here and its name in this table."""

from __future__ import annotations

from fedlth.kernel.kind import Kind
from fedlth.kernel.kinds.adaptive_average_pool import ADAPTIVE_AVERAGE_POOL
from fedlth.kernel.kinds.addition import ADD
from fedlth.kernel.kinds.average_pool import AVERAGE_POOL
from fedlth.kernel.kinds.global_max import GLOBAL_MAX
from fedlth.kernel.kinds.group_norm import GROUP_NORM
from fedlth.kernel.kinds.leaky_relu import LEAKY_RELU
from fedlth.kernel.kinds.max_pool import MAX_POOL
from fedlth.kernel.kinds.relu import COPY
from fedlth.kernel.kinds.silu import SILU
from fedlth.kernel.kinds.tanh import TANH

ALL = (
    MAX_POOL,
    AVERAGE_POOL,
    GLOBAL_MAX,
    GROUP_NORM,
    ADD,
    COPY,
    LEAKY_RELU,
    SILU,
    TANH,
    ADAPTIVE_AVERAGE_POOL,
)
KINDS: dict[int, Kind] = {kind.number: kind for kind in ALL}
