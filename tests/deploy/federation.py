"""A federation's folder of three devices for the tests of fedlth deploy, made once, and a copy for each test."""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml

from fedlth.deploy import make
from fedlth.deploy.folder import Folder
from tests import tiny

DEVICES = 3
HOST = "192.0.2.7"  # an address of no machine (RFC 5737)


def made(root: Path, *, port: int = 8443, hosts: tuple[str, ...] = (HOST, "fed.example.org")) -> Folder:
    """Write a federation of three devices that run the tiny study."""
    path = root.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(tiny.tree(clients={"count": DEVICES, "unseen": 0.0})))
    return make.init(root, path, ["seed=3"], devices=DEVICES, hosts=hosts, port=port)


def copied(folder: Folder, to: Path) -> Folder:
    """Copy a federation, the one path in its Flower config that names its place too."""
    shutil.copytree(folder.root, to)
    other = Folder(to)
    config = other.flower_config.read_text()
    other.flower_config.write_text(config.replace(str(folder.root), str(to)))
    return other
