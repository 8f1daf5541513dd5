"""A run in a process of its own, to be killed: `python -m tests.faults.driver OUT SECTIONS_JSON`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fedlth.engines.inprocess import InProcess
from fedlth.federation import session
from tests import tiny


def main(out: Path, sections: str) -> None:
    if (out / "config.yaml").exists():
        session.resume(out, InProcess(), print)
    else:
        tiny.run(tiny.study(**json.loads(sections)), out, engine=InProcess(), tell=print)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
