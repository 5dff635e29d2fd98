"""How memory, disk and time grow with the number of images, measured at a few sizes and drawn out to
ImageNet-LT at 64 pixels with every class filled up."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from ..data.image_files import CHUNK
from ..engine.chunks import Chunks
from ..engine.progress import Context
from ..engine.provenance import hardware
from ..generation.memorisation import nearest_training
from ..generation.quality import PRC_IMAGES, fid, precision_recall
from .cost import IMAGENET_LT
from .shared import in_a_process, write
from .timing import peak_gib

__all__ = ["add_options", "run"]

SIDE, D = 64, 512  # pixels; features of ResNet-10
SIZES = (2000, 4000, 8000)


def add_options(parser) -> None:
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="N")


def run(options) -> None:
    """Each part in a process of its own at each size; what a thousand images more cost, by a line."""
    options.device, rows = "cpu", []
    n_classes, n_max, real = IMAGENET_LT
    filled = n_classes * n_max - real
    for name, (part, n_images, what) in _PARTS.items():
        found = [in_a_process(_measured, name, n) for n in options.sizes]
        slope = {key: np.polyfit(options.sizes, [f[key] for f in found], 1)[0] for key in found[0]}
        last, more = found[-1], n_images(real, filled) - options.sizes[-1]
        rows.append(
            {
                "part": f"{what} ({part.__doc__})",
                "MB of RAM, 1,000 images more": 1000 * slope["mb"],
                "s, 1,000 images more": 1000 * slope["s"],
                "images of ImageNet-LT": n_images(real, filled),
                "GB of RAM there": (last["mb"] + slope["mb"] * more) / 1000,
                "minutes there": (last["s"] + slope["s"] * more) / 60,
            }
        )
    table = pd.DataFrame(rows)
    numbers = table.columns[1:]
    table[numbers] = table[numbers].map(lambda v: f"{v:.3g}" if v < 1e4 else f"{v:,.0f}")
    bytes_each = SIDE * SIDE * 3
    chunks = -(-filled // 512) + -(-real // CHUNK)
    notes = (
        f"Disk: {real * bytes_each / 1e9:.1f} GB of real images and {filled * bytes_each / 1e9:.1f} GB of "
        f"generated ones, at {SIDE} pixels, which are mapped and never held (mapped pages count above while nobody else wants the memory); each once more, and {chunks:,} files "
        f"in chunks, while they are made. A stage leaves 2 to 6 files."
    )
    face = f"Measured at {', '.join(map(str, options.sizes))} images, {hardware('cpu')}; all columns are from the line fitted to these."
    write(options, "memory-cpu", face, table, {"rows": rows, "sizes": list(options.sizes)}, notes)


def _measured(name: str, n: int) -> dict:
    """Peak memory in MB beyond that of the imports, and seconds."""
    part = _PARTS[name][0]
    with tempfile.TemporaryDirectory() as folder:
        prepared = _images(Path(folder), n)
        before, began = peak_gib("cpu"), time.monotonic()
        part(prepared, n)
        more, taken = peak_gib("cpu") - before, time.monotonic() - began
        return {"mb": more * 2**30 / 1e6, "s": taken}


def _images(folder: Path, n: int, high: int = 256) -> np.ndarray:
    """n images of values below high in a mapped file, written in chunks like generated ones."""
    chunks, draw = Chunks(folder, "any", (n, SIDE, SIDE, 3), 512), np.random.default_rng(0)
    for part in chunks.todo("", Context(progress=False)):
        shape = (part.stop - part.start, SIDE, SIDE, 3)
        chunks.write(part, draw.integers(0, high, shape, np.uint8))
    return chunks.merge()


def _merge(images: np.ndarray, n: int) -> None:
    """chunk files to one"""
    with tempfile.TemporaryDirectory() as folder:
        _images(Path(folder), n, high=1)


def _fid(images: np.ndarray, n: int) -> None:
    """FID of 512 features"""
    draw = np.random.default_rng(0)
    features = draw.normal(size=(n, D)).astype(np.float32)
    fid(features, features[::-1])


def _precision_recall(images: np.ndarray, n: int) -> None:
    """precision and recall, at most 10,000 of either"""
    features = np.random.default_rng(0).normal(size=(n, D)).astype(np.float32)
    precision_recall(features, features[::-1])


def _nearest(images: np.ndarray, n: int) -> None:
    """the nearest of n training images, for 200 images"""
    nearest_training(images[:200], images)


_PARTS: dict[str, tuple[Callable, Callable, str]] = {
    "merge": (_merge, lambda real, filled: filled, "writing generated images"),
    "fid": (_fid, lambda real, filled: 20_000, "quality"),
    "precision_recall": (_precision_recall, lambda real, filled: PRC_IMAGES, "quality"),
    "nearest": (_nearest, lambda real, filled: real, "memorisation"),
}
