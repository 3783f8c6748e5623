"""Write an image folder of glyphs for the quick start, from fonts that matplotlib contains.

    python -m examples.glyphs.draw --out data/glyphs --set new

A class is a code point and a superclass a Unicode block; the images of a class vary in face, size, shift and rotation.
They are written as `block/code_NAME/*.png`, white on black, 64 x 64 pixels. The faces are the DejaVu and STIX fonts of
matplotlib. Faces in HELD_OUT are never used in training; `--faces held-out` draws them. The base model was trained on
`--set base`, and the quick start fine-tunes it on `--set new`. The two sets share no block, and no glyph of one looks
like a glyph of the other. `--set more` has eight further classes of two blocks of the new set. `--set letters` has three
tiers, `block/letter/code_NAME/*.png`: four variants with diacritics of each of twelve letters.
"""

import json
import os
import random
import shutil
import unicodedata
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from runtime.cli import Parser, run_command
from runtime.progress import progress_bar

CLASSES_FILE = Path(__file__).parent / "classes.json"
SIZE = 64  # pixels
EM = 44  # font size in pixels, before the jitter
MIN_FACES = 8  # faces that must have a glyph for it to become a class
MIN_SIDE, MIN_LENGTH, MAX_LENGTH = 7, 18, 60  # shorter side and longer side of the ink, in pixels
LOOK_ALIKE = 0.16  # two glyphs look alike if less than this share of their ink differs
JITTER = {"scale": 0.12, "shift": 2.5, "degrees": 6.0}  # largest deviations; the distribution is uniform

FACES = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSans-BoldOblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-Oblique",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "DejaVuSerif-BoldItalic",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralItalic",
    "STIXGeneralBolIta",
)
PLAIN = ("DejaVuSans", "DejaVuSerif", "STIXGeneral")  # faces in which glyphs are compared
HELD_OUT = ("DejaVuSansMono-Bold", "DejaVuSerif-Italic", "STIXGeneral")

EXAMPLES = """
    python -m examples.glyphs.draw --out data/glyphs --set new
    python -m examples.glyphs.draw --out data/held-out --set new --faces held-out --per-class 6
"""
# block: (first code point, last code point, most classes, chosen at even distances)
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
MORE = {"Armenian": 4, "IPA Extensions": 4}  # further classes of blocks of "new", to extend an adapter with
# the set "letters": block: (first code point, last code point, letters), with VARIANTS of each letter
LETTERS = {"Latin Extended Additional": (0x1E00, 0x1EFF, "aeouht"), "Greek Extended": (0x1F00, 0x1FFF, "αεηιυω")}
VARIANTS = 4
SETS = *BLOCKS, "more", "letters"


# ---- drawing -------------------------------------------------------------------------------------


@cache
def load_font(face: str, size: int) -> ImageFont.FreeTypeFont:
    """Load a face of matplotlib in a size in pixels."""
    path = Path(matplotlib.get_data_path(), "fonts/ttf", f"{face}.ttf")
    # BASIC layout gives the same pixels with and without libraqm
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


@cache
def faces_by_code() -> dict[int, tuple[str, ...]]:
    """Return {code point: faces that have a glyph for it}, in the order of FACES."""
    found = {}
    for face in FACES:
        for code in FT2Font(load_font(face, EM).path).get_charmap():
            found.setdefault(code, []).append(face)
    return {code: tuple(faces) for code, faces in found.items()}


def draw_glyph(
    code: int, face: str, scale: float = 1.0, shift: tuple[float, float] = (0.0, 0.0), degrees: float = 0.0
) -> Image.Image:
    """Draw a glyph, white on black, with its ink centred, then rotated and shifted (right, down) by pixels.

    Returns a grey image ("L") of SIZE x SIZE pixels.
    """
    canvas = Image.new("L", (2 * SIZE, 2 * SIZE))  # twice the size, averaged at the end
    font = load_font(face, round(2 * EM * scale))
    ImageDraw.Draw(canvas).text((SIZE, SIZE), chr(code), fill=255, font=font, anchor="mm")
    left, top, right, bottom = canvas.getbbox() or (SIZE,) * 4
    centre = (left + right) / 2, (top + bottom) / 2
    move = [SIZE - c + 2 * s for c, s in zip(centre, shift)]
    canvas = canvas.rotate(degrees, Image.Resampling.BICUBIC, center=centre, translate=move)
    return canvas.resize((SIZE, SIZE), Image.Resampling.BOX)


def draw_varied(code: int, face: str, rng: random.Random) -> Image.Image:
    """Draw a glyph with random size, shift and rotation."""
    u = rng.uniform
    s, d = JITTER["shift"], JITTER["degrees"]
    scale = 1 + u(-JITTER["scale"], JITTER["scale"])
    return draw_glyph(code, face, scale, (u(-s, s), u(-s, s)), u(-d, d))


# ---- choice of classes ---------------------------------------------------------------------------


