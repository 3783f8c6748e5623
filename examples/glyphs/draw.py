"""Write an image folder of glyphs: real input for the quick start, from fonts that are already on the machine.

    python -m examples.glyphs.draw --out data/glyphs --set new

Superclass = Unicode block, class = code point, variety = face, size, shift and rotation: `block/code_NAME/*.png`,
white on black, 64 pixels. The fonts are the DejaVu and STIX faces inside matplotlib. Faces in HELD_OUT are never
trained on; `--faces held-out` draws them. `--set base` is what the base model knows, `--set new` what the quick start
fine-tunes to: no block is in both, and no glyph of one looks like a glyph of the other.
"""

import json
import random
import unicodedata
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from tqdm import tqdm

from runtime.cli import Parser, run_command

CLASSES_FILE = Path(__file__).parent / "classes.json"
SIZE = 64  # pixels
EM = 44  # font size in pixels, before the jitter
MIN_FACES = 8  # a class is drawn by at least so many faces
MIN_SIDE, MIN_LENGTH, MAX_LENGTH = 7, 18, 60  # of the ink, in pixels
LOOK_ALIKE = 0.16  # two glyphs differing by less of their ink are one
JITTER = {"scale": 0.12, "shift": 2.5, "degrees": 6.0}  # largest deviation, uniform

FACES = (
    "DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSans-BoldOblique "
    "DejaVuSansMono DejaVuSansMono-Bold DejaVuSansMono-Oblique DejaVuSansMono-BoldOblique "
    "DejaVuSerif DejaVuSerif-Bold DejaVuSerif-Italic DejaVuSerif-BoldItalic "
    "STIXGeneral STIXGeneralBol STIXGeneralItalic STIXGeneralBolIta"
).split()
PLAIN = ("DejaVuSans", "DejaVuSerif", "STIXGeneral")  # in which look-alikes are judged
HELD_OUT = ("DejaVuSansMono-Bold", "DejaVuSerif-Italic", "STIXGeneral")

# block: (first code point, last code point, at most so many classes, spread evenly)
BLOCKS = {
    "base": {
        "Basic Latin": (0x21, 0x7E, 94),
        "Latin-1 Supplement": (0xA1, 0xFF, 60),
        "Latin Extended-A": (0x100, 0x17F, 60),
        "Latin Extended-B": (0x180, 0x24F, 50),
        "Greek and Coptic": (0x370, 0x3FF, 60),
        "Cyrillic": (0x400, 0x4FF, 90),
        "Georgian": (0x10A0, 0x10FF, 40),
        "Phonetic Extensions": (0x1D00, 0x1DBF, 30),
        "Arrows": (0x2190, 0x21FF, 40),
        "Mathematical Operators": (0x2200, 0x22FF, 50),
        "Geometric Shapes": (0x25A0, 0x25FF, 26),
    },
    "new": {
        "Armenian": (0x530, 0x58F, 12),
        "IPA Extensions": (0x250, 0x2AF, 12),
        "Greek Extended": (0x1F00, 0x1FBC, 12),
        "Latin Extended Additional": (0x1E00, 0x1EFF, 12),
    },
}


@cache
def font(face, size):
    path = Path(matplotlib.get_data_path(), "fonts/ttf", f"{face}.ttf")
    # BASIC layout: the same pixels with and without libraqm
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


@cache
def faces_of():
    """code point -> tuple of the faces that draw it, in the order of FACES."""
    found = {}
    for face in FACES:
        for code in FT2Font(font(face, EM).path).get_charmap():
            found.setdefault(code, []).append(face)
    return {code: tuple(faces) for code, faces in found.items()}


def draw(code, face, scale=1.0, shift=(0.0, 0.0), degrees=0.0):
    """One glyph, its ink centred, then turned and moved: an "L" image of SIZE x SIZE pixels, white on black."""
    canvas = Image.new("L", (2 * SIZE, 2 * SIZE))  # drawn twice as large, then averaged
    type_ = font(face, round(2 * EM * scale))
    ImageDraw.Draw(canvas).text((SIZE, SIZE), chr(code), fill=255, font=type_, anchor="mm")
    left, top, right, bottom = canvas.getbbox() or (SIZE,) * 4
    centre = (left + right) / 2, (top + bottom) / 2
    move = [SIZE - c + 2 * s for c, s in zip(centre, shift)]
    canvas = canvas.rotate(degrees, Image.Resampling.BICUBIC, center=centre, translate=move)
    return canvas.resize((SIZE, SIZE), Image.Resampling.BOX)


