"""A run of numbers as one pcodec stream, read back into an array that the receiver sized."""

from __future__ import annotations

import numpy as np

from fedlth.wire.errors import PayloadError

LEVEL = 8
# Differences to a reference are most of an upload's time. Chunks that fit a core's cache save what a lower level loses:
# of the CNN's at density 0.5, 16.8 ms at level 8 in large chunks, 12.8 ms so; 0.266 and 0.269 of dense. A run that
# fits one chunk is fast enough.
DIFFERENCE_LEVEL, DIFFERENCE_CHUNK = 5, 1 << 15
CODES = {"int32": 3, "float32": 5, "uint16": 7, "float16": 9}  # how a stream names its numbers
NAMES = {"int32": "i32", "float32": "f32", "uint16": "u16", "float16": "f16"}  # how the library does
CHUNK, META = 1 << 14, 1 << 14


def compress(values: np.ndarray) -> bytes:
    """Return one standalone pcodec stream of a 1-D array (float32, float16, int32 or uint16); empty for no values."""
    from pcodec import ChunkConfig, standalone

    if not values.size:
        return b""
    return bytes(standalone.simple_compress(np.ascontiguousarray(values), ChunkConfig(compression_level=LEVEL)))


def compress_differences(values: np.ndarray) -> bytes:
    """The same of int32 that are noise around zero: the library need not try what else they could be."""
    from pcodec import ChunkConfig, DeltaSpec, ModeSpec, PagingSpec, standalone

    config = ChunkConfig(
        DIFFERENCE_LEVEL if values.size > DIFFERENCE_CHUNK else LEVEL,
        mode_spec=ModeSpec.classic(),
        delta_spec=DeltaSpec.no_op(),
        paging_spec=PagingSpec.equal_pages_up_to(DIFFERENCE_CHUNK),
    )
    return bytes(standalone.simple_compress(values, config))


def decompress(data: bytes | memoryview, count: int, dtype: type[np.generic]) -> np.ndarray:
    """Return exactly `count` numbers; raise PayloadError at any other stream, and at bytes after its end."""
    out = np.empty(count, dtype)
    if not count:
        if data:
            raise PayloadError("unexpected values")
        return out
    if _by_chunk(memoryview(data), out):
        return out
    data = bytes(data)
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


def _by_chunk(data: memoryview, out: np.ndarray) -> bool:
    """Fill `out` and say True where a stream of large chunks holds exactly it and ends with its last byte.

    Chunk by chunk the library tells how many bytes it has read. False means only that the slower way has to tell.
    """
    from pcodec import wrapped

    if bytes(data[:6]) != b"pco!\x03\x00" or len(data) < 16:
        return False
    hint = 1 + (data[6] & 63)
    at, filled, kind = 6 + (6 + hint + 7) // 8, 0, out.dtype.name
    if int.from_bytes(data[6:at], "little") >> (6 + hint):
        return False
    try:
        file, used = wrapped.FileDecompressor.new(bytes(data[at : at + META]))
        at += used
        while filled < out.size:
            size = 1 + int.from_bytes(data[at + 1 : at + 4], "little")
            if data[at] != CODES[kind] or size > out.size - filled or size < min(CHUNK, out.size - filled):
                return False
            chunk, used = file.chunk_decompressor(bytes(data[at + 4 : at + 4 + META]), NAMES[kind])
            at += 4 + used
            page = bytes(data[at : at + META + out.itemsize * size])
            done, used = chunk.read_page_into(page, size, out[filled : filled + size])
            if not done.finished or done.n_processed != size:
                return False
            at, filled = at + used, filled + size
        return bytes(data[at:]) == b"\0"
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
