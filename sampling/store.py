"""A folder of N numbered pictures that several processes fill, and that a stopped run goes on filling.

    <folder>/settings.json          what decides the pictures; another run is refused
    <folder>/<class>/<k:06d>.png    format "png" or "both"
    <folder>.npz                    format "npz" or "both", ADM's form: arr_0 uint8 (N, H, W, 3), arr_1 int64 labels (N,)
    <folder>/rows, <folder>/digests until the npz is whole: its pixels, and 8 bytes of hash for each picture in it

A picture is there when its PNG is whole and its row has its hash: no list is kept that could tell otherwise.
"""

import errno
import hashlib
import io
import json
import os
import shutil
import sys
import zipfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from runtime.files import Lock, atomic_write, path_in_errors

FORMATS = ("png", "npz", "both")
DIGEST = 8  # bytes
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
PNG_RATIO, BLOCK = 0.75, 4096  # a photograph's PNG takes about that share of its pixels, and a block of the disk


class Store:
    """`labels`: int64 (N,); `folders`: the name of each class's folder; `size`: side of the pictures; `form`: of FORMATS."""

    def __init__(self, folder, labels, folders, size, form):
        self.folder, self.labels, self.folders = Path(folder), np.asarray(labels, np.int64), folders
        self.png, self.rows = form in ("png", "both"), form in ("npz", "both")
        self.shape = len(self.labels), size, size, 3
        self.item = size * size * 3
        self.npz = self.folder.with_name(self.folder.name + ".npz")
        self.lock = None

    def path(self, k):
        return self.folder / self.folders[self.labels[k]] / f"{k:06d}.png"

    def places(self):
        """Where the pictures are."""
        return [self.folder] * self.png + [self.npz] * self.rows

    # ---- before: by one process ------------------------------------------------------------------

    def prepare(self, settings):
        """Begin or go on: check that the folder is this run's and that there is room, and keep other launches out.

        ValueError where it belongs to another run or another process, or where the disk is too small; nothing is
        written then.
        """
        self.check_settings(settings)
        self.check_room()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = Lock(self.folder, "sampling into", "--name")
        self.check_settings(settings)  # again: nobody but this process changes them now
        path = self.folder / "settings.json"
        if not path.exists():
            atomic_write(path, lambda part: part.write_text(json.dumps(settings, indent=1) + "\n"))
        leftovers = *self.folder.rglob(".*.part"), *self.folder.parent.glob(f".{self.npz.name}.*.part")
        for part in leftovers:  # of a kill
            part.unlink()
        if self.rows and self.npz.exists() and not self.whole_npz():
            print(f"{self.npz} is damaged and is made again.", file=sys.stderr)
            self.npz.unlink()
        if self.in_rows():
            for name, count in (("rows", self.item), ("digests", DIGEST)):
                with path_in_errors(self.folder / name), open(self.folder / name, "ab") as file:
                    file.truncate(len(self.labels) * count)

    def check_settings(self, settings):
        path = self.folder / "settings.json"
        if not path.exists():
            there = list(self.folder.iterdir()) if self.folder.exists() else []
            if any(entry.suffix != ".part" for entry in there) or (self.rows and self.npz.exists()):
                raise ValueError(
                    f"{self.folder} holds files but no settings.json, expected a new folder or one of an earlier start: choose "
                    "another --name."
                )
            return
        try:
            earlier = dict(json.loads(path.read_text()))
        except (ValueError, TypeError):
            raise ValueError(f"{path} is damaged, expected JSON: remove the folder or choose another --name.") from None
        differ = [
            f"{key} {earlier.get(key)}, here {settings.get(key)}"
            for key in earlier | settings
            if earlier.get(key) != settings.get(key)
        ]
        if differ:
            raise ValueError(
                f"{self.folder} was begun with other settings ({'; '.join(differ)}): choose another --name, or sample with the "
                "settings it was begun with."
            )

    def check_room(self):
        """ValueError where what is still to be written does not fit on the disk: the npz is written beside its rows."""
        need = len(self.labels) * (PNG_RATIO * self.item + BLOCK) if self.png else 0
        need += 2 * len(self.labels) * self.item if self.in_rows() else 0
        need -= sum(path.stat().st_blocks * 512 for path in self.folder.rglob("*") if path.is_file())
        existing = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free
        if need > free:
            raise ValueError(
                f"{self.folder} needs about {need / 1e9:.3g} GB more and has {free / 1e9:.3g} GB free: make room, or choose "
                "another --sample-dir or --format."
            )

    def close(self):
        """Let other launches in."""
        if self.lock:
            self.lock.close()

    # ---- meanwhile: by every process -------------------------------------------------------------

    def in_rows(self):
        """Whether the npz is still to be made: until then each picture has a row."""
        return self.rows and not self.npz.exists()

    def missing(self, rank=0, world=1):
        """Numbers, of this process's every `world`-th, of the pictures that are not there; says which were damaged."""
        in_rows = self.in_rows()
        digests = (self.folder / "digests").read_bytes() if in_rows else b""
        wanted = []
        for k in range(rank, len(self.labels), world):
            there = [self.whole_png(k)] if self.png else []
            there += [self.whole_row(k, digests[k * DIGEST : (k + 1) * DIGEST])] if in_rows else []
            if not all(there):
                wanted.append(k)
        return wanted

    def whole_png(self, k):
        path = self.path(k)
        if not path.exists():
            return False
        try:
            data = path.read_bytes()
            with Image.open(io.BytesIO(data)) as image:
                fits = (image.format, image.mode, image.size) == ("PNG", "RGB", self.shape[1:3]) and data.endswith(
                    PNG_END
                )
                image.verify()  # every chunk but the last has its checksum checked
        except Exception:  # decoders raise all sorts of them at a damaged file
            fits = False
        if not fits:
            print(f"{path} is damaged and is made again.", file=sys.stderr)
        return fits

    def whole_row(self, k, digest):
        if not any(digest):
            return False
        with open(self.folder / "rows", "rb") as rows:
            fits = digest == image_digest(os.pread(rows.fileno(), self.item, k * self.item))
        if not fits:
            print(f"Picture {k} in {self.folder}/rows is damaged and is made again.", file=sys.stderr)
        return fits

    def write(self, k, pixels):
        """Put picture k, uint8 (H, W, 3), where it belongs; thread-safe."""
        if self.png:
            atomic_write(self.path(k), lambda part: Image.fromarray(pixels).save(part, format="png"))
        if self.in_rows():
            self.put("rows", k, pixels.tobytes())
            self.put("digests", k, image_digest(pixels.tobytes()))  # last: it says that the row is there

    def put(self, name, k, data):
        path = self.folder / name
        with path_in_errors(path), open(path, "r+b", buffering=0) as file:
            if os.pwrite(file.fileno(), data, k * len(data)) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    # ---- after: by one process -------------------------------------------------------------------

    def finish(self):
        """Make the npz of its rows, one after the other, and count the PNGs."""
        if self.in_rows():
            atomic_write(self.npz, self.write_npz)
        for name in ("rows", "digests"):
            (self.folder / name).unlink(missing_ok=True)
        found = sum(1 for _ in self.folder.glob("*/*.png"))
        if found != len(self.labels) * self.png:
            raise ValueError(
                f"{self.folder} holds {found} PNGs, expected {len(self.labels) * self.png}: remove what is not of this run."
            )

    def write_npz(self, path):
        header = {"descr": "|u1", "fortran_order": False, "shape": self.shape}
        with zipfile.ZipFile(path, "w") as archive:  # entries as ZipInfo: with no date in them the bytes repeat
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as entry:
                np.lib.format.write_array_header_1_0(entry, header)
                with open(self.folder / "rows", "rb") as rows, open(self.folder / "digests", "rb") as digests:
                    for k in range(len(self.labels)):
                        row = rows.read(self.item)
                        if image_digest(row) != digests.read(DIGEST):
                            raise ValueError(
                                f"Picture {k} in {self.folder}/rows is damaged: start the same command again, which makes it "
                                "anew."
                            )
                        entry.write(row)
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as entry:
                np.lib.format.write_array(entry, self.labels)

    def whole_npz(self):
        try:
            with zipfile.ZipFile(self.npz) as archive:
                with archive.open("arr_0.npy") as entry:
                    np.lib.format.read_magic(entry)
                    shape = np.lib.format.read_array_header_1_0(entry)[0]
                with archive.open("arr_1.npy") as entry:
                    labels = np.lib.format.read_array(entry)
                return shape == self.shape and np.array_equal(labels, self.labels) and archive.testzip() is None
        except Exception:  # of a damaged file there are all sorts
            return False


def image_digest(data):
    return hashlib.blake2b(data, digest_size=DIGEST).digest()


class Writer:
    """Calls `write(*job)` in threads of their own, so that nobody waits for a disk; at most `depth` jobs are kept waiting.

    What a job raises is raised by a later `put`, or at the end of the `with`.
    """

    def __init__(self, write, threads=4, depth=256):
        self.write, self.depth, self.jobs = write, depth, deque()
        self.pool = ThreadPoolExecutor(threads)

    def put(self, *job):
        while self.jobs and (len(self.jobs) >= self.depth or self.jobs[0].done()):
            self.jobs.popleft().result()
        self.jobs.append(self.pool.submit(self.write, *job))

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.pool.shutdown()
        for job in self.jobs if kind is None else ():
            job.result()
