"""Install the peers, each in an environment of its own: python3.11 benchmarks/peers/install.py FOLDER [NAME ...].

benchmarks/rounds.py --peers FOLDER then runs those that are there. What does not install is said, with pip's words.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

# One torch for all, also where a peer's own requirements would bring another.
FIXED = ["torch==2.13.0", "torchvision==0.28.0", "numpy<2.5", "setuptools<81"]
TORCH = ["torch", "numpy", "setuptools"]
PEERS: dict[str, list[list[str]]] = {
    "flower": [TORCH, ["flwr[simulation]==1.41.0"]],
    "blazefl": [TORCH, ["--no-deps", "--ignore-requires-python", "blazefl==3.0.0"], ["tqdm"]],
    "fluke": [TORCH, ["fluke-fl==0.8.1"]],
    "fedlab": [TORCH, ["fedlab==1.3.0"]],
    "pfl": [TORCH, ["pfl==0.6.0"]],
}
# BlazeFL 3.0.0 is written for Python 3.14: two signatures and two annotations are all that 3.11 does not read.
FOR_3_11 = {
    "core/utils.py": [
        ("import torch\n", 'import torch\nfrom typing import TypeVar\n\nT = TypeVar("T")\n'),
        ("process_tensors_in_object[T](", "process_tensors_in_object("),
        ("reconstruct_from_shared_memory[T](", "reconstruct_from_shared_memory("),
    ],
    "reproducibility/snapshot.py": [("import os\n", "from __future__ import annotations\n\nimport os\n")],
}


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:] or list(PEERS)
    folder.mkdir(parents=True, exist_ok=True)
    fixed = folder / "constraints.txt"
    fixed.write_text("\n".join(FIXED) + "\n")
    for name in names:
        place = folder / name
        (place / "ready").unlink(missing_ok=True)
        if not (place / "bin" / "python").exists():
            venv.create(place, with_pip=True)
        for wanted in PEERS[name]:
            command = [str(place / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
            done = subprocess.run([*command, "-c", str(fixed), *wanted], capture_output=True, text=True)
            if done.returncode:
                said = (done.stderr.strip().splitlines() or ["no words"])[-1]
                print(f"{name}: pip install {' '.join(wanted)} failed: {said}", flush=True)
                break
        else:
            if name == "blazefl" and sys.version_info < (3, 14):
                rewrite(next(place.glob("lib/*/site-packages/blazefl")))
            (place / "ready").touch()
            print(f"{name}: installed", flush=True)


def rewrite(package: Path) -> None:
    """Make BlazeFL importable before Python 3.14; what runs stays as it is."""
    for file, changes in FOR_3_11.items():
        text = (package / file).read_text()
        if changes[0][1] not in text:
            for old, new in changes:
                text = text.replace(old, new, 1)
            (package / file).write_text(text)


if __name__ == "__main__":
    main()
