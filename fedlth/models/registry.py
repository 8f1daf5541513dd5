"""The table of models by name, and `build`, which makes a fresh one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn
from torch.nn.parameter import is_lazy

from fedlth.data.factory import accepted, call_factory, is_factory
from fedlth.data.ragged import Shape
from fedlth.errors import StudyError
from fedlth.models.char_lstm import CharLstm
from fedlth.models.conv_k import conv2, conv4
from fedlth.models.hf import hf
from fedlth.models.leaf_cnn import LeafCnn
from fedlth.models.lenet5 import LeNet5
from fedlth.models.mlp import lenet300, mlp
from fedlth.models.resnet9 import ResNet9

MODELS: dict[str, Callable[..., nn.Module]] = {
    "lenet300": lenet300,
    "lenet5": LeNet5,
    "leaf_cnn": LeafCnn,
    "conv2": conv2,
    "conv4": conv4,
    "resnet9": ResNet9,
    "char_lstm": CharLstm,
    "mlp": mlp,
    "hf": hf,
}
SEVERAL = ("hf",)  # of these, those that take a mapping of inputs


def build(name: str, *, num_classes: int, input_shape: Shape, options: Mapping[str, object]) -> nn.Module:
    """Return a fresh module in training mode; torch's default generator decides its initial values.

    name: one of MODELS, or a user's `package.module:callable`, called with num_classes=, input_shape= as far as its
    signature accepts them, and with the options.
    Raises StudyError for an unknown name or option, an unsuited input shape, or what is no usable module.
    """
    if isinstance(input_shape, dict) and name in MODELS and name not in SEVERAL:
        raise StudyError(f"model: {name} has one input, got {', '.join(input_shape)}; give a model of your own")
    shape = input_shape if isinstance(input_shape, dict) else tuple(input_shape)
    given = {"num_classes": num_classes, "input_shape": shape}
    if name in MODELS:
        module: object = MODELS[name](**accepted(MODELS[name], "model", name, given, options))
    elif is_factory(name):
        module = call_factory(name, "model", given, options)
    else:
        raise StudyError(f"model.name: must be one of {', '.join(MODELS)} or package.module:callable, got {name!r}")
    if not isinstance(module, nn.Module):
        raise StudyError(f"model: {name} must return a torch.nn.Module, got {type(module).__name__}")
    lazy = [key for key, tensor in (*module.named_parameters(), *module.named_buffers()) if is_lazy(tensor)]
    if lazy:
        raise StudyError(f"model: {name} must know its shapes when built, got the lazy tensor {lazy[0]}")
    return module.train()
