"""The section `crossovers` of a study file: what `compute: auto` measured where it chose the kernel."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedlth.study.sections import Fraction, Node

Density = Annotated[float, Field(ge=0, le=1)]


class Crossovers(Node):
    """From which densities on the kernel does otherwise, in place of its own constants.

    torch: the form of torch that trains what the kernel does not. torch_above: the share of the dense multiply-adds
    from which on torch is the faster, None for never. narrow_below: the density below which 16 examples go side by
    side. sparse_below: by the name of a layer's weights, the density below which the kept ones are a list.
    """

    torch: Literal["reference", "tuned"]
    torch_above: Fraction | None
    narrow_below: Density
    sparse_below: dict[str, Density]
