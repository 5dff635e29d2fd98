"""Image files in: what a scan of the disk found, and its one-time conversion to memory-mapped bytes."""

import functools
import os
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .data import SPLITS
from .progress import bar
from .store import open_chunks

__all__ = ["CHUNK", "Scan", "convert", "listed", "read_image"]

CHUNK = 256  # image files per step


@dataclass(frozen=True)
class Scan:
    """Image files by split, relative to their root, and labels int64 (N,)."""

    class_names: tuple[str, ...]
    files: dict[str, list[str]]
    labels: dict[str, np.ndarray]


def convert(work: Path, found: Scan, root: Path, size: int, context) -> list[tuple]:
    """Decode, crop and shrink every file to uint8 RGB, chunk by chunk on all cores; resumable.

    Returns:
        (split, images uint8 (N, size, size, 3), labels) for each split; the images are mapped from
        work / "<split>_images.npy".

    Raises:
        ValueError: files that cannot be read, by name. The other chunks are kept for the next try.
    """
    modes, bad, splits = Counter(), [], []
    for split in SPLITS:
        files = found.files[split]
        images, done = open_chunks(work, split, (len(files), size, size, 3), CHUNK)
        with (
            bar(
                len(files), f"reading {split}", "image", int(done.sum()) * CHUNK, context
            ) as progress,
            ThreadPoolExecutor(os.cpu_count()) as pool,
        ):
            for chunk in np.flatnonzero(done == 0):
                part = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
                paths = [root / name for name in files[part]]
                pictures = list(pool.map(functools.partial(read_image, size=size), paths))
                unread = [p for p, (image, _) in zip(paths, pictures, strict=True) if image is None]
                if not unread:
                    images[part] = np.stack([image for image, _ in pictures])
                    images.flush()
                    done[chunk] = 1
                    done.flush()
                bad += unread
                modes.update(mode for _, mode in pictures if mode not in ("RGB", ""))
                progress.update(len(pictures))
        splits.append((split, images, found.labels[split]))
    if bad:
        raise ValueError(
            f"{len(bad)} files cannot be read as images; remove or repair them:\n{listed(bad)}"
        )
    if modes:
        kinds = ", ".join(f"{n} {mode}" for mode, n in modes.most_common())
        warnings.warn(f"converted to RGB: {kinds}", stacklevel=2)
    return splits


def read_image(path: Path, size: int) -> tuple[np.ndarray | None, str]:
    """uint8 (size, size, 3) and the file's colour mode; None when it cannot be read. The shorter side
    is fitted and the rest cropped, as usual."""
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                mode = image.mode
                fitted = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
                return np.asarray(fitted), mode
    except (
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ):
        return None, ""


def listed(paths: list) -> str:
    """The first 20, one per line, and how many more."""
    more = [f"and {len(paths) - 20} more"] if len(paths) > 20 else []
    return "\n".join(f"  {line}" for line in [*paths[:20], *more])
