"""What a run's start must not load: seconds that every run would pay before its first client step."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMOKE = ["run", "configs/smoke.yaml", "engine=inprocess", "workers=1", "wire=raw"]


def loaded(command: list[str], folder: Path, stop: str, *, then: str) -> set[str]:
    """Return the modules that are there when a run reaches its first call of `stop`, a `package.module:function`.

    `then` is code to run there, so that one process serves two questions.
    """
    module, _, name = stop.partition(":")
    code = (
        "import sys, importlib\n"
        "from fedlth import cli\n"
        "with cli.commands.importing():\n"
        "    from fedlth import api\n"
        "def stop(*args, **more):\n"
        "    print(*sys.modules)\n"
        f"    exec({then!r})\n"
        "    raise SystemExit(0)\n"
        f"importlib.import_module({module!r}).{name} = stop\n"
        f"cli.main({[*command, f'out={folder}/run']!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=os.environ)
    assert done.returncode == 0 and done.stdout, done.stderr
    return set(done.stdout.split())


def test_neither_plain_torch_nor_counting_flops_loads_a_compiler(tmp_path: Path) -> None:
    flops = (
        "import torch; from fedlth.models.flops import layer_flops\n"
        "layer_flops(torch.nn.Linear(2, 2), torch.zeros(1, 2))\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    found = loaded([*SMOKE, "compute=reference"], tmp_path, "fedlth.training.torch_backend:train", then=flops)
    assert not found & {"numba", "scipy", "torch._dynamo", "torch._inductor", "matplotlib", "ray", "flwr"}


def test_the_kernel_is_loaded_without_scipy_and_numba_finds_it_afterwards(tmp_path: Path) -> None:
    pytest.importorskip("numba")
    dot = "import numpy, numba; x = numpy.eye(3); assert (numba.njit(lambda a: numpy.dot(a, a))(x) == x).all()"
    found = loaded([*SMOKE, "compute=sparse"], tmp_path, "fedlth.training.kernel_backend:train", then=dot)
    assert "numba.np.arraymath" in found
    assert not found & {"scipy.linalg", "torch._dynamo", "torch._inductor", "matplotlib", "ray", "flwr"}
