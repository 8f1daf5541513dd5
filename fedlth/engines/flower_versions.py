"""Versions at the roll call: the server says what it has; a device of others says so before it is asked to train."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

from fedlth.engines.flower_record import BODY, SPEAKS, View, plain_line

VERSIONS, REMARK = "versions", "remark"  # records: of the question, and beside the answer
MUST = ("fedlth", "flwr")  # fedlth's goes with the wire format's: nothing of another is read
MAY = ("python", "torch", "numpy")  # these can change a result's last bits


@cache
def here() -> Mapping[str, str]:
    """Return the versions of this end; what builds add to a number ("+cpu") does not count."""
    found = {"fedlth": SPEAKS, "python": f"{sys.version_info[0]}.{sys.version_info[1]}"}
    for name in ("flwr", "torch", "numpy"):
        try:
            found[name] = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def asked() -> dict[str, str | bytes]:
    """Return the record of a question that says what the server has."""
    return {BODY: json.dumps(here(), sort_keys=True)}


def compared(question: View) -> tuple[str, str]:
    """Return why this device cannot take part in a server's run, and what may differ if it does; "" for nothing."""
    try:
        theirs: Any = json.loads(str(question.get(VERSIONS, {}).get(BODY)))
        said = {name: plain_line(str(theirs.get(name, "an earlier one")), 40) for name in (*MUST, *MAY)}
    except (AttributeError, ValueError, RecursionError):
        said = dict.fromkeys(MUST, "an earlier one")
    apart = [name for name in said if said[name] != here()[name]]

    def told(names: tuple[str, ...]) -> str:
        return ", ".join(f"{name} {here()[name]} (the server: {said[name]})" for name in names if name in apart)

    return told(MUST), told(MAY)
