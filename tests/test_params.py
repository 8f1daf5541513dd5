"""The layout's promises: order, roles, ties, sub-layouts; and that reading copies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fedlth.errors import StudyError
from fedlth.models.layout import Params, layout_of, read, views
from tests.tiny import Small, small_layout
from tests.user_model import Reader


def test_prunable_first_then_params_then_buffers_each_by_name() -> None:
    layout = small_layout()
    assert [e.name for e in layout.floats] == [
        "conv.weight", "head.weight", "conv.bias", "head.bias", "norm.bias", "norm.weight", "norm.running_mean",
        "norm.running_var",
    ]  # fmt: skip
    assert [e.name for e in layout.ints] == ["norm.num_batches_tracked"]
    ends = [e.offset + e.size for e in layout.floats]
    assert [e.offset for e in layout.floats] == [0, *ends[:-1]] and ends[-1] == layout.num_floats
    assert layout.num_prunable == 27 + 432 and layout.num_params == 459 + 3 + 4 + 6
    assert {e.name for e in layout.entries if e.norm} == {e.name for e in layout.entries if "norm" in e.name}


def test_a_sub_layout_knows_where_it_lies() -> None:
    whole = small_layout()
    part = whole.select(lambda e: not e.norm)
    flat = np.arange(whole.num_floats, dtype=np.float32)
    taken = part.part_of(Params(flat, np.zeros(1, np.int64)), whole)
    for name, array in views(taken, part).items():
        np.testing.assert_array_equal(array, views(Params(flat, np.zeros(1, np.int64)), whole)[name])
    assert part.num_prunable == whole.num_prunable and part.num_ints == taken.ints.size == 0
    back = part.put_into(Params(-flat, np.ones(1, np.int64)), whole, taken)
    for e in whole.floats:
        np.testing.assert_array_equal(back.floats[e.slice], (-flat if e.norm else flat)[e.slice])
    assert back.ints.tolist() == [1]


def test_schemas_differ_by_kind_name_shape_and_what_is_prunable() -> None:
    layouts = [
        small_layout(),
        layout_of(Small(5), ("conv.weight", "head.weight")),
        layout_of(Small(), ("head.weight",)),
    ]
    ids = {layout.digest(kind) for layout in layouts for kind in ("values", "mask", "scores")}
    assert len(ids) == 9 and all(len(i) == 8 for i in ids)
    assert small_layout() == small_layout() and hash(small_layout()) == hash(small_layout())


def test_reading_copies_and_a_digest_is_of_the_bits() -> None:
    module = Small()
    layout = small_layout()
    params = read(module, layout)
    digest = params.digest()
    with torch.no_grad():
        module.conv.weight.add_(1)
    assert params.digest() == digest != read(module, layout).digest()
    minus = Params(-np.zeros_like(params.floats), params.ints)
    assert minus.digest() != Params(np.zeros_like(params.floats), params.ints).digest()


def test_masked_is_a_copy_with_positive_zeros() -> None:
    params = Params(np.full(small_layout().num_floats, -2, np.float32), np.zeros(1, np.int64))
    mask = np.arange(459) % 2 == 0
    got = params.masked(mask).floats
    assert (params.floats == -2).all() and not got[:459][~mask].view(np.uint32).any()
    assert (got[:459][mask] == -2).all() and (got[459:] == -2).all()


def test_ties_frozen_parts_and_strange_types() -> None:
    layout = layout_of(Reader(3, 4), ("head.weight",))
    by_name = {e.name: e for e in layout.entries}
    assert by_name["decoder.weight"].aliases == ("embed.weight",) and "embed.weight" not in by_name
    assert not by_name["frozen.weight"].trainable and by_name["head.weight"].trainable
    with pytest.raises(StudyError, match="float32 or an integer buffer, got torch.float64"):
        layout_of(nn.Linear(2, 2).double(), ())
