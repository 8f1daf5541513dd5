"""The rooms of the house: who may import whom, how long a file may be, and what --help loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fedlth"
FILES = sorted(PACKAGE.rglob("*.py"))
# A file imports its own floor and those below; design.md has the reasons.
FLOORS: list[set[str]] = [
    {"errors", "__init__", "output"},
    {"rng", "params", "config", "yaml_text", "ledger", "parts", "store", "jobs", "records"},
    {"tickets", "wire"},
    {"data", "models", "compute", "train", "supermask", "network", "world"},
    {"methods"},
    {"client", "server", "update_norms", "uplink", "downlink", "entries", "runfolder", "packs", "tickets_file"},
    {"visits", "progress", "rounds", "lab"},
    {"tensorboard", "session"},
    {"engines", "forecast", "forecast_bytes", "tune", "api", "report", "catalogue", "cli", "__main__"},
]
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
MOST_LINES = 300


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(path: Path, *, eager: bool = False) -> set[str]:
    """Return every module that a file imports; `eager` leaves out what stands in functions or under TYPE_CHECKING."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if eager and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            return
        if eager and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{a.name}" for a in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(parsed(path))
    return found


def dotted(node: ast.expr) -> str:
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def rooms_of(modules: set[str]) -> set[str]:
    parts = [m.split(".") for m in modules if m.startswith("fedlth.")]
    return {p[1] for p in parts if p[1] in FLOOR}


def tops(modules: set[str]) -> set[str]:
    return {m.partition(".")[0] for m in modules}


def test_every_file_has_its_floor() -> None:
    assert {room(f) for f in FILES} - set(FLOOR) == set()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    own = FLOOR[room(path)]
    above = {r for r in rooms_of(imports(path)) if FLOOR[r] > own}
    assert not above, f"{path.name} stands on floor {own} and imports {above}"


def test_rooms_that_must_not_know_each_other() -> None:
    for path in FILES:
        seen, known = imports(path), rooms_of(imports(path))
        if room(path) == "tickets":
            assert not known & {"train", "methods", "wire", "world", "models", "data"}, path
        if room(path) == "wire":
            assert not known & {"methods", "tickets"}, f"{path}: the wire knows kinds, never methods"
        if room(path) == "report":
            assert not tops(seen) & {"torch", "ray", "flwr"}, path
        if room(path) == "methods":
            assert not known & {"client", "server", "engines", "rounds"}, path


def test_ray_and_flower_live_in_their_engines() -> None:
    using = {name: {str(p.relative_to(PACKAGE)) for p in FILES if name in tops(imports(p))} for name in ("ray", "flwr")}
    assert len(using["flwr"]) == 1 and all(p.startswith("engines/flower") for p in using["flwr"]), using
    assert len(using["ray"]) == 1 and all(p.startswith("engines/ray") for p in using["ray"]), using


@pytest.mark.parametrize("name", ["cli", "__main__", "config", "ledger", "errors", "rng", "catalogue"])
def test_light_files_import_nothing_heavy(name: str) -> None:
    assert not tops(imports(PACKAGE / f"{name}.py", eager=True)) & {"torch", "ray", "flwr", "scipy", "matplotlib"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_are_short_and_say_what_they_are_for(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MOST_LINES
    assert ast.get_docstring(parsed(path)) and text.startswith('"""')
    assert path.stem not in ("utils", "helpers", "base", "common")


def test_help_is_light_and_quick() -> None:
    code = (
        "import sys, time\n"
        "from fedlth.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'ray', 'flwr', 'numpy', 'scipy', 'matplotlib', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert time.process_time() < 0.5, time.process_time()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for command in ("run", "resume", "report", "compare", "diff", "list", "check", "bytes", "tickets", "lottery"):
        assert f"    {command}" in done.stdout


def test_nothing_unpickles_or_uses_global_randomness() -> None:
    for path in FILES:
        known = imports(path)
        calls = {dotted(n.func) for n in ast.walk(parsed(path)) if isinstance(n, ast.Call)}
        assert "torch.load" not in calls, path
        if path.name != "unpickle.py":
            assert not {"pickle.load", "pickle.loads", "cloudpickle.loads"} & calls, path
        assert not {"np.random.seed", "np.random.default_rng", "random.seed"} & calls, path
        if path.name != "tickets_file.py":  # which puts the caller's generator back after a user's code has run
            assert "random" not in known, path
