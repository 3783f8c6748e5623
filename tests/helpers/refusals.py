"""Assert that a program refuses a user's mistake in one sentence; write PNGs of kinds that Pillow does not write."""

import re
import struct
import zlib

ROW = "R9", "bad input: one line on stderr, exit code 2, no traceback, nothing changed on disk"
ODD = "R9", "unusual input that is accepted: as described"


def refused(result, *words):
    """Assert exit code 2 and on stderr one sentence with the words, in their order, or that and a progress bar above it."""
    *above, line, end = result.err.split("\n")
    assert result.code == 2 and not end and all("%|" in bar for bar in above), result.err
    assert re.fullmatch(r"\w+\.py: .+\.", line.split("\r")[-1]), result.err
    assert re.search(".*".join(map(re.escape, words)), line), (words, line)


def write_png(path, width, height, depth, rows=None):
    """Return a black PNG of 1 bit per pixel, or one of 16 bits with `rows`, big-endian RGB (height, width, 3)."""
    squeeze, line = zlib.compressobj(), bytes(1 + width * depth // 8)
    data = [squeeze.compress(line if rows is None else b"\0" + rows[i].tobytes()) for i in range(height)]
    head = struct.pack(">IIBBBBB", width, height, depth, 0 if rows is None else 2, 0, 0, 0)
    chunks = (b"IHDR", head), (b"IDAT", b"".join(data) + squeeze.flush()), (b"IEND", b"")
    parts = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
