"""Hostile input to every receiver: python benchmarks/wire_fuzz.py [COUNT] [--guided]. Ends with an error at a surprise.

Payloads of every codec with their checksums repaired, metrics, Flower records. Mutants of honest inputs; with --guided
by the coverage of the decoders (extra `fuzz`). Each target runs in a process of its own, whose memory is bounded.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

MB = 1 << 20
# By share of the inputs. Models of real size are slower to decode by as much as they are larger.
SHARES = {"tiny": 0.3, "small": 0.475, "metrics": 0.1, "flower": 0.1, "lenet5": 0.02, "leaf_cnn": 0.005}
GUIDED = {"tiny": 0.7, "metrics": 0.15, "flower": 0.15}
MOST_SECONDS = 1.0  # CPU seconds of one input


def mutant(body: bytes, draw: np.random.Generator) -> bytes:
    """Return `body` with one to four bytes changed, cut or put in, mostly in its structure: the first 60 bytes."""
    bad = bytearray(body)
    for _ in range(int(draw.integers(1, 5))):
        at = int(draw.integers(0, len(bad) if draw.random() < 0.5 else min(len(bad), 60)))
        kind = draw.random()
        if kind < 0.7:
            bad[at] = int(draw.integers(0, 256))
        elif kind < 0.85:
            del bad[at : at + int(draw.integers(1, 9))]
        else:
            bad[at:at] = draw.bytes(int(draw.integers(1, 9)))
        bad = bad or bytearray(1)
    return bytes(bad)


SCALAR = re.compile(rb'"[^"]*"|[\w.+-]+')
TOKENS = [b"NaN", b"-Infinity", b"1e999", b"-1", b"0", b"9" * 400, b"null", b"true", b"2", b"3", b"[]", b"{}", b"[[]]"]
TOKENS += [
    b'""',
    b'"\\ud800"',
    b'"\\u001b[2J"',
    b'"+1.0e+400"',
    b'"nan"',
    b'{"f": "+nan"}',
    b'"f"',
    b'"kind"',
    b'"lost"',
]


def swapped(text: bytes, draw: np.random.Generator) -> bytes:
    """Return JSON text with one of its names or values in another's place, or in that of a token."""
    found = list(SCALAR.finditer(text))
    if not found:
        return text + TOKENS[int(draw.integers(len(TOKENS)))]
    one, other = (found[int(draw.integers(len(found)))] for _ in range(2))
    token = other.group() if draw.random() < 0.2 else TOKENS[int(draw.integers(len(TOKENS)))]
    return text[: one.start()] + token + text[one.end() :]


class Watch:
    """Runs a target on inputs, and holds the worst of time and memory."""

    def __init__(self, name: str) -> None:
        from fuzz_targets import target

        self.name, self._target = name, target(name)
        self.seeds, self.is_text = self._target.seeds, self._target.is_text
        self.limit = 4 * self._target.model_bytes + 16 * MB
        self.inputs = self.accepted = self.most_bytes = 0
        self.slowest = 0.0
        for seed in self.seeds:  # what is compiled or cached once is no memory of an input
            self._target(seed)
        tracemalloc.start()
        for seed in self.seeds:
            self(seed)
        self.inputs = self.accepted = 0
        self._before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def __call__(self, data: bytes) -> None:
        given = self._target.prepare(data)  # what has arrived is there, before it is read
        tracemalloc.reset_peak()
        held, began = tracemalloc.get_traced_memory()[0], time.thread_time()
        self.accepted += self._target.run(given)
        seconds, peak = time.thread_time() - began, tracemalloc.get_traced_memory()[1] - held
        self.inputs += 1
        self.slowest, self.most_bytes = max(self.slowest, seconds), max(self.most_bytes, peak)
        assert peak <= self.limit, f"{self.name}: {peak} bytes for one input, at most {self.limit}"
        assert seconds <= MOST_SECONDS, f"{self.name}: {seconds} s for one input, at most {MOST_SECONDS}"

    def told(self) -> dict[str, float]:
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self._before)
        return {
            "inputs": self.inputs, "seeds": len(self.seeds), "accepted": self.accepted, "slowest_s": self.slowest,
            "peak_bytes": self.most_bytes, "grown_bytes": grown, "limit_bytes": self.limit,
        }  # fmt: skip


