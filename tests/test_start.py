"""What a run's start must not load: seconds that every run would pay before its first client step."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMOKE = ["run", "configs/smoke.yaml", "engine=inprocess", "workers=1", "wire=raw"]


def loaded(command: list[str], folder: Path, stop: str) -> set[str]:
    """Return the modules that are there when a run reaches its first call of `stop`, a `package.module:function`."""
    module, _, name = stop.partition(":")
    code = (
        "import sys, importlib\n"
        "from fedlth import cli\n"
        "with cli.importing():\n"
        "    from fedlth import api\n"
        "def stop(*args, **more):\n"
        "    print(*sys.modules)\n"
        "    raise SystemExit(0)\n"
        f"importlib.import_module({module!r}).{name} = stop\n"
        f"cli.main({[*command, f'out={folder}/run']!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=os.environ)
    assert done.returncode == 0 and done.stdout, done.stderr
    return set(done.stdout.split())


def test_plain_torch_loads_no_compiler(tmp_path: Path) -> None:
    found = loaded([*SMOKE, "compute=reference"], tmp_path, "fedlth.training.torch_backend:train")
    assert not found & {"numba", "scipy", "torch._dynamo", "torch._inductor", "matplotlib", "ray", "flwr"}


def test_the_kernel_is_loaded_without_scipy(tmp_path: Path) -> None:
    pytest.importorskip("numba")
    found = loaded([*SMOKE, "compute=sparse"], tmp_path, "fedlth.training.kernel_backend:train")
    assert "numba.np.arraymath" in found
    assert not found & {"scipy.linalg", "torch._dynamo", "torch._inductor", "matplotlib", "ray", "flwr"}


def test_numba_still_finds_scipy_afterwards() -> None:
    pytest.importorskip("numba")
    code = (
        "import numpy as np\n"
        "from fedlth.kernel.late_jit import load_numba\n"
        "load_numba()\n"
        "from numba import njit\n"
        "x = np.eye(3)\n"
        "assert (njit(lambda a: np.dot(a, a))(x) == x).all()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
