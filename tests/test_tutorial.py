"""docs/tutorial.md, run as a reader would: every file is written, every command run, every line of output compared."""

from __future__ import annotations

import io
import os
import re
import runpy
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from fedlth.cli import main

TEXT = (Path(__file__).parents[1] / "docs" / "tutorial.md").read_text()
# Each is a story of its own, told in an empty folder.
STORIES = re.split(r"^(?=## Your own text)", TEXT, flags=re.M)
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
VARIES = re.compile(r"\b[0-9a-f]{16}\b|~?[+−-]?\d+\.\d+|~\d+")  # hashes, numbers with a decimal point, what ~ marks


class Screen(io.StringIO):
    """A terminal whose reader presses Ctrl-C once a line that begins with `stop` has appeared."""

    stop = ""

    def write(self, text: str) -> int:
        count = super().write(text)
        if self.stop and re.search(rf"^{re.escape(self.stop)}.*\n", self.getvalue(), re.M):
            self.stop = ""
            os.kill(os.getpid(), signal.SIGINT)
        return count


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)  # a run in the background inherits an ignored one
    yield tmp_path
    signal.signal(signal.SIGINT, heard)
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_project"]:
        del sys.modules[name]


def session(block: str) -> Iterator[tuple[str, list[str]]]:
    """Split a console block into commands, each with the output that the page shows."""
    for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
        command, *shown = part.splitlines()
        yield command, shown


def pattern(line: str) -> str:
    """Return the regular expression of a shown line: what varies is any number, and widths follow the numbers."""
    parts = VARIES.split(line)
    marks = [r"[0-9a-f]{16}" if len(found) == 16 else r"[+−-]?\d+(\.\d+)?" for found in VARIES.findall(line)]
    fixed = [re.sub(r"(\\ )+", r"\\s*", re.sub(r"-{5,}", "-", re.escape(part).replace("\\-", "-"))) for part in parts]
    fixed = [part.replace("-", "-+") if set(part) == {"-"} else part for part in fixed]
    return "".join(a + b for a, b in zip(fixed, [*marks, ""], strict=True))


def assert_shown(shown: list[str], printed: str, command: str) -> None:
    """Hold what the page shows against what was printed; between two shown lines `...` may leave out any others."""
    lines = [line.rstrip() for line in printed.splitlines()]
    place, free = 0, False
    for line in (line.rstrip() for line in shown if line != "^C"):
        if line == "...":
            free = True
            continue
        fits = [i for i in range(place, len(lines)) if re.fullmatch(pattern(line), lines[i])]
        assert fits and (free or fits[0] == place), f"$ {command}\nthe page shows\n  {line}\nprinted\n{printed}"
        place, free = fits[0] + 1, False
    assert free or not "".join(lines[place:]), f"$ {command}\nthe page leaves out\n" + "\n".join(lines[place:])


def run(command: str, shown: list[str]) -> str:
    program, *arguments = shlex.split(command)
    screen = Screen()
    if "^C" in shown:
        screen.stop = shown[shown.index("^C") - 1].partition(" ")[0]
    with redirect_stdout(screen), redirect_stderr(screen):
        if program == "python":
            runpy.run_path(arguments[0])
        else:
            assert program == "fedlth"
            assert main(arguments) == (130 if "^C" in shown else 0), screen.getvalue()
    return screen.getvalue()


@pytest.mark.usefixtures("unpainted")
@pytest.mark.parametrize("story", STORIES, ids=["images", "text"])
def test_the_tutorial_does_what_it_says(folder: Path, story: str) -> None:
    blocks = BLOCK.findall(story)
    for language, block in blocks:
        if language == "console":
            for command, shown in session(block):
                assert_shown(shown, run(command, shown), command)
        else:
            named = re.match(r"# (\S+\.(?:py|yaml))\n", block)
            assert named, f"a file's first line is its name, got {block.splitlines()[0]!r}"
            path = folder / named.group(1)
            path.parent.mkdir(exist_ok=True)
            path.write_text(block)
    assert {language for language, _ in blocks} == {"python", "yaml", "console"}
