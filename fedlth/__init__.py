"""Federated personalised lottery tickets: one study file in, a leaderboard with true bytes out.

The names below are the public face, imported when they are first used; everything else may change.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fedlth.version import VERSION

if TYPE_CHECKING:
    from fedlth.api import check, load, load_small, load_ticket, resume, run, save_small
    from fedlth.data.dataset import Dataset
    from fedlth.errors import StudyError
    from fedlth.methods.aggregate import Contribution
    from fedlth.methods.client_update import MaskedUpdate, Update
    from fedlth.methods.method import FederatedMethod, Phase
    from fedlth.storage.server_state import ServerState
    from fedlth.study.schema import Study
    from fedlth.tickets.evidence import Evidence

__version__ = VERSION

_HOMES = {
    "check": "api", "load": "api", "load_small": "api", "load_ticket": "api", "resume": "api", "run": "api",
    "save_small": "api",
    "Study": "study.schema", "StudyError": "errors", "Dataset": "data.dataset", "Evidence": "tickets.evidence",
    "FederatedMethod": "methods.method", "Phase": "methods.method", "MaskedUpdate": "methods.client_update",
    "Update": "methods.client_update", "Contribution": "methods.aggregate", "ServerState": "storage.server_state",
}  # fmt: skip

__all__ = [
    "Contribution", "Dataset", "Evidence", "FederatedMethod", "MaskedUpdate", "Phase", "ServerState", "Study",
    "StudyError", "Update", "__version__", "check", "load", "load_small", "load_ticket", "resume", "run", "save_small",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fedlth' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fedlth.{_HOMES[name]}"), name)
