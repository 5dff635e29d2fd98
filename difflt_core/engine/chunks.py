"""Images made chunk by chunk, a file each: a kill loses the chunk under way, and no two processes or
hosts ever write into one file."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from . import parallel
from .files import save_array
from .progress import bar

__all__ = ["Chunks", "finish_images", "give_out"]


class Chunks:
    """uint8 images of a shape (N, H, W, C) on their way to work/<name>_images.npy.

    Args:
        size: images in a chunk, of which several processes take every n-th.
    """

    def __init__(self, work: Path, name: str, shape: tuple[int, ...], size: int):
        self.folder, self.target = work / f"{name}_chunks", work / f"{name}_images.npy"
        self.shape, self.size = shape, size
        if parallel.rank() == 0 and not self._merged():
            self.folder.mkdir(exist_ok=True)
        parallel.barrier()

    def todo(self, what: str, context) -> Iterator[slice]:
        """The slices of rows that this process is to write, with a bar."""
        parts = [] if self._merged() else self._parts()
        missing = [p for p in parts if not _has_shape(self._file(p), self._shape_of(p))]
        missing = parallel.from_main(missing)[parallel.rank() :: parallel.n_processes()]
        there = self.shape[0] - sum(p.stop - p.start for p in missing)
        with bar(self.shape[0], what, "image", there, context) as progress:
            for part in missing:
                yield part
                progress.update(part.stop - part.start)

    def write(self, part: slice, images: np.ndarray) -> None:
        """images: uint8 (part.stop - part.start, H, W, C)."""
        save_array(self._file(part), images)

    def merge(self) -> np.ndarray | None:
        """All chunks are written: the main process makes one file of them, mapped for reading. The others
        get None: the main one may move the file on at once."""
        while parallel.n_processes() > 1 and not self._merged() and not self._all_there():
            time.sleep(0.5)  # for slower processes; one that dies ends the group
        parallel.barrier()
        parallel.main_first(self._write_whole)  # minutes of a large set, with word to the others
        if parallel.rank() != 0:
            return None
        return np.load(self.target, mmap_mode="r" if self.shape[0] else None, allow_pickle=False)

    def _write_whole(self) -> None:
        if self._merged():
            return
        unfinished = self.target.with_suffix(".part.npy")
        with open(unfinished, "wb") as f:
            about = {"descr": "|u1", "fortran_order": False, "shape": self.shape}
            np.lib.format.write_array_header_1_0(f, about)
            for part in self._parts():
                f.write(np.load(self._file(part), allow_pickle=False).tobytes())
            f.flush()
            os.fsync(f.fileno())
        os.replace(unfinished, self.target)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _all_there(self) -> bool:
        return all(self._file(part).exists() for part in self._parts())

    def _parts(self) -> list[slice]:
        N = self.shape[0]
        return [slice(i, min(i + self.size, N)) for i in range(0, N, self.size)]

    def _file(self, part: slice) -> Path:
        return self.folder / f"{part.start:09d}.npy"

    def _shape_of(self, part: slice) -> tuple[int, ...]:
        return (part.stop - part.start, *self.shape[1:])

    def _merged(self) -> bool:
        return _has_shape(self.target, self.shape)


def _has_shape(path: Path, shape: tuple[int, ...]) -> bool:
    try:
        return np.load(path, mmap_mode="r" if shape[0] else None).shape == shape
    except (OSError, ValueError, EOFError):
        return False


def finish_images(work: Path, name: str, labels, info: dict) -> None:
    """All is written: work/<name>_images.npy is work/out/images.npy too, beside labels.npy int64
    (N,) and info.json, which says where the images come from."""
    if parallel.rank() == 0:
        out = work / "out"
        np.save(out / "labels.npy", np.asarray(labels, dtype=np.int64))
        (out / "info.json").write_text(json.dumps(info), encoding="utf-8")
        give_out(work / f"{name}_images.npy", out / "images.npy")


def give_out(made: Path, final: Path) -> None:
    """A finished file of a work folder is in out/ too, by a second name, so that a kill before the
    artifact stands does not lose it; moved there where the file system has no such links."""
    try:
        os.link(made, final)
    except OSError:
        os.replace(made, final)
