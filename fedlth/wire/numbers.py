"""A run of numbers as one pcodec stream, read back into an array that the receiver sized."""

from __future__ import annotations

import numpy as np

from fedlth.wire.errors import PayloadError

LEVEL = 8
CODES = {"int32": 3, "float32": 5, "uint16": 7, "float16": 9}  # how a stream names its numbers
NAMES = {"int32": "i32", "float32": "f32", "uint16": "u16", "float16": "f16"}  # how the library does
CHUNK, META = 1 << 16, 1 << 14


def compress(values: np.ndarray) -> bytes:
    """Return one standalone pcodec stream of a 1-D array (float32, float16, int32 or uint16); empty for no values."""
    from pcodec import ChunkConfig, standalone

    if not values.size:
        return b""
    return bytes(standalone.simple_compress(np.ascontiguousarray(values), ChunkConfig(compression_level=LEVEL)))


def compress_differences(values: np.ndarray) -> bytes:
    """The same of int32 that are noise around zero: the library need not try what else they could be.

    Unless all are multiples of 256, as between floats of few bits.
    """
    from pcodec import ChunkConfig, DeltaSpec, ModeSpec, standalone

    if not np.bitwise_or.reduce(values) & 255:
        return compress(values)
    config = ChunkConfig(LEVEL, mode_spec=ModeSpec.classic(), delta_spec=DeltaSpec.no_op())
    return bytes(standalone.simple_compress(values, config))


def decompress(data: bytes | memoryview, count: int, dtype: type[np.generic]) -> np.ndarray:
    """Return exactly `count` numbers; raise PayloadError at any other stream, and at bytes after its end."""
    out, data = np.empty(count, dtype), bytes(data)
    if not count:
        if data:
            raise PayloadError("values where none belong")
        return out
    if _by_chunk(data, out):
        return out
    finished, filled = _into(data, out)
    if not finished or filled != count:
        raise PayloadError(f"a stream of {filled} values, wanted {count}")
    # The library ignores what follows its end mark: a stream that also ends without its last byte is padded.
    data = data[:-1]  # in place of the whole, which is needed no more
    try:
        padded, _ = _into(data, np.zeros(count, dtype))
    except PayloadError:
        padded = False
    if padded:
        raise PayloadError("bytes after the end of the values")
    return out


def _by_chunk(data: bytes, out: np.ndarray) -> bool:
    """Fill `out` and say True where a stream of large chunks holds exactly it and ends with its last byte.

    Chunk by chunk the library tells how many bytes it has read. False means only that the slower way has to tell.
    """
    from pcodec import wrapped

    if data[:6] != b"pco!\x03\x00" or len(data) < 16:
        return False
    hint = 1 + (data[6] & 63)
    at, filled, kind = 6 + (6 + hint + 7) // 8, 0, out.dtype.name
    if int.from_bytes(data[6:at], "little") >> (6 + hint):
        return False
    try:
        file, used = wrapped.FileDecompressor.new(data[at : at + META])
        at += used
        while filled < out.size:
            size = 1 + int.from_bytes(data[at + 1 : at + 4], "little")
            if data[at] != CODES[kind] or size > out.size - filled or size < min(CHUNK, out.size - filled):
                return False
            chunk, used = file.chunk_decompressor(data[at + 4 : at + 4 + META], NAMES[kind])
            at += 4 + used
            done, used = chunk.read_page_into(data[at:], size, out[filled : filled + size])
            if not done.finished or done.n_processed != size:
                return False
            at, filled = at + used, filled + size
        return data[at:] == b"\0"
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # a panic inside the library is not an Exception
        return False


def _into(data: bytes, out: np.ndarray) -> tuple[bool, int]:
    from pcodec import standalone

    try:
        done = standalone.simple_decompress_into(data, out)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic inside the library is not an Exception
        raise PayloadError(f"values cannot be read: {error}") from error
    return bool(done.finished), int(done.n_processed)
