"""Every variant of tiles gives the same bits; which one is compiled is measured once, kept, and may be forced."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("numba")
pytestmark = pytest.mark.timeout(1800)  # a variant that is new on a machine is compiled

from fedlth import cli  # noqa: E402
from fedlth.kernel import kernel, tile_choice  # noqa: E402
from fedlth.kernel.tile_variable import VARIABLE  # noqa: E402
from fedlth.kernel.tiles import VARIANTS  # noqa: E402
from fedlth.models.registry import build  # noqa: E402
from tests import tiny  # noqa: E402
from tests.kernel.nets import Residual, case, small  # noqa: E402
from tests.training.test_kept_layers import products  # noqa: E402

ROOT = Path(__file__).parents[2]


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder where answers are kept, and force no variant."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(tile_choice, "cache_folder", lambda: tmp_path)
    return tmp_path


def test_the_fastest_is_chosen_kept_and_not_measured_again(answers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for best in VARIANTS:
        monkeypatch.setattr(tile_choice, "measured", lambda best=best: {one: float(one != best) for one in VARIANTS})
        assert tile_choice._chosen() == best
        (file,) = answers.iterdir()
        assert file.read_text() == best
        monkeypatch.setattr(tile_choice, "measured", dict)
        assert tile_choice._chosen() == best
        file.write_text("another")  # of an older table
        with pytest.raises(ValueError, match="empty"):
            tile_choice._chosen()


def test_an_answer_is_of_this_source_and_these_versions(answers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {tile_choice._place()}
    monkeypatch.setattr(tile_choice, "source_stamp", lambda: 1)
    names.add(tile_choice._place())
    monkeypatch.setattr(tile_choice.numba, "__version__", "0")
    assert len({*names, tile_choice._place()}) == 3


def test_without_a_writable_place_it_is_measured(monkeypatch: pytest.MonkeyPatch, answers: Path) -> None:
    monkeypatch.setattr(tile_choice, "measured", lambda: dict.fromkeys(VARIANTS, 1.0))
    for folder in (None, answers / "none"):
        monkeypatch.setattr(tile_choice, "cache_folder", lambda folder=folder: folder)
        assert tile_choice._chosen() == next(iter(VARIANTS))


def test_the_environment_forces_a_variant(answers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIANTS:
        monkeypatch.setenv(VARIABLE, name)
        assert tile_choice._chosen() == name
    monkeypatch.setenv(VARIABLE, "huge")
    with pytest.raises(ValueError, match="FEDLTH_KERNEL_TILES must be one of narrow, wide or unset, got 'huge'"):
        tile_choice._chosen()
    assert not list(answers.iterdir())


@pytest.mark.parametrize("compute", ["sparse", "auto"])
@pytest.mark.parametrize("command", ["check", "run"])
def test_a_variant_that_does_not_exist_is_one_plain_line_before_anything_runs(
    command: str, compute: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "s.yaml", tmp_path / "r"
    file.write_text(yaml.safe_dump(tiny.tree(compute=compute)))
    monkeypatch.setenv(VARIABLE, "huge")
    assert cli.main([command, str(file), f"out={out}"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "FEDLTH_KERNEL_TILES must be one of narrow, wide or unset, got 'huge'" in said and not out.exists()
    assert "FEDLTH_KERNEL_TILES" in kernel.available()  # what a device answers a server that asks for the kernel


@pytest.mark.parametrize("name", VARIANTS)
def test_any_number_of_channels_and_values_is_covered(name: str) -> None:
    tiles = VARIANTS[name]
    for heights in ([h for h, _ in tiles.taps], [h for h, _ in tiles.line], [*tiles.pairs, 2, 1], [*tiles.spans]):
        assert heights == sorted(set(heights), reverse=True) and heights[-1] in (1, 16)
    assert all(width % 16 == 0 for _, width in (*tiles.taps, *tiles.line))
    assert all(count % 2 == 0 for count in tiles.pairs) and 16 <= tiles.features <= 32  # the scratch has room for 32


def bits() -> list[str]:
    """Return what trainings and products end with: any channels, strides, groups, both lanes, so every tile."""
    torch.manual_seed(0)
    cases = []
    for name, density in (("leaf_cnn", None), ("leaf_cnn", 0.1), ("lenet5", None), ("lenet5", 0.3)):
        module = build(name, num_classes=10, input_shape=(1, 28, 28), options={})
        cases.append(case(module, (1, 28, 28), examples=48, epochs=1, batch_size=32, density=density))
    cases += [case(Residual(), (1, 9, 9), density=density, momentum=0.9) for density in (None, 0.3)]
    for seed in range(12):
        module, shape = small(np.random.default_rng(seed))
        cases.append(case(module, shape, seed=seed, density=(None, 0.7, 0.3)[seed % 3], batch_size=16 << seed % 2))
    found = [products()]
    for one in cases:
        floats = one.kernel(debug=True).floats
        found += [floats.tobytes().hex(), kernel.predict(one.table, floats, one.x.numpy()).tobytes().hex()]
    return found


TOLD = """
import sys
import pytest
from fedlth.kernel import tile_choice
from tests.kernel import test_tiles
print(tile_choice.CHOSEN, *test_tiles.bits(), sep="\\n", flush=True)
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "tests/kernel/test_kernel.py", "tests/kernel/test_shrink.py"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in VARIANTS if name != tile_choice.CHOSEN])
def test_a_variant_that_is_not_chosen_here_gives_the_same_bits_and_is_as_near_to_float64_as_torch(name: str) -> None:
    """In one process, which compiles the variant: another would compile the parts of every function once more."""
    env = {**os.environ, VARIABLE: name, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", TOLD], env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    wanted = bits()
    there, *found = done.stdout.splitlines()[: 1 + len(wanted)]
    assert there == name and len(found) == 37 and found == wanted
