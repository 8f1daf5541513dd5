"""A ticket of single weights: what our kernel, which skips zeros, takes for it is measured beside the dense network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fedlth
from fedlth.export.kernel_time import kernel_pass
from fedlth.export.source import opened
from fedlth.kernel import kernel
from fedlth.models.call import call
from fedlth.report.export_text import exported
from tests import tiny


@pytest.mark.slow
def test_the_kernel_is_measured_on_the_same_batch(tmp_path: Path) -> None:
    if kernel.available():
        pytest.skip(kernel.available())
    study = tiny.study(finder={"densities": [0.2]}, personalise={"arms": ["ticket"], "epochs": 1})
    run = tiny.run(study, tmp_path / "r").root
    told = fedlth.export_ticket(run, 0, to="compact")
    assert told.kernel_ms is not None and told.kernel_ms > 0 and told.kernel_why == ""
    assert "zeros give no speed in dense kernels" in exported(told) and "of the ticket in torch" in exported(told)
    source = opened(run, 0)
    runs = kernel_pass(source, source.batches[0])
    assert not isinstance(runs, str)
    with torch.no_grad():
        wanted = call(source.module, source.batches[0])
    assert torch.allclose(torch.as_tensor(runs()), wanted, atol=1e-5)
    source.module.get_parameter("1.bias").data.add_(1)  # other values than the study's: still the module's
    assert not isinstance(kernel_pass(source, source.batches[0]), str)
