"""From text to tokens: by a pre-trained model's own tokenizer, or by the most frequent words of the training text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any, Protocol

from fedlth.data.factory import told
from fedlth.data.limits import check_count
from fedlth.data.pretrained import EXTRA, folder_of
from fedlth.errors import StudyError, require, wrong

PLACE = "data.options.tokenizer"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # of `words`, tokens 0 to 4 as BERT uses them


class Tokenizer(Protocol):
    @property
    def size(self) -> int:
        """The number of tokens there are."""
        ...

    def __call__(self, text: str, pair: str | None, /) -> tuple[list[int], list[int]]:
        """Return an example's tokens, cut to the longest that is asked for, and of each 0, or 1 in the pair."""
        ...


@dataclass(frozen=True)
class OwnTokenizer:
    """The tokenizer.json beside a pre-trained model, by the library `tokenizers`; padding is left to the batches."""

    library: Any

    @property
    def size(self) -> int:
        return int(self.library.get_vocab_size())

    def __call__(self, text: str, pair: str | None, /) -> tuple[list[int], list[int]]:
        # One by one: a batch runs on threads, and workers are forked afterwards.
        found = self.library.encode(text, pair)
        return found.ids, found.type_ids


@dataclass(frozen=True)
class Words:
    """The most frequent words and signs of the training text, lower case; a token for every other."""

    words: tuple[str, ...]
    size: int
    longest: int

    @cached_property
    def _place(self) -> Mapping[str, int]:
        return {word: place for place, word in enumerate((*SPECIAL, *self.words))}

    def __call__(self, text: str, pair: str | None, /) -> tuple[list[int], list[int]]:
        first, second = ([self._place.get(w, 1) for w in split(t)] for t in (text, pair or ""))
        ends = 2 if pair is None else 3
        while len(first) + len(second) > self.longest - ends:
            (first if len(first) > len(second) else second).pop()
        ids = [2, *first, 3] + ([] if pair is None else [*second, 3])
        return ids, [0] * (len(first) + 2) + [1] * (len(ids) - len(first) - 2)


def split(text: str) -> list[str]:
    """Return a text's words and signs, lower case."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def tokenizer_of(spec: object, longest: int, training: Iterable[str]) -> Tokenizer:
    """Build a tokenizer, `{path | package | hub: ...}` of a model, or `{words: N}`: N tokens, five of them special.

    longest: tokens an example has at most. training: the texts of which words are counted.
    """
    ways = ("path", "package", "hub"), ("words",)
    if not isinstance(spec, Mapping) or not any(set(spec) <= set(way) for way in ways) or not spec:
        raise wrong(PLACE, "{path: ...}, {package: ...}, {hub: ...} or {words: N}", spec)
    if "words" in spec:
        return _words(training, longest, spec["words"])
    folder = folder_of(PLACE, **spec)
    require("data: text with a model's tokenizer", "tokenizers", extra=EXTRA)
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise StudyError(
            f"{PLACE}: {folder} must hold tokenizer.json; transformers writes it: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    library: Any = import_module("tokenizers")
    try:
        found = library.Tokenizer.from_file(str(file))
        found.no_padding()
        found.enable_truncation(longest)
    except Exception as error:  # the library raises plain Exception
        raise StudyError(f"{PLACE}: {file} cannot be read: {told(error)}") from error
    return OwnTokenizer(found)


def _words(texts: Iterable[str], longest: int, words: int) -> Words:
    check_count(f"{PLACE}.words", words, len(SPECIAL) + 1)
    counts = Counter(word for text in texts for word in split(text))
    frequent = sorted(counts, key=lambda word: (-counts[word], word))[: words - len(SPECIAL)]
    return Words(tuple(frequent), words, longest)


def encoded(tokenizer: Tokenizer, texts: Iterable[tuple[str, str | None]]) -> list[tuple[list[int], list[int]]]:
    """Return each example's tokens and which of two texts each is of; raise StudyError at a text without a token."""
    found = []
    for text, pair in texts:
        ids, kinds = tokenizer(text, pair)
        if not ids:
            raise StudyError(f"data: every text must have a token, got none of {text!r}")
        found.append((ids, kinds))
    return found
