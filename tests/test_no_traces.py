"""What a run leaves behind names no machine, no user, and nothing of the environment."""

from __future__ import annotations

import getpass
import platform
import socket
from pathlib import Path

import pytest

from fedlth import cli
from fedlth.study.yaml_text import text_of
from tests import tiny

CANARY = "s3cret-3f1c9a"


def test_a_run_folder_tells_nothing_of_where_it_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in what is packed as bytes; worker processes, too, are told apart without a machine's name."""
    home = tmp_path / "home-of-somebody"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    monkeypatch.setenv("FEDLTH_MASK_SECRET", CANARY)
    monkeypatch.setattr(socket, "gethostname", lambda: "a-host-of-ours")
    monkeypatch.setattr(platform, "node", lambda: "a-host-of-ours")
    study = tmp_path / "study.yaml"
    study.write_text(text_of(tiny.tree(workers=2)))
    out = tmp_path / "run"
    assert cli.main(["run", str(study), f"out={out}"]) == 0
    names = [CANARY, str(home), "a-host-of-ours", f"/{getpass.getuser()}/"]
    files = [file for file in out.rglob("*") if file.is_file()]
    assert len(files) > 10
    found = [
        (name, str(file.relative_to(out))) for file in files for name in names if name.encode() in file.read_bytes()
    ]
    assert not found
