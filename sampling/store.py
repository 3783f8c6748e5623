"""Files of a run of sample_ddp.py: N numbered images, written by several processes, across interruptions.

    <folder>/settings.json          the settings that determine the images; a run with others is refused
    <folder>/<class>/<k:06d>.png    format "png" or "both"; with positions, <class>/<position:06d>.png
    <folder>.npz                    format "npz" or "both", as ADM's evaluation reads it:
                                    arr_0 uint8 (N, H, W, 3), arr_1 int64 labels (N,), classes: the names of the classes
    <folder>/rows, <folder>/digests until the npz is complete: its pixels, and a hash of 8 bytes for each image in it

Image k exists if its PNG is intact and its row matches its hash. No list is kept that could disagree with the files.
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
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from hierarchy.layouts import folder_names
from runtime.files import LOCK_FILE, Lock, atomic_write, nearest_existing, path_in_errors
from runtime.text import changed_settings

FORMATS = ("png", "npz", "both")
DIGEST_BYTES = 8
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
PNG_RATIO, BLOCK = 0.75, 4096  # estimate of a photo's PNG: this share of its pixels, and a block of the disk


class PngFolder:
    """A PNG for each image, in a folder for each class.

    folder         the run's folder
    labels         int64 (N,)
    class_folders  name of the folder of each class
    image_size     height and width
    numbers        int64 (N,), the number in the name of each file
    """

    def __init__(
        self, folder: Path, labels: np.ndarray, class_folders: Sequence[str], image_size: int, numbers: np.ndarray
    ):
        self.folder, self.labels, self.class_folders, self.image_size = folder, labels, class_folders, image_size
        self.numbers = numbers

    def path(self, k: int) -> Path:
        return self.folder / self.class_folders[self.labels[k]] / f"{self.numbers[k]:06d}.png"

    def bytes_to_write(self) -> float:
        """Return an estimate of the size of all PNGs."""
        return len(self.labels) * (PNG_RATIO * 3 * self.image_size**2 + BLOCK)

    def missing(self, numbers: Iterable[int]) -> set[int]:
        """Return those of the numbers whose PNG is absent or damaged; print the damaged ones."""
        return {k for k in numbers if not self.is_intact(k)}

    def is_intact(self, k: int) -> bool:
        path = self.path(k)
        if not path.exists():
            return False
        try:
            data = path.read_bytes()
            with Image.open(io.BytesIO(data)) as image:
                found, expected = (image.format, image.mode, image.size), ("PNG", "RGB", (self.image_size,) * 2)
                intact = found == expected and data.endswith(PNG_END)
                image.verify()  # compares the checksum of every chunk but the last
        except Exception:  # decoders raise all kinds of errors for a damaged file
            intact = False
        if not intact:
            report_damage(path)
        return intact

    def write(self, k: int, pixels: np.ndarray):
        """Write image k, uint8 (H, W, 3)."""
        atomic_write(self.path(k), lambda part: Image.fromarray(pixels).save(part, format="png"))


class NpzFile:
    """The npz of all images. Until it is complete, image k is row k of one file, and its hash is in another.

    folder      the run's folder, for rows and digests
    labels      int64 (N,)
    classes     name of each class
    image_size  height and width
    """

    def __init__(self, folder: Path, labels: np.ndarray, classes: Sequence[str], image_size: int):
        self.path = folder.with_name(folder.name + ".npz")
        self.rows, self.digests = folder / "rows", folder / "digests"
        self.labels, self.classes = labels, np.array(classes)
        self.shape = len(labels), image_size, image_size, 3
        self.image_bytes = 3 * image_size**2

    def exists(self) -> bool:
        return self.path.exists()

    def bytes_to_write(self) -> int:
        """Return the size of rows and npz, which is written beside them; 0 if the npz exists."""
        return 0 if self.exists() else 2 * len(self.labels) * self.image_bytes

    def prepare(self):
        """Remove a damaged npz, and make the files of rows and hashes unless the npz is complete."""
        if self.exists() and not self.is_intact():
            report_damage(self.path)
            self.path.unlink()
        if not self.exists():
            for path, count in ((self.rows, self.image_bytes), (self.digests, DIGEST_BYTES)):
                with path_in_errors(path), open(path, "ab") as file:
                    file.truncate(len(self.labels) * count)

    def is_intact(self) -> bool:
        """Return whether the npz has the right shape and labels and no damaged byte."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                with archive.open("arr_0.npy") as entry:
                    np.lib.format.read_magic(entry)
                    shape = np.lib.format.read_array_header_1_0(entry)[0]
                with archive.open("arr_1.npy") as entry:
                    labels = np.lib.format.read_array(entry)
                return shape == self.shape and np.array_equal(labels, self.labels) and archive.testzip() is None
        except Exception:  # a damaged file raises all kinds of errors
            return False

    def missing(self, numbers: Iterable[int]) -> set[int]:
        """Return those of the numbers whose row is empty or damaged, none if the npz exists; print the damaged ones."""
        if self.exists():
            return set()
        digests = self.digests.read_bytes()
        with open(self.rows, "rb") as rows:
            return {
                k for k in numbers if not self.has_row(k, rows.fileno(), digests[k * DIGEST_BYTES :][:DIGEST_BYTES])
            }

    def has_row(self, k: int, rows: int, digest: bytes) -> bool:
        """Return whether row k of the open file `rows` matches its hash, which is 0 until the row is written."""
        if not any(digest):
            return False
        intact = digest == image_digest(os.pread(rows, self.image_bytes, k * self.image_bytes))
        if not intact:
            report_damage(f"Image {k} in {self.rows}")
        return intact

    def write(self, k: int, pixels: np.ndarray):
        """Write image k, uint8 (H, W, 3), and after it its hash, which marks the row as written."""
        if self.exists():
            return
        data = pixels.tobytes()
        for path, part in ((self.rows, data), (self.digests, image_digest(data))):
            with path_in_errors(path), open(path, "r+b", buffering=0) as file:
                if os.pwrite(file.fileno(), part, k * len(part)) < len(part):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def finish(self):
        """Write the npz from its rows, and remove these."""
        if not self.exists():
            atomic_write(self.path, self.write_npz)
        for path in (self.rows, self.digests):
            path.unlink(missing_ok=True)

    def write_npz(self, path: Path):
        """Write the npz to `path`, a row at a time. Raises ValueError if a row is damaged."""
        header = {"descr": "|u1", "fortran_order": False, "shape": self.shape}
        with zipfile.ZipFile(path, "w") as archive:  # ZipInfo entries have no date: the same images give the same bytes
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as entry:
                np.lib.format.write_array_header_1_0(entry, header)
                with open(self.rows, "rb") as rows, open(self.digests, "rb") as digests:
                    for k in range(len(self.labels)):
                        row = rows.read(self.image_bytes)
                        if image_digest(row) != digests.read(DIGEST_BYTES):
                            raise ValueError(
                                f"Image {k} in {self.rows} is damaged: run the same command again to sample it again."
                            )
                        entry.write(row)
            for name, array in (("arr_1", self.labels), ("classes", self.classes)):
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as entry:
                    np.lib.format.write_array(entry, array)


