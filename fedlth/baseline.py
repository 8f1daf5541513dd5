"""What dense training would have sent, measured in the same run: so that sparsity gets no credit for the codec."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedlth import server
from fedlth.methods.local import Local
from fedlth.params import Params
from fedlth.uplink import Uplink
from fedlth.wire import payload
from fedlth.wire.codec import CODECS
from fedlth.wire.payload import Content
from fedlth.world import World

CLIENTS = 3


@dataclass(frozen=True)
class Dense:
    """Payload bytes of a dense model through the study's codec: down as broadcast, up as one client's update."""

    down_bytes: int
    up_bytes: int


def dense(world: World, theta: Params, *, train: bool) -> Dense:
    """Train a few seen clients densely for one visit from `theta` (exchange layout); return what that would send.

    Up is the mean of CLIENTS updates, rounded; their training changes nothing in the run. Without `train` it is 0:
    not measured.
    """
    codec, layout = CODECS[world.study.wire], world.exchange
    if not train:
        return Dense(len(server.broadcast("values", "", theta, layout, codec).payload), 0)
    seen = [c for c in range(world.study.clients.count) if c not in world.splits.unseen]
    clients = server.sample(world.study.seed, "baseline", 0, clients=seen, count=min(CLIENTS, len(seen)))
    down = server.broadcast("values", "", theta, layout, codec)
    held = payload.decode(down.payload, "values", layout, codec=codec)
    up = Uplink(codec, None, held.reference if codec.refers else None)
    sizes = []
    for client in clients:
        local = Local(world, client, 0, "baseline")
        end = world.shared_part(local.train(world.merge(theta, world.theta_0), plan=local.plan).params)
        sizes.append(len(up.encode("values", layout, Content(held.mask, end.floats, end.ints))))
    return Dense(len(down.payload), round(float(np.mean(sizes))))
