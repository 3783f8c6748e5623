"""Packed hierarchies: the texts of both forms, and bytes that are refused; see also test_properties.py."""

import bz2
import json

import pytest
from helpers.tiny_models import THREE_PETS

from hierarchy import Hierarchy, archive


def texts(packed):
    """Return the unpacked texts."""
    found = []
    while packed:
        stream = bz2.BZ2Decompressor()
        found.append(stream.decompress(packed).decode())
        packed = stream.unused_data
    return found


def test_names_are_packed_as_starts_and_last_words():
    names = ["red_fox", "red_panda", "red_panda_bear", "fox", ""]
    record = Hierarchy(names, ("a",), [0] * 5, "mine").to_dict()
    packed = archive.pack_hierarchy(record)
    rest, starts, last_words = texts(packed)
    assert json.loads(rest) == {"name": "mine", "superclasses": ["a"], "parents": [0] * 5, "numbered": False}
    assert starts.split("\n") == ["0red_", "1", "1panda_", "0", "0"]
    assert last_words.split("\n") == ["xof", "adnap", "raeb", "xof", ""]
    assert archive.unpack_hierarchy(packed) == record


def test_labels_at_the_start_of_all_names_are_left_out():
    names = ["00000_Vulpes_lagopus", "00001_Vulpes_vulpes"]
    packed = archive.pack_hierarchy(Hierarchy(names, ("a",), [0, 0]).to_dict())
    assert texts(packed)[1:] == ["0Vulpes_\n1", "supogal\nsepluv"]
    assert archive.unpack_hierarchy(packed)["classes"] == names


@pytest.mark.parametrize("h", [Hierarchy.load("inat2021"), Hierarchy(("a\nb", "c"), ("d",), [0, 0])])
def test_without_names_or_with_line_breaks_the_record_is_one_text(h):
    packed = archive.pack_hierarchy(h.to_dict())
    assert [json.loads(text) for text in texts(packed)] == [h.to_dict()] == [archive.unpack_hierarchy(packed)]


PACKED = archive.pack_hierarchy(THREE_PETS.to_dict())


@pytest.mark.parametrize(
    "packed, words",
    [
        (b"", "a text is cut off"),
        (b"no bz2", "Invalid data stream"),
        (PACKED[:-1], "a text is cut off"),
        (PACKED * 2, "more than 3 texts"),
        (bz2.compress(b"{"), "Expecting property name"),
        (bz2.compress(b"{}") * 2, "unpack"),
        (bz2.compress(bytes(archive.LARGEST + 1)), "longer than"),
        (b"".join(map(bz2.compress, (b'{"numbered": false}', b"0\n0", b"a"))), "zip"),
        (b"".join(map(bz2.compress, (b'{"numbered": false}', b"x", b"a"))), "invalid literal"),
        (b"".join(map(bz2.compress, (b'{"numbered": false}', b"0\n" * archive.MOST_NAMES, b"a"))), "more than"),
    ],
)
def test_other_bytes_are_refused(packed, words):
    with pytest.raises(ValueError, match=rf"The packed hierarchy is damaged \(.*{words}.*\), expected .*\.$"):
        archive.unpack_hierarchy(packed)
