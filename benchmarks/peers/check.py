"""Show that each peer learns and how much it trains: python benchmarks/peers/check.py FOLDER [NAME ...] --work W2.

After each round of the peer alone: its client steps, loss and accuracy of its global model on images of all classes.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).parents[1]
sys.path.insert(0, str(HERE))
from yardsticks.child import Gone, child

WORKS = {"W1": ("leaf_cnn", 1), "W2": ("lenet5", 5)}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path, help="folder of benchmarks/peers/install.py")
    options.add_argument("names", nargs="*")
    options.add_argument("--work", default="W2", choices=WORKS)
    options.add_argument("--rounds", type=int, default=10)
    options.add_argument("--data", help="folder of the Fashion-MNIST idx files; the system's own by default")
    args = options.parse_args()
    model, epochs = WORKS[args.work]
    work = {"model": model, "epochs": epochs, "examples": 599, "clients": 10, "data": args.data, "check": True}
    for script in sorted((HERE / "peers").glob("*_.py")):
        name = script.stem.removesuffix("_")
        python = args.folder / name / "bin" / "python"
        if args.names and name not in args.names or not python.exists():
            continue
        try:
            one = child(name, f"peers/{script.name}", work, python=python)
        except Gone as error:
            print(error, flush=True)
            continue
        try:
            for number in range(args.rounds):
                told = one.round()
                learnt = f"loss {told['loss']:.3f}, accuracy {told['accuracy']:.3f}"
                took = f"{told['wall']:.2f} s, {one.cpus[-1]:.2f} CPU s"
                print(f"{name} round {number + 1}: {told['steps']} client steps, {learnt}, {took}", flush=True)
        except Gone as error:
            print(error, flush=True)
        finally:
            one.end()


if __name__ == "__main__":
    main()