class Store:
    """A run's files: its settings, its lock, and its images in one or two formats.

    folder         the run's folder
    labels         int64 (N,)
    classes        name of each class
    image_size     height and width
    format         one of FORMATS
    positions      int64 (N,), of each image among those of its class, to name the PNGs by; None names them by k
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        labels: Sequence[int],
        classes: Sequence[str],
        image_size: int,
        format: str,
        positions: np.ndarray | None = None,
    ):
        self.folder, self.labels = Path(folder), np.asarray(labels, np.int64)
        numbers = np.arange(len(labels)) if positions is None else positions
        place = self.folder, self.labels, folder_names(classes), image_size
        self.png = PngFolder(*place, numbers) if format != "npz" else None
        self.npz = NpzFile(self.folder, self.labels, classes, image_size) if format != "png" else None
        self.formats = [each for each in (self.png, self.npz) if each]
        self.lock = None

    def places(self) -> list[Path]:
        """Return the paths of the results: the folder of PNGs, the npz, or both."""
        return ([self.folder] if self.png else []) + ([self.npz.path] if self.npz else [])

    # ---- before sampling, by one process ---------------------------------------------------------

    def prepare(self, settings: dict):
        """Start or resume a run, and keep other launches out.

        settings: everything that determines the images, as JSON.

        Raises ValueError if the folder belongs to another run or another process is using it, or if the disk is too
        small; nothing is written then.
        """
        self.check_settings(settings)
        self.check_room()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = Lock(self.folder, "sampling into", "--name")
        self.check_settings(settings)  # again: another launch may have written them before it closed the lock
        path = self.folder / "settings.json"
        if not path.exists():
            atomic_write(path, lambda part: part.write_text(json.dumps(settings, indent=1) + "\n"))
        name = self.folder.name
        for part in (*self.folder.rglob(".*.part"), *self.folder.parent.glob(f".{name}.npz.*.part")):
            part.unlink()  # left by a kill
        if self.npz:
            self.npz.prepare()

    def check_settings(self, settings: dict):
        """Raise ValueError unless the folder is new or was begun with the same settings."""
        path = self.folder / "settings.json"
        if not path.exists():
            entries = list(self.folder.iterdir()) if self.folder.exists() else []
            foreign = any(entry.suffix != ".part" and entry.name != LOCK_FILE for entry in entries)
            if foreign or (self.npz and self.npz.exists()):
                raise ValueError(
                    f"{self.folder} holds files but no settings.json, expected a new folder or one of an interrupted run: "
                    "choose another --name."
                )
            return
        try:
            earlier = dict(json.loads(path.read_text()))
        except (ValueError, TypeError):
            raise ValueError(f"{path} is damaged, expected JSON: remove the folder or choose another --name.") from None
        differ = changed_settings(earlier, settings)
        if differ:
            raise ValueError(
                f"{self.folder} was begun with other settings ({'; '.join(differ)}): choose another --name, or sample with the "
                "settings it was begun with."
            )

    def check_room(self):
        """Raise ValueError if the files still to be written do not fit on the disk."""
        need = sum(each.bytes_to_write() for each in self.formats)
        need -= sum(path.stat().st_blocks * 512 for path in self.folder.rglob("*") if path.is_file())
        free = shutil.disk_usage(nearest_existing(self.folder)).free
        if need > free:
            raise ValueError(
                f"{self.folder} needs about {need / 1e9:.3g} GB more and has {free / 1e9:.3g} GB free: make room, or choose "
                "another --sample-dir or --format."
            )

    def close(self):
        """Release the lock."""
        if self.lock:
            self.lock.close()

    # ---- while sampling, by every process --------------------------------------------------------

    def missing(self, rank: int = 0, world: int = 1) -> list[int]:
        """Return the numbers of the images that process `rank` of `world` has to sample; print the damaged ones."""
        numbers = range(rank, len(self.labels), world)
        return sorted(set().union(*(each.missing(numbers) for each in self.formats)))

    def write(self, k: int, pixels: np.ndarray):
        """Write image k, uint8 (H, W, 3), in every format; thread-safe."""
        for each in self.formats:
            each.write(k, pixels)

    # ---- after sampling, by one process ----------------------------------------------------------

    def finish(self):
        """Write the npz and count the PNGs. Raises ValueError if there are more than those of this run."""
        if self.npz:
            self.npz.finish()
        found, expected = sum(1 for _ in self.folder.glob("*/*.png")), len(self.labels) * bool(self.png)
        if found != expected:
            raise ValueError(
                f"{self.folder} holds {found} PNGs, expected {expected}: remove the files that do not belong to this run."
            )


def report_damage(name: str | os.PathLike):
    print(f"{name} is damaged and will be sampled again.", file=sys.stderr)


def image_digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


class Writer:
    """Call `write(*job)` in threads, so that sampling does not wait for the disk.

    threads  number of threads
    depth    most jobs that may wait; `put` blocks beyond it

    An exception of a job is raised by a later `put`, or at the end of the `with` block.
    """

    def __init__(self, write: Callable, threads: int = 4, depth: int = 256):
        self.write, self.depth, self.jobs = write, depth, deque()
        self.pool = ThreadPoolExecutor(threads)

    def put(self, *job):
        while self.jobs and (len(self.jobs) >= self.depth or self.jobs[0].done()):
            self.jobs.popleft().result()
        self.jobs.append(self.pool.submit(self.write, *job))

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind, *_):
        self.pool.shutdown()
        for job in self.jobs if kind is None else ():
            job.result()
