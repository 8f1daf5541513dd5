"""The core without its extras: what a device needs works, and what is missing is said in one line."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fedlth"
# The packages of the extras `sim`, `fast` and `onnx`, and what they or others bring along.
EXTRAS = ["ray", "scipy", "matplotlib", "jinja2", "flwr.simulation", "pandas", "pyarrow", "numba", "llvmlite",
          "onnx", "onnxscript", "onnxruntime"]  # fmt: skip
INSTALL = "pip install 'fedlth[sim]'"

SCRIPT = """
import contextlib, io, json, sys
hidden, commands, run = json.loads(sys.argv[1])

class Hidden:  # a finder that does not see them, as where they are not installed
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, *more):
        seen = not {name, name.partition(".")[0]} & set(hidden)
        return self.finder.find_spec(name, *more) if seen else None

sys.meta_path[:] = map(Hidden, sys.meta_path)
import fedlth.api
from fedlth.cli import main
answers = {}
for name, command in commands.items():
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(command)
    answers[name] = [code, out.getvalue(), err.getvalue()]
import torch
answers["predicted"] = list(fedlth.api.load_ticket(run, client=0)(torch.zeros(2, 1, 28, 28)).shape)
from fedlth.engines.flower_app import client_app
answers["client_app"] = type(client_app).__name__
answers["loaded"] = sorted({name.partition(".")[0] for name in sys.modules} & set(hidden))
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each command says where only the core is installed: [exit code, output, errors]."""
    folder = tmp_path_factory.mktemp("slim")
    run, absent = str(folder / "run"), f"out={folder / 'absent'}"
    small = ["configs/smoke.yaml", "workers=1", "federate.rounds=1", "clients.count=3", "federate.clients_per_round=2",
             "clients.unseen=0.0", "personalise.arms=[global,ticket]"]  # fmt: skip
    commands = {
        "check": ["check", *small],
        "run": ["run", *small, f"out={run}"],
        "bytes": ["bytes", run],
        "ls": ["tickets", "ls", run],
        "probes": ["list", "probes"],
        "report": ["report", run],
        "ray": ["run", *small, "engine=ray", absent],
        "flower": ["run", *small, "engine=flower", absent],
        "seeds": ["run", *small, "engine=ray", "seeds=[0,1]", absent],
        "check_ray": ["check", *small, "engine=ray"],
        "lottery": ["lottery", "configs/lottery_quick.yaml", absent],
        "compare": ["compare", run, run],
        "overlap": ["tickets", "overlap", run],
        "export": ["tickets", "export", run, "0", "--to", "compact"],
        "onnx": ["tickets", "export", run, "0", "--to", "onnx"],
    }
    given = json.dumps([EXTRAS, commands, run])
    done = subprocess.run([sys.executable, "-c", SCRIPT, given], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert not (folder / "absent").exists(), "an error must come before anything is written"
    assert json.loads((folder / "run" / "header.json").read_text())["finished"]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_device_needs_no_extra(answers: dict[str, Any]) -> None:
    assert answers["predicted"] == [2, 10]
    assert answers["client_app"] == "ClientApp"
    assert answers["loaded"] == []


@pytest.mark.parametrize("name", ["check", "run", "bytes", "ls", "probes", "export"])
def test_commands_that_the_core_has(answers: dict[str, Any], name: str) -> None:
    code, out, err = answers[name]
    assert code == 0 and out and "Traceback" not in err


def test_a_run_is_complete_and_says_what_its_report_needs(answers: dict[str, Any]) -> None:
    last = answers["run"][1].splitlines()[-1]
    assert last.startswith("done: ") and INSTALL in last and "fedlth report" in last


@pytest.mark.parametrize("name", ["ray", "flower", "seeds", "check_ray", "lottery", "compare", "overlap", "report"])
def test_what_needs_an_extra_says_so_in_one_line(answers: dict[str, Any], name: str) -> None:
    code, out, err = answers[name]
    assert (code, out) == (2, "")
    assert err.startswith("fedlth: ") and err.count("\n") == 1 and INSTALL in err


def test_onnx_names_its_own_extra_and_leaves_nothing(answers: dict[str, Any]) -> None:
    code, out, err = answers["onnx"]
    assert (code, out) == (2, "") and err.count("\n") == 1 and "pip install 'fedlth[onnx]'" in err
    assert "fedlth's kernel, which skips them, was not measured: the fast kernel needs numba" in answers["export"][1]


def test_the_core_is_what_every_start_imports() -> None:
    """What a file imports at its top is a dependency of the core, but in files of Ray, kernel, certificates, gate."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    core = {re.split(r"[^\w-]", line)[0] for line in project["dependencies"]}
    assert core == {"torch", "numpy", "flwr", "pyyaml", "pydantic", "safetensors", "pcodec", "httpx"}
    known = (core - {"pyyaml"}) | {"yaml", "fedlth"} | set(sys.stdlib_module_names)
    for path in PACKAGE.rglob("*.py"):
        late = {"ray"} if path.name == "ray_cluster.py" else {"numba", "llvmlite"} if "kernel" in path.parts else set()
        late |= {"cryptography"} if path.match("deploy/certificates.py") else set()
        late |= {"uvicorn"} if path.match("deploy/gate*.py") else set()  # flwr's own dependency
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert {name.partition(".")[0] for name in names} <= known | late, path
