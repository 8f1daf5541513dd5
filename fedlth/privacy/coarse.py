"""A granularity for masks that say little: whole input channels, and whole rows of tensors with hardly any."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fedlth.errors import StudyError
from fedlth.models.layout import Entry, Layout
from fedlth.tickets.finder import Finder
from fedlth.tickets.granularity import Groups, HeadsAndChannels, inputs_of, numbered, outputs_of
from fedlth.tickets.scope import Layerwise

FEW = 4  # input channels: of fewer none could be left out at the usual densities


@dataclass(frozen=True)
class ChannelsOrRows:
    """Input channels, which belong to no class even in the output layer; rows of a tensor with fewer than 4 of them."""

    def groups(self, layout: Layout, /) -> Groups:
        def number(e: Entry) -> np.ndarray:
            inputs = inputs_of(e)
            return inputs if len(e.shape) > 1 and inputs.max() >= FEW - 1 else outputs_of(e)

        return numbered(layout, number)


def coarse(finder: Finder, layout: Layout) -> Finder:
    """Return the finder with coarse masks: heads and channels of a transformer, else channels or rows.

    A scope that counts single weights gives way to the layerwise one.
    """
    scope = Layerwise() if getattr(finder.scope, "elements", False) else finder.scope
    whole = replace(finder, granularity=HeadsAndChannels(), scope=scope)
    try:
        whole.granularity.groups(layout)
    except StudyError:
        return replace(whole, granularity=ChannelsOrRows())
    return whole
