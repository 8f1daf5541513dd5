"""Read the pickles of the CIFAR python layout without running what they name."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from fedlth.data.factory import told
from fedlth.errors import StudyError


def _latin1(text: object, encoding: object = "latin1") -> bytes:
    """Stand in for `_codecs.encode`, with which protocol 2 spells bytes; no other codec is admitted."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("bytes must be spelt in latin1")
    return text.encode("latin1")


# Taken from values, since their home moved: numpy 1 has and writes numpy.core, numpy 2 numpy._core.
_reconstruct = np.empty(0).__reduce__()[0]
_scalar = np.float64(0).__reduce__()[0]

ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("_codecs", "encode"): _latin1,
}


class _ArraysOnly(pickle.Unpickler):
    """Admit numpy arrays and the builtin containers, which need no name; refuse every other name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ADMITTED:
            raise pickle.UnpicklingError(f"the name {module}.{name} is not admitted")
        return ADMITTED[module, name]

    def persistent_load(self, pid: object) -> Any:
        raise pickle.UnpicklingError("persistent references are not admitted")


def read_pickle(path: Path) -> Any:
    """Return the containers and arrays of one pickle file; raise StudyError at anything else.

    Protocol-2 files of Python 2 hold byte strings; `encoding="bytes"` keeps them bytes.
    """
    try:
        with path.open("rb") as file:
            return _ArraysOnly(file, encoding="bytes").load()
    except Exception as error:  # a damaged pickle can raise nearly anything; it must end in one clear line
        raise StudyError(f"{path}: must be a pickle of plain arrays, got {told(error)}") from error
