"""Which tensors are prunable, by default and by pattern."""

from __future__ import annotations

import pytest
from torch import nn

from fedlth.errors import StudyError
from fedlth.models.prunable import prunable_names
from fedlth.models.registry import build


class Mixed(nn.Module):
    """One of each: convolution, norm, embedding, recurrent, attention, tied and frozen parts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.norm = nn.BatchNorm2d(2)
        self.embedding = nn.Embedding(5, 4)
        self.gru = nn.GRU(4, 4, bidirectional=True)
        self.cell = nn.LSTMCell(4, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.cross = nn.MultiheadAttention(4, 2, kdim=3, vdim=3)
        self.zeta = nn.Linear(4, 4)
        self.alpha = nn.Linear(4, 4)
        self.alpha.weight = self.zeta.weight
        self.decoder = nn.Linear(4, 5)
        self.decoder.weight = self.embedding.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def test_frozen_weights_by_their_own_pattern() -> None:
    assert prunable_names(Mixed(), ["@frozen"]) == ("frozen.weight",)
    assert prunable_names(Mixed(), ["conv*", "@frozen"]) == ("conv.bias", "conv.weight", "frozen.weight")
    module = build("mlp", num_classes=4, input_shape=(1, 8, 8), options={"hidden": [5]})
    with pytest.raises(StudyError, match="model.prunable: @frozen .* nothing trains"):
        prunable_names(module, ["@frozen"])


def test_the_default() -> None:
    assert prunable_names(Mixed(), None) == (
        "alpha.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "cell.weight_hh",
        "cell.weight_ih",
        "conv.weight",
        "cross.k_proj_weight",
        "cross.out_proj.weight",
        "cross.q_proj_weight",
        "cross.v_proj_weight",
        "gru.weight_hh_l0",
        "gru.weight_hh_l0_reverse",
        "gru.weight_ih_l0",
        "gru.weight_ih_l0_reverse",
    )


def test_patterns_replace_the_default() -> None:
    assert prunable_names(Mixed(), ("conv.*",)) == ("conv.bias", "conv.weight")
    assert prunable_names(Mixed(), ("zeta.weight", "alpha.weight", "conv.weight")) == ("alpha.weight", "conv.weight")
    assert prunable_names(Mixed(), ("decoder.weight",)) == ("decoder.weight",)
    assert "frozen.weight" not in prunable_names(Mixed(), ("*",))


@pytest.mark.parametrize("pattern", ["dense.*", "Conv.weight", "frozen.*"])
def test_a_pattern_without_effect_is_an_error(pattern: str) -> None:
    with pytest.raises(
        StudyError, match=r"model.prunable: .* matches no trainable parameter of: alpha.bias, alpha.weight"
    ):
        prunable_names(Mixed(), ("conv.*", pattern))


@pytest.mark.parametrize("module", [nn.Flatten(), nn.BatchNorm1d(3), nn.Linear(2, 2).requires_grad_(False)])
def test_nothing_to_prune_is_an_error(module: nn.Module) -> None:
    with pytest.raises(StudyError, match="model.prunable: the model must have at least one prunable tensor"):
        prunable_names(module, None)
    with pytest.raises(StudyError, match="model.prunable: the model must have at least one"):
        prunable_names(module, ())


def test_the_lstm() -> None:
    module = build("char_lstm", num_classes=5, input_shape=(3,), options={"hidden": 4, "layers": 1})
    assert prunable_names(module, None) == ("head.weight", "lstm.weight_hh_l0", "lstm.weight_ih_l0")
