"""Pre-trained transformers of the library `transformers`, or small random ones of the same families (extra: text).

What is pruned and what is not as in Chen et al., The Lottery Ticket Hypothesis for Pre-trained BERT Networks, NeurIPS
2020, arXiv 2007.12223: the linear weights of the encoder; embeddings, norms, pooler and head stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import nn

from fedlth.data.factory import told
from fedlth.data.pretrained import EXTRA, config_in, folder_of
from fedlth.data.ragged import Shape
from fedlth.errors import StudyError, require, wrong
from fedlth.models.transformer import Transformer
from fedlth.models.transformer_parts import EMBEDDINGS, choose

PLACE = "model.options"
POOLINGS = ("mean", "first", "last", "own")
AUTO = {"classification": "AutoModelForSequenceClassification", "masked_lm": "AutoModelForMaskedLM"}
AUTO["regression"] = AUTO["classification"]
INPUTS = {"input_ids", "attention_mask", "token_type_ids"}


def hf(
    num_classes: int,
    input_shape: Shape,
    *,
    path: str | None = None,
    package: str | None = None,
    hub: str | None = None,
    config: Mapping[str, Any] | None = None,
    task: str = "classification",
    pooling: str | None = None,
    init: str = "pretrained",
    trains: str | Mapping[str, Any] = "all",
    frozen: Sequence[str] = (EMBEDDINGS,),
) -> nn.Module:
    """A transformer with its pre-trained weights: BERT, RoBERTa, DistilBERT, GPT-2 and others of `transformers`.

    path, package, hub: a folder, an installed package that holds one, an id in the Hugging Face cache; nothing is
    downloaded. config: in their place, model_type and its settings, for random weights of a small model.
    task: classification, regression (num_classes outputs) or masked_lm (num_classes tokens; the
    embedding may have room for more).
    pooling: what the linear `head` sees of the last layer: the mean over tokens (the default of encoders), the first
    token, the last one; `own` is the family's own head, as AutoModelForSequenceClassification builds it (the default
    of decoders). init: `random` draws all weights anew (model.reinit_options of a pre-trained model).
    trains: all; head; bitfit (biases and head; Ben Zaken et al., ACL 2022, arXiv 2106.10199); {lora: {rank, alpha,
    targets, dropout}} (adapters and head; Hu et al., ICLR 2022, arXiv 2106.09685, by peft). frozen: of `all`,
    `embeddings` and globs of names that nothing trains.
    Tensors have the names of `transformers`; Raises StudyError naming the option.
    """
    require("model: hf", "transformers", extra=EXTRA)
    if task not in AUTO:
        raise wrong(f"{PLACE}.task", "classification, regression or masked_lm", task)
    if init not in ("pretrained", "random"):
        raise wrong(f"{PLACE}.init", "pretrained or random", init)
    if not isinstance(input_shape, dict) or not {"input_ids", "attention_mask"} <= input_shape.keys() <= INPUTS:
        got = ", ".join(input_shape) if isinstance(input_shape, dict) else "one tensor"
        raise StudyError(
            f"model: hf must have the inputs input_ids and attention_mask, and at most token_type_ids, got {got}"
        )
    with torch.random.fork_rng(devices=[]):  # importing must not draw from the stream of theta_0
        library: Any = import_module("transformers")
    with _quiet(library):
        settings, folder = _settings(library, {"path": path, "package": package, "hub": hub}, config)
        decoder = _decodes(library, settings.model_type)
        pooling = pooling or ("own" if decoder else "mean")
        if pooling not in POOLINGS:
            raise wrong(f"{PLACE}.pooling", f"one of {', '.join(POOLINGS)}", pooling)
        if task == "masked_lm" and decoder:
            raise wrong(f"{PLACE}.task", f"another than masked_lm for the decoder {settings.model_type}", task)
        if task == "masked_lm" and num_classes > settings.vocab_size:
            raise StudyError(
                f"model: hf with task masked_lm has {settings.vocab_size} outputs, its vocabulary, and the data have "
                f"{num_classes} classes; data.options.label: null gives them those of their tokenizer"
            )
        auto = AUTO[task] if task == "masked_lm" or pooling == "own" else "AutoModel"
        if task != "masked_lm":
            settings.num_labels = num_classes
            settings.problem_type = "regression" if task == "regression" else "single_label_classification"
        net = _net(getattr(library, auto), settings, None if init == "random" else folder)
        source = None if folder is None else folder.resolve()
        headed = auto == "AutoModel"
        module = Transformer(net, num_classes, task, pooling, decoder, headed=headed, source=source)
        choose(module, module.base, trains, frozen, pools=pooling == "own" and task != "masked_lm")
    _check_length(module, input_shape["input_ids"])
    return module


@contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """Keep the library's progress bars and reports off a run's log; what is missing in a folder is our own error."""
    logs = library.utils.logging
    level, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(level)
        if bars:
            logs.enable_progress_bar()


def _settings(library: Any, where: dict[str, str | None], config: Mapping[str, Any] | None) -> tuple[Any, Any]:
    """Return the configuration, and the folder that has the weights, None where they are random."""
    given = {name: value for name, value in where.items() if value is not None}
    if config is None:
        folder = folder_of(PLACE, **given)
        found = config_in(PLACE, folder)
    elif given:
        raise wrong(f"{PLACE}.config", f"left out with {', '.join(given)}", dict(config))
    else:
        folder, found = None, dict(config)
    kind = found.get("model_type")
    if kind not in library.models.auto.configuration_auto.CONFIG_MAPPING_NAMES:
        raise wrong(f"{PLACE}.config.model_type" if folder is None else str(folder), "a family of transformers", kind)
    try:
        if folder is None:
            return library.AutoConfig.for_model(kind, **{k: v for k, v in found.items() if k != "model_type"}), None
        return library.AutoConfig.from_pretrained(folder, local_files_only=True), folder
    except Exception as error:  # whatever the library finds wrong with a configuration
        raise StudyError(f"{PLACE}: no configuration of {kind} from {found}: {told(error)}") from error


def _decodes(library: Any, kind: str) -> bool:
    """Say whether a family predicts the next token: one that fills in masked tokens is an encoder."""
    return kind not in library.models.auto.modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES


def _net(auto: Any, settings: Any, folder: Any) -> nn.Module:
    """Build a network with a folder's weights, or random ones; a head that the folder does not have is drawn."""
    try:
        if folder is None:
            made: nn.Module = auto.from_config(settings)
            return made
        net, told_of = auto.from_pretrained(
            folder, config=settings, dtype=torch.float32, local_files_only=True, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    except Exception as error:  # the library's own, and the file system's
        raise StudyError(f"{PLACE}: no {settings.model_type} from {folder or 'config'}: {told(error)}") from error
    inside = f"{net.base_model_prefix}." if auto.__name__ != "AutoModel" else ""
    lacks = sorted(
        {name for name in (*told_of["missing_keys"], *(key[0] for key in told_of["mismatched_keys"]))
         if name.startswith(inside) and not name.removeprefix(inside).startswith("pooler.")}
    )  # fmt: skip
    if lacks:
        raise StudyError(
            f"{PLACE}: {folder} must hold every weight of the encoder, it lacks {len(lacks)}: {lacks[0]}, ..."
        )
    pretrained: nn.Module = net
    return pretrained


def _check_length(module: Transformer, shape: tuple[int, ...]) -> None:
    for name, part in module.base.named_modules():
        if isinstance(part, nn.Embedding) and name.rpartition(".")[2] in ("position_embeddings", "wpe"):
            # A family of RoBERTa's form counts positions from behind its padding token.
            most = part.num_embeddings - (0 if part.padding_idx is None else part.padding_idx + 1)
            if len(shape) != 1 or shape[0] > most:
                raise StudyError(
                    f"model: hf takes at most {most} tokens, got {shape[0]}: data.options.max_length: {most}"
                )
