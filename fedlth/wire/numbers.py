"""A run of numbers as one pcodec stream, read back into an array that the receiver sized."""

from __future__ import annotations

import numpy as np

from fedlth.wire.errors import PayloadError

LEVEL = 8


def compress(values: np.ndarray) -> bytes:
    """Return one standalone pcodec stream of a 1-D array (float32, float16, int32 or uint16); empty for no values."""
    from pcodec import ChunkConfig, standalone

    if not values.size:
        return b""
    return bytes(standalone.simple_compress(np.ascontiguousarray(values), ChunkConfig(compression_level=LEVEL)))


def decompress(data: bytes | memoryview, count: int, dtype: type[np.generic]) -> np.ndarray:
    """Return exactly `count` numbers; raise PayloadError at any other stream, and at bytes after its end."""
    out, data = np.zeros(count, dtype), bytes(data)
    if not count:
        if data:
            raise PayloadError("values where none belong")
        return out
    finished, filled = _into(data, out)
    if not finished or filled != count:
        raise PayloadError(f"a stream of {filled} values, wanted {count}")
    # pcodec reads up to its end mark and ignores what follows: a stream that also ends without its last byte is padded.
    data = data[:-1]  # in place of the whole, which is needed no more
    try:
        padded, _ = _into(data, np.zeros(count, dtype))
    except PayloadError:
        padded = False
    if padded:
        raise PayloadError("bytes after the end of the values")
    return out


def _into(data: bytes, out: np.ndarray) -> tuple[bool, int]:
    from pcodec import standalone

    try:
        done = standalone.simple_decompress_into(data, out)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic inside the library is not an Exception
        raise PayloadError(f"values cannot be read: {error}") from error
    return bool(done.finished), int(done.n_processed)
