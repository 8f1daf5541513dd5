"""A short fuzz: mutants of honest inputs, what a guided search once found, and the densest text that is still read."""

from __future__ import annotations

import base64
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.fuzz_targets import JOB, handmade, read_flower, read_metrics, target
from benchmarks.wire_fuzz import MB, mutant
from fedlth.engines.flower_record import LONGEST_HEAD, SPEAKS, to_answer
from fedlth.wire import metrics, payload
from fedlth.wire.codec import CODECS, Codec
from fedlth.wire.payload import Content
from fedlth.wire.reference import Reference

CORPUS = Path(__file__).parent / "corpus"


@pytest.mark.parametrize("name", ["tiny", "small", "metrics", "flower"])
def test_mutants_are_refused_or_harmless(name: str) -> None:
    made = target(name)
    draw, accepted = np.random.default_rng(7), 0
    for i in range(500):
        accepted += made(mutant(made.seeds[i % len(made.seeds)], draw))
    assert accepted < 250


@pytest.mark.parametrize("name", ["tiny", "metrics", "flower"])
def test_honest_inputs_are_read_and_the_corpus_is_harmless(name: str) -> None:
    made = target(name)
    assert sum(map(made, made.seeds)) >= len(made.seeds) - (name == "metrics")  # one of them is an infinite number
    found = [base64.b64decode(line) for line in (CORPUS / f"{name}.txt").read_text().split()]
    assert len(found) >= 20
    for data in found:
        made(data)


@pytest.mark.parametrize("part", ["{}", "[]", '{"f":"1"}', "7"])
def test_the_densest_text_that_is_read_stays_small(part: str) -> None:
    """JSON of a few bytes an object becomes many times as much in memory: the cap on its length is what bounds that."""
    longest = max(metrics.LONGEST, LONGEST_HEAD)
    text = f'{{"v":"{SPEAKS}","messages":[' + (part + ",") * ((longest - 40) // (len(part) + 1)) + part + "]}"
    tracemalloc.start()
    try:
        assert read_metrics(text.encode())
        with pytest.raises(ValueError, match="payloads, at most"):
            to_answer({"head": {"b": text}}, JOB)
        assert tracemalloc.get_traced_memory()[1] < 16 * MB
    finally:
        tracemalloc.stop()
    assert not read_metrics(b" " * longest + text.encode())


def test_a_tree_as_deep_as_the_text_allows_is_refused() -> None:
    assert not read_metrics(b'{"a":' * 90_000)
    assert not read_flower(b"\x00" + b"[" * 200_000)


@pytest.mark.parametrize("codec", CODECS.values(), ids=lambda codec: codec.name)
@pytest.mark.parametrize("leans", [False, True])
def test_a_dense_payload_is_read_in_four_models_and_16_mb(codec: Codec, leans: bool) -> None:
    layout = handmade((1000, 1500))
    draw = np.random.default_rng(0)
    held = draw.normal(size=layout.num_floats).astype(np.float32)
    floats = held + (0.01 * draw.normal(size=held.size)).astype(np.float32)
    refs: dict[str, Any] = {"reference": Reference(held)} if leans else {}
    content = Content(np.ones(layout.num_prunable, bool), floats, np.array([3]))
    data = payload.encode("values", layout, content, codec=codec, **refs)
    tracemalloc.start()
    try:
        payload.decode(data, "values", layout, codec=codec, **refs)
        assert tracemalloc.get_traced_memory()[1] <= 4 * 4 * layout.num_floats + 16 * MB
    finally:
        tracemalloc.stop()
