"""Compress the record of a hierarchy for a file of weights.

A packed record is one or three texts, each compressed with bz2. One text is the complete record as JSON. Three texts are
the record as JSON without "classes", but with "numbered", then the starts of the class names, then their last words:

    name                            start             last word, backwards
    00006_Canidae_Vulpes_lagopus    0Canidae_Vulpes_  supogal
    00007_Canidae_Vulpes_vulpes     2                 sepluv

A start is the number of leading words that are those of the name before, followed by the other words. If all names begin
with their labels, "numbered" is true and the labels are left out.

The 10,000 names of iNaturalist take 824 kB as JSON, 91 kB compressed with bz2 and 87 kB with lzma. In three texts they take
60 kB with bz2 and 64 kB with lzma; an adapter of at most 48.7 MB has room for 61 kB.
"""

import bz2
import json
from collections.abc import Iterator
from itertools import takewhile

from runtime.text import one_line

LARGEST = 1 << 23  # bytes of an unpacked text, and characters of all names: bounds the memory that a file can take
MOST_NAMES, MOST_TEXTS = 1 << 20, 3
MOST_SHARED = 9  # the number of shared words is one digit
ENCODING = "utf-8", "surrogatepass"  # Python has surrogates for a folder's name that is not UTF-8


# ---- packing -------------------------------------------------------------------------------------


def pack_hierarchy(record: dict) -> bytes:
    """Compress a record of `Hierarchy.to_dict`; equal records give equal bytes."""
    names = record.get("classes") or []
    if not names or any("\n" in name for name in names):
        return pack_json(record)
    numbered = all(name.startswith(f"{label:05d}_") for label, name in enumerate(names))
    starts, last_words, before = [], [], []
    for name in names:
        *words, last = (name[6:] if numbered else name).split("_")
        shared = count_shared(words, before)
        starts.append(str(shared) + "".join(word + "_" for word in words[shared:]))
        last_words.append(last[::-1])
        before = words
    rest = {key: value for key, value in record.items() if key != "classes"} | {"numbered": numbered}
    return pack_json(rest) + b"".join(
        bz2.compress("\n".join(lines).encode(*ENCODING)) for lines in (starts, last_words)
    )


def count_shared(words: list[str], before: list[str]) -> int:
    pairs = zip(words[:MOST_SHARED], before)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def pack_json(record: dict) -> bytes:
    return bz2.compress(json.dumps(record, separators=(",", ":")).encode())


# ---- unpacking -----------------------------------------------------------------------------------


def unpack_hierarchy(packed: bytes) -> dict:
    """Return the record that `pack_hierarchy` compressed.

    Raises ValueError if the bytes are anything else, or unpack to more than LARGEST bytes or MOST_NAMES names.
    """
    try:
        texts = list(unpacked_texts(packed))
        record = json.loads(texts[0])
        if len(texts) > 1:
            _, starts, last_words = texts
            record["classes"] = list(unpacked_names(starts, last_words, record.pop("numbered")))
        return record
    except (OSError, EOFError, LookupError, AttributeError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"The packed hierarchy is damaged ({one_line(error)}), expected one that train.py wrote."
        ) from None


def unpacked_texts(packed: bytes) -> Iterator[str]:
    for _ in range(MOST_TEXTS):
        stream = bz2.BZ2Decompressor()
        text = stream.decompress(packed, LARGEST)
        if not stream.eof:
            raise ValueError(f"a text is cut off or longer than {LARGEST} bytes")
        yield text.decode(*ENCODING)
        packed = stream.unused_data
        if not packed:
            return
    raise ValueError(f"more than {MOST_TEXTS} texts")


def unpacked_names(starts: str, last_words: str, numbered: bool) -> Iterator[str]:
    words, size = [], 0
    if starts.count("\n") >= MOST_NAMES:
        raise ValueError(f"more than {MOST_NAMES} names")
    for label, (start, last) in enumerate(zip(starts.split("\n"), last_words.split("\n"), strict=True)):
        words = words[: int(start[0])] + start[1:].split("_")[:-1]
        name = "_".join([f"{label:05d}"] * numbered + words + [last[::-1]])
        size += len(name)
        if size > LARGEST:
            raise ValueError(f"names of more than {LARGEST} characters")
        yield name