def varied(code, face, rng):
    """`draw` with size, shift and rotation from `rng` (random.Random)."""
    u = rng.uniform
    s, d = JITTER["shift"], JITTER["degrees"]
    scale = 1 + u(-JITTER["scale"], JITTER["scale"])
    return draw(code, face, scale, (u(-s, s), u(-s, s)), u(-d, d))


def portrait(code):
    """The unjittered glyph in three plain faces, blurred; zeros where a face lacks it: float32 (3, SIZE/2, SIZE/2)."""
    picture = np.zeros((len(PLAIN), SIZE // 2, SIZE // 2), dtype=np.float32)
    for i, face in enumerate(PLAIN):
        if face in faces_of()[code]:
            image = draw(code, face).filter(ImageFilter.GaussianBlur(1.5)).reduce(2)
            picture[i] = np.asarray(image, dtype=np.float32) / 255
    return picture


def difference(a, b):
    """Of portraits (..., 3, h, w): ink that one alone has over all ink, mean over shared faces; 0 the same, 1 apart."""
    apart = np.abs(a - b).sum((-1, -2))
    either = np.maximum(a, b).sum((-1, -2))
    shared = (a.sum((-1, -2)) > 0) & (b.sum((-1, -2)) > 0)
    ratio = np.where(shared, apart / np.maximum(either, 1e-9), 0).sum(-1)
    return np.where(shared.any(-1), ratio / np.maximum(shared.sum(-1), 1), 1.0)


def usable(code):
    """Drawn by enough faces, a letter, digit, symbol or punctuation, and neither a dot nor a banner."""
    if len(faces_of().get(code, ())) < MIN_FACES or unicodedata.category(chr(code))[0] not in "LNSP":
        return False
    box = draw(code, faces_of()[code][0]).getbbox()
    if box is None:
        return False
    sides = box[2] - box[0], box[3] - box[1]
    return min(sides) >= MIN_SIDE and MIN_LENGTH <= max(sides) <= MAX_LENGTH


def choose():
    """{"base": {block: [code points]}, "new": {...}}; of two look-alikes the earlier code point keeps its place."""
    portraits, chosen = [], {}
    for which, blocks in BLOCKS.items():
        chosen[which] = {}
        for block, (first, last, most) in blocks.items():
            kept = []
            for code in tqdm(filter(usable, range(first, last + 1)), desc=block, unit="glyph"):
                picture = portrait(code)
                if not portraits or difference(picture, np.stack(portraits)).min() >= LOOK_ALIKE:
                    portraits.append(picture)
                    kept.append(code)
            spread = np.linspace(0, len(kept) - 1, min(most, len(kept))).round().astype(int)
            chosen[which][block] = [kept[i] for i in spread]
    return chosen


def classes(which):
    """{block: [code points]} of the set "base" or "new", from CLASSES_FILE."""
    return json.loads(CLASSES_FILE.read_text())[which]


def class_name(code):
    return f"{code:04X}_{unicodedata.name(chr(code)).replace(' ', '_')}"


def write(out, which, held_out, per_class, seed):
    """Write `per_class` images of every class of a set, faces in turn; they depend on the arguments alone."""
    jobs = [(block, code) for block, codes in classes(which).items() for code in codes]
    for block, code in tqdm(jobs, desc=f"glyphs: {which}", unit="class"):
        folder = Path(out, block.replace(" ", "_"), class_name(code))
        folder.mkdir(parents=True, exist_ok=True)
        faces = [f for f in faces_of()[code] if (f in HELD_OUT) == held_out]
        rng = random.Random(f"{seed} {which} {held_out} {code}")
        for i in range(per_class):
            face = faces[i % len(faces)]
            varied(code, face, rng).save(folder / f"{i:03d}_{face}.png")
    return len(jobs)


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--set", choices=list(BLOCKS), default="new", dest="which")
    parser.add_argument("--faces", choices=["train", "held-out"], default="train")
    parser.add_argument("--per-class", type=int, default=52)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--choose", action="store_true", help="choose the classes anew, write them to --out")
    args = parser.parse_args()
    if args.choose:
        Path(args.out).write_text(json.dumps(choose()) + "\n")
        return
    if Path(args.out).exists() and any(Path(args.out).iterdir()):
        raise ValueError(f"{args.out} is not empty, expected a new folder: remove it or name another.")
    count = write(args.out, args.which, args.faces == "held-out", args.per_class, args.seed)
    print(f"{count} classes x {args.per_class} images in {args.out}")


if __name__ == "__main__":
    run_command(main)
