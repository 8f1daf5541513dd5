"""Install the peers, each in an environment of its own: python benchmarks/peers/install.py FOLDER [NAME ...].

benchmarks/rounds.py --peers FOLDER then runs those that are there. What does not install is said, with pip's words.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

TORCH = ["torch==2.13.0", "numpy<2.5", "setuptools<81"]
# Without their own requirements where those would bring another torch; what they import is named.
PEERS: dict[str, list[list[str]]] = {
    "flower": [TORCH, ["flwr[simulation]==1.41.0"]],
    "blazefl": [TORCH, ["--no-deps", "blazefl==3.0.0"], ["tqdm"]],
    "fluke": [TORCH, ["fluke-fl==0.8.1"]],
    "fedlab": [TORCH, ["--no-deps", "fedlab==1.3.0"], ["scikit-learn", "pandas", "pynvml", "tqdm", "torchvision"]],
    "pfl": [TORCH, ["--no-deps", "pfl==0.6.0"], ["multiprocess", "scipy", "prv_accountant"]],
}


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:] or list(PEERS)
    for name in names:
        place = folder / name
        if not (place / "bin" / "python").exists():
            venv.create(place, with_pip=True)
        for wanted in PEERS[name]:
            command = [str(place / "bin" / "pip"), "install", "-q", "--disable-pip-version-check", *wanted]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                said = (done.stderr.strip().splitlines() or ["no words"])[-1]
                print(f"{name}: pip install {' '.join(wanted)} failed: {said}", flush=True)
                break
        else:
            (place / "ready").touch()
            print(f"{name}: installed", flush=True)


if __name__ == "__main__":
    main()
