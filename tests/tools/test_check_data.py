"""tools.check_data: every kind of finding by name, exit codes, counts, and the layouts it reads."""

import io
import json
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dataset.images import ImageData
from hierarchy import Hierarchy
from tools import check_data

NOISE = np.random.default_rng(0)


def noise(width=24, height=20, channels=3):
    return Image.fromarray(NOISE.integers(0, 256, (height, width, channels), np.uint8).squeeze())


def deep_rgb(path):
    """Write a PNG with 16 bits per channel, which Pillow opens with 8."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + NOISE.bytes(16 * 6) for _ in range(16))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def bomb(path):
    noise().save(path, "PNG")
    content = path.read_bytes()
    head = b"IHDR" + struct.pack(">II", 20_000, 20_000) + content[24:29]
    path.write_bytes(content[:12] + head + struct.pack(">I", zlib.crc32(head)) + content[33:])


def half(kind, **options):
    def write(path):
        noise().save(path, kind, **options)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return write


def frames(kind):
    return lambda path: noise().save(path, kind, save_all=True, append_images=[noise(), noise()])


def saved(image, kind="PNG", **options):
    return lambda path: image.save(path, kind, **options)


def exif(orientation):
    tags = Image.Exif()
    tags[check_data.ORIENTATION] = orientation
    return tags


FILES = {  # name: (write it, findings)
    "good.jpg": (saved(noise(), "JPEG"), ()),
    "grey.jpg": (saved(noise(channels=1), "JPEG"), ()),
    "alpha.png": (saved(noise(channels=4)), ("transparent",)),
    "opaque.png": (saved(noise().convert("RGBA")), ()),
    "key.png": (saved(Image.new("RGB", (24, 20)), transparency=(0, 0, 0)), ("transparent",)),
    "see-through.png": (saved(noise().quantize(16), transparency=bytes(16)), ("palette", "transparent")),
    "turned.jpg": (saved(noise(), "JPEG", exif=exif(6)), ("rotated",)),
    "turned.png": (saved(noise(), exif=exif(3)), ("rotated",)),
    "turned.webp": (saved(noise(), "WEBP", exif=exif(2)), ("rotated",)),
    "turned.tif": (saved(noise(), "TIFF", exif=exif(6)), ()),  # Pillow turns it, for a training too
    "upright.jpg": (saved(noise(), "JPEG", exif=exif(1)), ()),
    "damaged-exif.jpg": (saved(noise(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"), ()),
    "camera.jpg": (frames("MPO"), ()),
    "empty.jpg": (lambda path: path.touch(), ("unreadable",)),
    "page.jpg": (lambda path: path.write_text("<!DOCTYPE html><html>403</html>"), ("unreadable",)),
    "bomb.png": (bomb, ("unreadable",)),
    "half.webp": (half("WEBP"), ("unreadable",)),
    "half.jpg": (half("JPEG"), ("truncated",)),
    "half-progressive.jpg": (half("JPEG", progressive=True), ("truncated",)),
    "half.png": (half("PNG"), ("truncated",)),
    "half-small.bmp": (lambda path: path.write_bytes(bmp(7)[:-30]), ("small", "truncated")),
    "small.png": (saved(noise(7, 30)), ("small",)),
    "cmyk.jpg": (saved(noise().convert("CMYK"), "JPEG"), ("cmyk",)),
    "cmyk.tif": (saved(noise().convert("CMYK"), "TIFF"), ("cmyk",)),
    "palette.png": (saved(noise().quantize(16)), ("palette",)),
    "deep.png": (saved(Image.fromarray(NOISE.integers(0, 2**16, (16, 16), np.uint16))), ("16-bit",)),
    "deep.tif": (saved(Image.fromarray(NOISE.integers(0, 2**16, (16, 16), np.uint16)), "TIFF"), ("16-bit",)),
    "deep-rgb.png": (deep_rgb, ("16-bit",)),
    "frames.png": (frames("PNG"), ("animated",)),
    "frames.webp": (frames("WEBP"), ("animated",)),
    "frames.gif": (frames("GIF"), ("animated", "palette")),
}


def bmp(width):
    row = (3 * width + 3) // 4 * 4
    head = struct.pack("<2sIIIIiiHHIIiiII", b"BM", 54 + 9 * row, 0, 54, 40, width, 9, 1, 24, 0, 9 * row, 0, 0, 0, 0)
    return head + bytes(9 * row)


def folder(root, files, superclass="cats", name="manx"):
    (root / superclass / name).mkdir(parents=True)
    for file in files:
        FILES[file][0](root / superclass / name / file)
    return root


def run(command, root, *flags):
    result = command(check_data.main, root, "--image-size", 8, "--num-workers", 2, "--json", root / "out.json", *flags)
    found = json.loads((root / "out.json").read_text()) if (root / "out.json").exists() else None
    return result, found


def test_every_kind_is_found_by_name(command, tmp_path):
    result, found = run(command, folder(tmp_path, FILES))
    for kind, names in found["findings"].items():
        assert set(names) == {f"cats/manx/{name}" for name, (_, kinds) in FILES.items() if kind in kinds}, kind
    assert result.code == 3 and f"{len(FILES)}/{len(FILES)}" in result.err  # the bar
    assert (
        "4 unreadable (not an image, or damaged: the next image of its class is shown): 'cats/manx/bomb.png'"
        in result.out
    )
    assert found["findings"]["small"]["cats/manx/small.png"] == "7 x 30"


@pytest.mark.parametrize("name", FILES)
def test_the_exit_code_depends_on_the_finding(name, command, tmp_path):
    kinds = FILES[name][1]
    expected = 3 if set(kinds) & {"unreadable", "truncated"} else 1 if kinds else 0
    assert run(command, folder(tmp_path, [name]))[0].code == expected


def test_training_reads_all_images_but_the_unreadable_ones(tmp_path):
    data = ImageData(folder(tmp_path, FILES), Hierarchy.from_folder(tmp_path), 8)
    shown = {data.paths[i]: data[i][2] == i for i in range(len(data))}
    unreadable = {f"cats/manx/{name}" for name, (_, kinds) in FILES.items() if {"unreadable", "truncated"} & {*kinds}}
    assert {name for name, itself in shown.items() if not itself} == unreadable


def test_duplicates_within_and_across_classes(command, tmp_path):
    for name in ("cats/manx", "cats/lynx", "dogs/pug"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "cats/manx/a.png").write_bytes(encoded := png(noise()))
    for name in ("cats/manx/b.png", "cats/lynx/z.png"):
        (tmp_path / name).write_bytes(encoded)
    (tmp_path / "dogs/pug/a.png").write_bytes(png(noise()))
    (tmp_path / "dogs/pug/same-size.bmp").write_bytes(bmp(8))
    (tmp_path / "dogs/pug/as-well.bmp").write_bytes(bmp(8)[:-1] + b"\1")
    (tmp_path / "dogs/pug/empty.jpg").touch()
    (tmp_path / "dogs/pug/empty2.jpg").touch()  # unreadable, not a duplicate
    result, found = run(command, tmp_path)
    assert found["findings"]["duplicate"] == {
        "cats/manx/a.png": "cats/lynx/z.png, which is another class",
        "cats/manx/b.png": "cats/lynx/z.png, which is another class",
    }
    assert found["superclasses"] == {"cats": {"lynx": 1, "manx": 2}, "dogs": {"pug": 5}} and found["images"] == 8
    twins = [f"'cats/manx/{name}.png' is 'cats/lynx/z.png', which is another class" for name in "ab"]
    assert f"2 duplicate (the same bytes as another image: both are used): {', '.join(twins)}\n" in result.out
    table = [line.split() for line in result.out.splitlines()]
    assert ["cats", "2", "3", "1", "1.5", "2"] in table and ["all", "3", "8", "1", "2", "5"] in table
    assert "fewest images: lynx (1), manx (2), pug (5)" in result.out
    assert "most images: pug (5), manx (2), lynx (1)" in result.out
    (tmp_path / "cats/lynx/z.png").unlink()
    (tmp_path / "cats/lynx/y.png").write_bytes(png(noise()))
    assert run(command, tmp_path)[1]["findings"]["duplicate"] == {"cats/manx/b.png": "cats/manx/a.png"}


def test_images_that_two_folders_share(command, tmp_path):
    train, val = tmp_path / "train", tmp_path / "val"
    for root, classes in ((train, ("cats/manx", "cats/lynx")), (val, ("cats/manx", "dogs/pug"))):
        for name in classes:
            (root / name).mkdir(parents=True)
    first, second, third = (png(noise()) for _ in range(3))
    for path, content in {
        train / "cats/manx/a.png": first,
        train / "cats/manx/b.png": second,
        train / "cats/lynx/c.png": bmp(8),
        train / "cats/lynx/empty.png": b"",
        val / "cats/manx/x.png": first,
        val / "dogs/pug/y.png": bmp(8),
        val / "dogs/pug/z.png": third,
        val / "dogs/pug/empty.png": b"",
    }.items():
        path.write_bytes(content)
    (train / "cats/lynx/empty.png").write_bytes(png(noise()))
    result, found = run(command, train, "--compare", val)
    assert found["findings"].pop("shared") == {
        "cats/manx/a.png": "cats/manx/x.png",
        "cats/lynx/c.png": "dogs/pug/y.png, which is another class",
    }
    assert not any(found["findings"].values()) and found["images"] == 4
    words = "2 shared (the same bytes as an image of --compare): 'cats/lynx/c.png' is 'dogs/pug/y.png', which is another class"
    assert result.code == 1 and words in result.out
    result, found = run(command, train)
    assert result.code == 0 and not found["findings"]["shared"]
    result = command(check_data.main, train, "--compare", tmp_path / "nowhere")
    assert result.code == 2 and "nowhere" in result.err


def png(image):
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def test_ignored_files_are_named_and_no_findings_reported(command, tmp_path):
    folder(tmp_path, ["good.jpg"])
    (tmp_path / "cats/manx/._good.jpg").touch()
    result, found = run(command, tmp_path)
    assert result.code == 0 and found["ignored"] == ["cats/manx/._good.jpg"]
    assert (
        "Ignored entries that are not images in a class folder: 1 ('cats/manx/._good.jpg').\nNo findings.\n"
        in result.out
    )


def test_inaturalist_and_vegfru_as_they_unpack(command, tmp_path):
    inat, veg = tmp_path / "inat", tmp_path / "veg"
    for name in (
        "00000_Animalia_Chordata_Aves_Passeriformes_Corvidae_Corvus_corax",
        "00001_Plantae_Tracheophyta_Magnoliopsida_Asterales_Asteraceae_Bellis_perennis",
    ):
        folder(inat, ["good.jpg", "half.jpg"], "train_mini", name)
    result, found = run(command, inat)
    assert result.code == 3 and [len(classes) for classes in found["superclasses"].values()] == [1, 1]
    assert set(found["superclasses"]) == {"Birds", "Plants"} and len(found["findings"]["truncated"]) == 2
    for file in ("veg200_images/carrot/v_13_01_0001.jpg", "fru92_images/apple/f_09_01_0001.jpg"):
        (veg / file).parent.mkdir(parents=True)
        noise().save(veg / file)
    result, found = run(command, veg)
    assert result.code == 0 and found["images"] == 2 and len(found["superclasses"]) == 2


@pytest.mark.parametrize(
    "flags, words",
    [
        (["nowhere"], "There is no image folder 'nowhere'"),
        (["@", "--num-workers", "0"], "--num-workers is 0, expected at least 1"),
        (["@", "--image-size", "0"], "--image-size is 0"),
        (["@", "--hierarchy", "nowhere"], "There is no hierarchy or path 'nowhere'"),
    ],
)
def test_mistakes(flags, words, command, tmp_path):
    folder(tmp_path, ["good.jpg"])
    result = command(check_data.main, *[tmp_path if flag == "@" else flag for flag in flags])
    assert result.code == 2 and words in result.err and result.err.count("\n") == 1 and not result.out


def test_the_help_lists_the_exit_codes(command):
    result = command(check_data.main, "--help")
    kinds = "small, cmyk, palette, 16-bit, animated, transparent, rotated, duplicate, shared"
    assert f"1  findings that a training tolerates: {kinds}" in result.out
    assert "3  images that cannot be read: unreadable, truncated" in result.out


def test_all_cores_are_used_on_macos(monkeypatch):
    monkeypatch.delattr("os.sched_getaffinity")
    assert check_data.count_cores() == os.cpu_count()
