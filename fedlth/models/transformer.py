"""A transformer as fedlth trains it: tokens in, one row of outputs an example (or a masked token) out."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedlth.models.heads import narrow, units_of
from fedlth.models.layout import Units
from fedlth.models.transformer_parts import linear, merged

SMALL = "fedlth_small"  # in config.json, beside the family's own settings: what a network that has lost units is
PADDING = 0  # the token that data: text pads a batch with
CHANNELS = ("intermediate_size", "hidden_dim", "n_inner")  # what configurations call the number of channels
TOKENIZER = (  # what AutoTokenizer reads
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model",
)  # fmt: skip


class Given(nn.Module):
    """Stands where a network's encoder does, and gives what the encoder has returned already."""

    found: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.found


class Transformer(nn.Module):
    """A network of `transformers`, its parts under their own names: the encoder's as in every model of its family.

    With `headed`, `net` is the encoder alone, and a linear `head` of `outputs` outputs sees its last layer, pooled; of
    masked_lm the first `outputs` tokens are told of. `source` is the folder that its weights came from.
    """

    def __init__(
        self, net: Any, outputs: int, task: str, pooling: str, decoder: bool, *, headed: bool,
        source: Path | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.source, self.narrowed, self.outputs = source, False, outputs
        self.prefix, self.task, self.pooling, self.decoder = str(net.base_model_prefix), task, pooling, decoder
        if headed:
            self.add_module(self.prefix, net)
            self.head = nn.Linear(net.config.hidden_size, outputs)
        else:
            for name, part in net.named_children():
                self.add_module(name, part)
        # Not registered: its parts are, above. The family's own head runs in it, on what the encoder has found.
        shell = copy.copy(net)
        shell._modules = {**net._modules, self.prefix: Given()}
        self._hidden: tuple[Any, Any] = (net, shell)

    @property
    def base(self) -> nn.Module:
        """The encoder, or decoder, without a head."""
        return self.get_submodule(self.prefix)

    @property
    def config(self) -> Any:
        return self._hidden[0].config

    @property
    def vocabulary(self) -> int:
        """How many tokens there is an embedding for, and of masked_lm an output."""
        base: Any = self.base
        known = int(base.get_input_embeddings().num_embeddings)
        return min(known, self.outputs) if self.task == "masked_lm" else known

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None,
        asked: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Return (B, outputs), or of masked_lm (B, T, outputs), with `asked` (B, T) of the asked positions alone."""
        kinds = {} if token_type_ids is None or not self._takes_kinds else {"token_type_ids": token_type_ids}
        found = self.base(input_ids=input_ids, attention_mask=attention_mask, **kinds)
        hidden = found[0]
        if self.task == "masked_lm":
            # An embedding may have room for more tokens than the tokenizer has: nobody is asked for those.
            if asked is None:
                return self._own_head(found, input_ids)[..., : self.outputs]
            found.last_hidden_state = hidden[asked.bool()][None]
            return self._own_head(found, input_ids)[0, :, : self.outputs]
        if self.pooling == "own" and not self.decoder:
            return self._own_head(found, input_ids)
        head = self.get_submodule("score" if self.pooling == "own" else "head")
        logits: Tensor = head(self._pooled(hidden, attention_mask))
        return logits

    @property
    def _takes_kinds(self) -> bool:
        return getattr(self.config, "type_vocab_size", 0) > 1

    def _own_head(self, found: Any, input_ids: Tensor) -> Tensor:
        shell = self._hidden[1]
        shell._modules[self.prefix].found = found
        try:
            logits: Tensor = shell(input_ids=input_ids).logits
            return logits
        finally:
            shell._modules[self.prefix].found = None

    def _pooled(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return (B, H) of hidden states (B, T, H)."""
        if self.pooling == "first":
            return hidden[:, 0]
        if self.pooling == "mean":
            there = mask[..., None].to(hidden.dtype)
            return (hidden * there).sum(1) / there.sum(1).clamp(min=1)
        last = (mask.sum(1) - 1).clamp(min=0)
        return hidden[torch.arange(len(hidden), device=hidden.device), last]

    def prunable_weights(self) -> Iterator[nn.Parameter]:
        """Yield what is prunable where a study names nothing: the encoder's linear weights, without its pooler's."""
        for name, part in self.base.named_modules():
            if linear(part) and not {"pooler", "embeddings"} & {*name.split(".")} and "lora_" not in name:
                yield part.get_parameter("weight")

    def units(self) -> dict[str, Units]:
        """Return the attention heads and feed-forward channels of every tensor that holds any."""
        return units_of(self.base, self.prefix)

    def narrow(self, kept: Mapping[str, np.ndarray]) -> None:
        """Cut heads and channels out in place: of those in `kept`, name -> (count,) bool, the True stay."""
        narrow(self, self.units(), self.base, kept)
        self.narrowed = True

    def plain_state(self) -> dict[str, Tensor]:
        """Return copies of all tensors under the names of `transformers`, adapters merged, a tied tensor once."""
        found: dict[str, Tensor] = {}
        seen = set[int]()
        for name, tensor in merged(self).items():
            if tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                found[name] = tensor.detach().cpu().clone().contiguous()
        return found

    @property
    def counts(self) -> dict[str, int]:
        """How many heads and channels each layer has, by name."""
        return {unit.of: unit.count for unit in self.units().values()}

    @property
    def plain(self) -> bool:
        """Say whether transformers alone can load what `save_pretrained` writes: it is as wide in every layer."""
        heads, channels = self._widths()
        return len(channels) < 2 and heads <= {getattr(self.config, "num_attention_heads", 0)}

    def _widths(self) -> tuple[set[int], set[int]]:
        found = {kind: {n for of, n in self.counts.items() if of.endswith(kind)} for kind in (".heads", ".channels")}
        return found[".heads"], found[".channels"]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors and the tokenizer's files, for `from_pretrained` of plain transformers.

        Of a network with the family's own head that is the whole network; else the encoder, our `head` beside it
        (docs/study.md has the lines that give its outputs). A decoder whose configuration names no padding token gets
        one. What has lost heads, or has layers of unequal width, only `load_small` opens: no configuration says what
        it is.
        """
        from safetensors.torch import save_file

        net, folder = self._hidden[0], Path(folder)
        config = copy.deepcopy(net.config)
        config.architectures = [type(net).__name__]
        if self.decoder and getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = self._padding()
        if self.narrowed:
            channels = self._widths()[1]
            if len(channels) == 1:
                setattr(config, next(name for name in CHANNELS if hasattr(config, name)), channels.pop())
            told = {"units": self.counts, "outputs": self.outputs, "task": self.task, "pooling": self.pooling}
            setattr(config, SMALL, told)
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(folder)
        save_file(self.plain_state(), str(folder / "model.safetensors"), metadata={"format": "pt"})
        for file in (self.source / name for name in TOKENIZER) if self.source is not None else ():
            if file.is_file() and self.source != folder.resolve():
                shutil.copyfile(file, folder / file.name)

    def _padding(self) -> int:
        """Return the token by which transformers may find where a decoder's examples end: its end of text.

        Where the embedding has no such token (a small random network) that of our batches.
        """
        found = getattr(self.config, "eos_token_id", None)
        end = found[0] if isinstance(found, list | tuple) and found else found
        return end if isinstance(end, int) and 0 <= end < self.vocabulary else PADDING