def portrait(code: int) -> np.ndarray:
    """Return a glyph in the faces of PLAIN, blurred: float32 (3, SIZE/2, SIZE/2) in 0..1, zeros if a face lacks it."""
    result = np.zeros((len(PLAIN), SIZE // 2, SIZE // 2), dtype=np.float32)
    for i, face in enumerate(PLAIN):
        if face in faces_by_code()[code]:
            image = draw_glyph(code, face).filter(ImageFilter.GaussianBlur(1.5)).reduce(2)
            result[i] = np.asarray(image, dtype=np.float32) / 255
    return result


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return how much portraits (..., 3, h, w) differ, from 0 (equal) to 1 (no common ink).

    It is the share of the ink that only one of the two has, averaged over the faces that have both glyphs.
    """
    apart = np.abs(a - b).sum((-1, -2))
    either = np.maximum(a, b).sum((-1, -2))
    shared = (a.sum((-1, -2)) > 0) & (b.sum((-1, -2)) > 0)
    ratio = np.where(shared, apart / np.maximum(either, 1e-9), 0).sum(-1)
    return np.where(shared.any(-1), ratio / np.maximum(shared.sum(-1), 1), 1.0)


def usable(code: int) -> bool:
    """Return whether a code point can be a class.

    It must be a letter, digit, symbol or punctuation mark, be in enough faces, and be neither too small nor too large.
    """
    if len(faces_by_code().get(code, ())) < MIN_FACES or unicodedata.category(chr(code))[0] not in "LNSP":
        return False
    box = draw_glyph(code, faces_by_code()[code][0]).getbbox()
    if box is None:
        return False
    sides = box[2] - box[0], box[3] - box[1]
    return min(sides) >= MIN_SIDE and MIN_LENGTH <= max(sides) <= MAX_LENGTH


def choose_classes() -> dict[str, dict[str, list[int]]]:
    """Return {"base": {block: [code points]}, "new": {...}, ...}; of glyphs of a set that look alike one is kept."""
    portraits, chosen, more = [], {}, {}
    for which, blocks in BLOCKS.items():
        chosen[which] = {}
        for block, (first, last, most) in blocks.items():
            kept = []
            for code in progress_bar(filter(usable, range(first, last + 1)), desc=block, unit="glyph"):
                glyph = portrait(code)
                if not portraits or difference(glyph, np.stack(portraits)).min() >= LOOK_ALIKE:
                    portraits.append(glyph)
                    kept.append(code)
            chosen[which][block] = spread(kept, most)
            if block in MORE:
                more[block] = spread([code for code in kept if code not in chosen[which][block]], MORE[block])
    return chosen | {"more": more, "letters": choose_letters()}


def choose_letters() -> dict[str, list[int]]:
    """Return {block: [code points]} of the set "letters"."""
    chosen = {}
    for block, (first, last, letters) in LETTERS.items():
        portraits, kept = [], {letter: [] for letter in letters}
        for code in progress_bar(filter(usable, range(first, last + 1)), desc=f"{block}: letters", unit="glyph"):
            glyph = portrait(code)
            if letter_of(code) in kept and (
                not portraits or difference(glyph, np.stack(portraits)).min() >= LOOK_ALIKE
            ):
                portraits.append(glyph)
                kept[letter_of(code)].append(code)
        chosen[block] = [code for codes in kept.values() for code in spread(codes, VARIANTS)]
    return chosen


def letter_of(code: int) -> str:
    """Return the letter of a code point without its diacritics."""
    return unicodedata.normalize("NFD", chr(code))[0]


def spread(codes: list[int], most: int) -> list[int]:
    """Return at most `most` of the code points, at even distances."""
    places = np.linspace(0, len(codes) - 1, min(most, len(codes))).round().astype(int)
    return [codes[i] for i in places]


def read_classes(which: str) -> dict[str, list[int]]:
    """Read {block: [code points]} of a set from CLASSES_FILE."""
    return json.loads(CLASSES_FILE.read_text())[which]


# ---- the folder ----------------------------------------------------------------------------------


def class_name(code: int) -> str:
    """Return the name of a class folder: 0041_LATIN_CAPITAL_LETTER_A."""
    return f"{code:04X}_{unicodedata.name(chr(code)).replace(' ', '_')}"


def write_images(out: str | os.PathLike, which: str, held_out: bool, per_class: int, seed: int) -> int:
    """Write `per_class` images of every class of a set, with the faces in turn; return the number of classes.

    The images depend on the arguments only.
    """
    jobs = [(block, code) for block, codes in read_classes(which).items() for code in codes]
    for block, code in progress_bar(jobs, desc=f"glyphs: {which}", unit="class"):
        letter = [letter_of(code)] if which == "letters" else []
        folder = Path(out, block.replace(" ", "_"), *letter, class_name(code))
        folder.mkdir(parents=True, exist_ok=True)
        faces = [f for f in faces_by_code()[code] if (f in HELD_OUT) == held_out]
        rng = random.Random(f"{seed} {which} {held_out} {code}")
        for i in range(per_class):
            face = faces[i % len(faces)]
            draw_varied(code, face, rng).save(folder / f"{i:03d}_{face}.png")
    return len(jobs)


def write_images_once(out: Path, which: str, held_out: bool, per_class: int, seed: int):
    """Do as `write_images`, unless the folder exists; it appears complete or not at all."""
    if not out.is_dir():
        part = out.with_name(f"{out.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        write_images(part, which, held_out, per_class, seed)
        part.rename(out)


def main():
    parser = Parser(description=__doc__.split("\n")[0], examples=EXAMPLES)
    add = parser.add_argument
    add("--out", required=True, help="folder to write, new or empty")
    add("--set", choices=SETS, default="new", dest="which", help="classes to draw")
    add("--faces", choices=["train", "held-out"], default="train", help="faces to draw them in")
    add("--per-class", type=int, default=52, help="images per class")
    add("--seed", type=int, default=0, help="seed of size, shift and rotation")
    add(
        "--choose",
        action="store_true",
        help="instead of images, choose the classes again and write them to the file --out",
    )
    args = parser.parse_args()
    if args.choose:
        Path(args.out).write_text(json.dumps(choose_classes()) + "\n")
        return
    if Path(args.out).exists() and any(Path(args.out).iterdir()):
        raise ValueError(f"{args.out} is not empty, expected a new folder: remove it or choose another --out.")
    count = write_images(args.out, args.which, args.faces == "held-out", args.per_class, args.seed)
    print(f"{count} classes x {args.per_class} images in {args.out}")


if __name__ == "__main__":
    run_command(main)
