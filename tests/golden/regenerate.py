"""Write the golden files anew: `python -m tests.golden.regenerate [METHOD ...]`, from the repository's root.

A change that should not alter results leaves them as they are. One that should is committed together with them; the
commit says what moved and why.
"""

from __future__ import annotations

import json
import sys

from tests import tiny
from tests.golden.study import HERE, record


def main(names: list[str]) -> None:
    for name in names or tiny.METHODS:
        file = HERE / f"{name}.json"
        text = json.dumps(record(name), indent=1) + "\n"
        changed = not file.exists() or file.read_text() != text
        file.write_text(text)
        print(f"{file.name}: {'written' if changed else 'the same'}")


if __name__ == "__main__":
    main(sys.argv[1:])
