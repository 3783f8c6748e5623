"""A hierarchy's record in few bytes, so that 10,000 species names do not outweigh what an adapter is about.

Sorted names of a taxonomy share their beginnings with the name before, and species share their endings: the names are
cut at underscores, the words shared with the name before are counted instead of written, and the last words stand in a
text of their own, backwards. iNaturalist's 10,000 names take 60 kB of the 814 kB they take in JSON.
"""

import bz2
import json
from itertools import takewhile

LARGEST = 1 << 23  # bytes of a text when unpacked, and of all names: a file cannot ask for much more memory than this
MOST_NAMES, TEXTS = 1 << 20, 3
MOST_SHARED = 9  # a count is one digit
NAMES = "utf-8", "surrogatepass"  # a name of a folder may be no UTF-8: Python has surrogates for such bytes


def pack_hierarchy(record):
    """`Hierarchy.to_dict()` -> bytes."""
    names = record.get("classes") or []
    if not names or any("\n" in name for name in names):
        return compressed(record)
    numbered = all(name.startswith(f"{i:05d}_") for i, name in enumerate(names))
    starts, endings, before = [], [], []
    for name in names:
        *words, last = (name[6:] if numbered else name).split("_")
        pairs = zip(words[:MOST_SHARED], before)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        starts.append(str(shared) + "".join(word + "_" for word in words[shared:]))
        endings.append(last[::-1])
        before = words
    rest = {key: value for key, value in record.items() if key != "classes"} | {"numbered": numbered}
    return compressed(rest) + b"".join(bz2.compress("\n".join(text).encode(*NAMES)) for text in (starts, endings))


def compressed(record):
    return bz2.compress(json.dumps(record, separators=(",", ":")).encode())


def unpack_hierarchy(packed):
    """The inverse of `pack`; ValueError where the bytes are something else."""
    try:
        texts = list(unpacked_texts(packed))
        record = json.loads(texts[0])
        if len(texts) == 1:
            return record
        numbered, starts, endings = record.pop("numbered"), texts[1].split("\n"), texts[2].split("\n")
        names, before, size = [], [], 0
        if len(starts) > MOST_NAMES:
            raise ValueError(f"{len(starts)} names")
        for i, (start, ending) in enumerate(zip(starts, endings, strict=True)):
            before = before[: int(start[0])] + start[1:].split("_")[:-1]
            names.append("_".join([f"{i:05d}"] * numbered + before + [ending[::-1]]))
            size += len(names[-1])
            if size > LARGEST:
                raise ValueError(f"names of more than {LARGEST} bytes")
        return record | {"classes": names}
    except (OSError, EOFError, LookupError, AttributeError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"The packed hierarchy is damaged ({error}), expected what train.py writes.") from None


def unpacked_texts(packed):
    for _ in range(TEXTS):
        stream = bz2.BZ2Decompressor()
        text = stream.decompress(packed, LARGEST)
        if not stream.eof:
            raise ValueError(f"a text is cut or longer than {LARGEST} bytes")
        yield text.decode(*NAMES)
        packed = stream.unused_data
        if not packed:
            return
    raise ValueError(f"more than {TEXTS} texts")
