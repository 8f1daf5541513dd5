"""The rooms of the house: who may import whom, how long a file may be, and what --help loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fedlth"
FILES = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in sorted(PACKAGE.rglob("*.py"))}
# From the ground up, as docs/architecture.md draws it: a room imports from itself and from the rooms before it.
ORDER = (
    "version", "errors", "output", "rng", "study", "data", "models", "kernel", "wire", "storage", "tickets", "training",
    "methods",
    "personalization", "experiment", "federation", "lab", "engines", "export", "privacy", "deploy", "report",
    "forecast", "tune",
    "catalogue", "api", "bench", "__init__", "cli", "__main__",
)  # fmt: skip
MOST_LINES = 400


def room(name: str) -> str:
    return name.split(".")[1]


@cache
def parsed(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


@cache
def imports(name: str, *, eager: bool = False) -> frozenset[str]:
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
            found.update(f"{node.module}.{a.name}" for a in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(parsed(name))
    return frozenset(found)


@cache
def files_of(name: str) -> frozenset[str]:
    """Return the files of the package that a file imports, wherever in it the import stands."""

    def owner(module: str) -> str:
        above = module.rpartition(".")[0]
        return next((f for f in (module, f"{module}.__init__", above, f"{above}.__init__") if f in FILES), "")

    return frozenset(map(owner, imports(name))) - {"", name}


def tops(modules: frozenset[str]) -> set[str]:
    return {m.partition(".")[0] for m in modules}


def dotted(node: ast.expr) -> str:
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def test_every_room_has_its_place_and_few_files_are_none() -> None:
    assert {room(f) for f in FILES} == set(ORDER)
    assert sum(p.is_file() for p in PACKAGE.iterdir() if p.suffix == ".py") <= 10


def test_imports_go_down() -> None:
    place = {name: i for i, name in enumerate(ORDER)}
    up = [(f, other) for f in FILES for other in files_of(f) if place[room(other)] > place[room(f)]]
    assert not up, "\n".join(f"{f} imports {other}, a room above it" for f, other in sorted(up))


def test_no_circle_of_files() -> None:
    """Take away files that import nothing that is left, or that nothing left imports: what remains is a circle."""
    left = set(FILES)
    while free := {f for f in left if not files_of(f) & left or not any(f in files_of(o) for o in left)}:
        left -= free
    assert not left, f"these import each other in a circle: {sorted(left)}"


def test_rooms_that_must_not_know_each_other() -> None:
    for name in FILES:
        known = {room(f) for f in files_of(name)}
        if room(name) == "kernel":
            assert known <= {"kernel", "models"}, f"{name}: the kernel knows values alone, got {known}"
        if room(name) == "tickets":
            assert not known & {"training", "methods", "wire", "data"}, name
        if room(name) == "wire":
            assert not known & {"methods", "tickets", "training"}, f"{name}: the wire knows kinds, never methods"
        if room(name) == "report":
            assert not tops(imports(name)) & {"torch", "ray", "flwr"}, name
            assert known <= {"report", "storage", "study", "errors", "rng"}, f"{name}: {known}"
        if room(name) == "storage":
            assert "torch" not in tops(imports(name, eager=True)), f"{name}: a report reads facts without torch"


def test_ray_and_flower_live_in_their_engines() -> None:
    using = {top: {f for f in FILES if top in tops(imports(f))} for top in ("ray", "flwr")}
    programs = {"fedlth.engines.flower", "fedlth.engines.flower_standing", "fedlth.engines.flower_online"}
    assert using["flwr"] == programs, using  # a run, what serves a device's messages, the check
    assert len(using["ray"]) == 1 and all(f.startswith("fedlth.engines.ray") for f in using["ray"]), using


def test_light_files_import_nothing_heavy() -> None:
    for name in (
        "cli.commands",
        "cli.grammar",
        "__main__",
        "__init__",
        "study.schema",
        "storage.json_lines",
        "errors",
        "rng",
        "catalogue",
    ):
        assert not tops(imports(f"fedlth.{name}", eager=True)) & {"torch", "ray", "flwr", "scipy", "matplotlib"}, name


def test_files_are_short_and_say_what_they_are_for() -> None:
    for name, path in FILES.items():
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= MOST_LINES, f"{name}: one idea a file, at most {MOST_LINES} lines"
        assert ast.get_docstring(parsed(name)) and text.startswith('"""'), f"{name}: its first line says what it is for"
        assert path.stem not in ("utils", "helpers", "base", "common"), name


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
    for command in (
        "run",
        "resume",
        "report",
        "compare",
        "diff",
        "list",
        "check",
        "bytes",
        "tickets",
        "partition",
        "transfer",
        "audit",
        "lottery",
        "deploy",
        "bench",
    ):
        assert f"    {command}" in done.stdout


def test_nothing_unpickles_or_uses_global_randomness() -> None:
    for name, path in FILES.items():
        calls = {dotted(n.func) for n in ast.walk(parsed(name)) if isinstance(n, ast.Call)}
        assert "torch.load" not in calls, name
        if path.name != "unpickle.py":
            assert not {"pickle.load", "pickle.loads", "cloudpickle.loads"} & calls, name
        assert not {"np.random.seed", "np.random.default_rng", "random.seed"} & calls, name
        # The first puts it back as the caller had it; the second repeats LEAF's draws with a generator of its own.
        if name not in ("fedlth.experiment.saved_ticket", "fedlth.data.leaf"):
            assert "random" not in tops(imports(name)), name
    assert not {m for m in imports("fedlth.data.leaf") if m.startswith("random")} - {"random.Random"}


def test_scripts_import_what_is_there() -> None:
    """What stands beside the package is run seldom: a name that moved would be noticed months later."""
    missing = []
    for script in [p for folder in ("benchmarks", "scripts", "simulations") for p in (ROOT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "fedlth":
                known = names_of(node.module)
                missing += [f"{script.name}: {node.module}.{a.name}" for a in node.names if a.name not in known]
    assert not missing


def names_of(module: str) -> set[str]:
    """Return what can be imported from a module of the package: its own names, and its files."""
    own = module if module in FILES else f"{module}.__init__"
    found = {file.removesuffix(".__init__").rpartition(".")[2] for file in FILES if file.startswith(f"{module}.")}
    for node in parsed(own).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found.update(a.asname or a.name for a in node.names)
        elif isinstance(node, ast.Assign):
            found.update(one.id for target in node.targets for one in ast.walk(target) if isinstance(one, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return found