def mutate(name: str, count: int) -> dict[str, float]:
    """Run `count` mutants; resident memory may not grow past the limit either, which native code counts in too."""
    watch, draw = Watch(name), np.random.default_rng(0)
    for i in range(count):
        seed = watch.seeds[i % len(watch.seeds)]
        watch(swapped(seed, draw) if watch.is_text and draw.random() < 0.5 else mutant(seed, draw))
    told = watch.told()
    assert told["grown_bytes"] <= watch.limit, f"{name}: resident memory grew by {told['grown_bytes']} bytes"
    return told


def guide(name: str, count: int, corpus: Path, tell: Callable[[dict[str, float]], None]) -> None:
    """Run `count` inputs by coverage; does not return."""
    import atheris

    with atheris.instrument_imports(include=["fedlth.wire", "fedlth.engines.flower_record", "json"]):
        watch = Watch(name)
    for i, seed in enumerate(watch.seeds):
        (corpus / f"seed-{i}").write_bytes(seed)

    def one(data: bytes) -> None:
        watch(data)
        if watch.inputs % 500 == 0:
            tell(watch.told())

    longest = max(map(len, watch.seeds)) + 64

    def other(data: bytes, longest: int, seed: int) -> bytes:
        draw = np.random.default_rng(seed)
        made = swapped(data, draw) if draw.random() < 0.5 else atheris.Mutate(data, longest)
        return bytes(made[:longest])

    more = {"custom_mutator": other} if watch.is_text else {}
    flags = ("-len_control=0", "-use_value_profile=1", "-seed=1", "-verbosity=0")  # long inputs from the start
    atheris.Setup([sys.argv[0], str(corpus), f"-runs={count}", f"-max_len={longest}", *flags], one, **more)
    atheris.Fuzz()


def worker(name: str, count: int, folder: Path, guided: bool) -> None:
    def tell(told: dict[str, float]) -> None:
        (folder / "told.json").write_text(json.dumps(told))

    if guided:
        (folder / "corpus").mkdir()
        guide(name, count, folder / "corpus", tell)
    tell(mutate(name, count))


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=100_000)
    parser.add_argument("--guided", action="store_true")
    parser.add_argument("--worker", metavar="TARGET", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="keep what the guided search finds here")
    given = parser.parse_args(argv)
    if given.worker:
        worker(given.worker, given.count, given.folder, given.guided)
        return 0
    print(f"{'target':<10}{'inputs':>9}{'accepted':>10}{'slowest':>10}{'peak MB':>9}{'grown MB':>10}{'limit MB':>10}")
    total, began = 0, time.monotonic()
    for name, share in (GUIDED if given.guided else SHARES).items():
        with tempfile.TemporaryDirectory() as temporary:
            folder = (given.folder or Path(temporary)) / name
            folder.mkdir(parents=True)
            call = [
                sys.executable,
                __file__,
                str(round(share * given.count)),
                "--worker",
                name,
                "--folder",
                str(folder),
            ]
            # What is compiled has no coverage: a guided search runs the same loops as plain Python.
            env = {**os.environ, **({"NUMBA_DISABLE_JIT": "1"} if given.guided else {})}
            done = subprocess.run(call + ["--guided"] * given.guided, capture_output=True, text=True, env=env)
            if done.returncode:
                print(done.stdout + done.stderr, file=sys.stderr)
                print(f"{name}: ended with {done.returncode}", file=sys.stderr)
                return 1
            told = json.loads((folder / "told.json").read_text())
        total += told["inputs"]
        print(f"{name:<10}{told['inputs']:>9,}{told['accepted']:>10,}{1000 * told['slowest_s']:>7.1f} ms", end="")
        grown = "–" if given.guided else f"{told['grown_bytes'] / MB:.1f}"  # a guided search keeps what it finds
        print(f"{told['peak_bytes'] / MB:>9.1f}{grown:>10}{told['limit_bytes'] / MB:>10.1f}")
    print(f"{total:,} inputs in {time.monotonic() - began:.0f} s: one exception type; what was accepted is finite and")
    print("right-sized. peak: tracemalloc, one input; grown: resident memory of the process over its honest inputs.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
