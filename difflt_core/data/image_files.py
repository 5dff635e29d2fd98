"""Image files in: what a scan of the disk found, and its one-time conversion to memory-mapped bytes."""

import functools
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..engine.chunks import Chunks
from ..engine.parallel import n_cores
from .long_tail import SPLITS

__all__ = [
    "CHUNK",
    "Scan",
    "convert",
    "eight_bits",
    "endings",
    "fit_image",
    "listed",
    "open_image",
    "read_image",
    "read_images",
    "refuse_unreadable",
    "unusual",
]

CHUNK = 256  # image files per step
MODES = {1: "L", 3: "RGB"}  # PIL's colour mode for C channels
# What Pillow names but does not decode itself: it asks another program (Ghostscript, for EPS), or none.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PALM", "PDF", "WMF"}


@dataclass(frozen=True)
class Scan:
    """Image files by split, relative to their root, and labels int64 (N,)."""

    class_names: tuple[str, ...]
    files: dict[str, list[str]]
    labels: dict[str, np.ndarray]


def convert(work: Path, found: Scan, root: Path, size: int, context) -> list[tuple]:
    """Read every file of a scan as uint8 RGB; resumable.

    Returns:
        (split, images uint8 (N, size, size, 3), labels) for each split; the images are mapped from
        work / "<split>_images.npy".

    Raises:
        ValueError: files that cannot be read, by name. The other chunks are kept for the next try.
    """
    odd, bad, splits = {}, {}, []
    for split in SPLITS:
        files = [root / name for name in found.files[split]]
        images, unread, unlike = read_images(work, split, files, (size, size, 3), context)
        bad |= unread
        for kind, paths in unlike.items():
            odd.setdefault(kind, []).extend(paths)
        splits.append((split, images, found.labels[split]))
    refuse_unreadable(bad, odd)
    return splits


def read_images(
    work: Path, name: str, files: list[Path], shape: tuple[int, int, int], context
) -> tuple[np.ndarray | None, dict[Path, str], dict[str, list[Path]]]:
    """Decode, crop and shrink files to work/<name>_images.npy uint8 (N, H, W, C), chunk by chunk on
    all cores; resumable.

    Args:
        shape: (H, W, C) of the data set, C = 1 or 3.

    Returns:
        The mapped images, or None where files cannot be read; those files, and why; and the files
        that are unusual, by what is.
    """
    odd: dict[str, list[Path]] = {}
    bad: dict[Path, str] = {}
    chunks = Chunks(work, name, (len(files), *shape), CHUNK)
    with ThreadPoolExecutor(n_cores()) as pool:
        for part in chunks.todo(f"reading {name}", context):
            pictures = list(pool.map(functools.partial(_read, shape=shape), files[part]))
            unread = {}
            for path, (image, told) in zip(files[part], pictures, strict=True):
                if image is None:
                    unread[path] = told[0]
                    continue
                for kind in told:
                    odd.setdefault(kind, []).append(path)
            if not unread:
                chunks.write(part, np.stack([image for image, _ in pictures]))
            bad |= unread
    return chunks.merge() if not bad else None, bad, odd


def _read(path: Path, shape: tuple[int, int, int]) -> tuple[np.ndarray | None, list[str]]:
    """read_image, and what is unusual; or None, and why it cannot be read."""
    image, mode = read_image(path, shape)
    return image, [mode] if image is None else unusual(path, mode, shape)


def refuse_unreadable(bad: dict[Path, str], odd: dict[str, list[Path]]) -> None:
    """Raise ValueError with the files that cannot be read, and why; name those that are unusual."""
    if bad:
        faults = listed([f"{path}: {why}" for path, why in bad.items()])
        raise ValueError(
            f"{len(bad)} files cannot be read as images; remove or repair them:\n{faults}"
        )
    if odd:
        kinds = [f"{kind}: {len(paths)}\n{listed(paths)}" for kind, paths in odd.items()]
        warnings.warn("unusual files:\n" + "\n".join(kinds), stacklevel=2)


@functools.cache
def endings() -> tuple[str, ...]:
    """Of the names of the image files that are read, e.g. ".jpg"."""
    from PIL import Image

    known = Image.registered_extensions().items()
    return tuple(ending for ending, kind in known if kind not in _NOT_DECODED)


def open_image(path: Path):
    """A PIL image of a file, whatever its ending says, in a format that Pillow decodes itself."""
    from PIL import Image

    Image.init()
    return Image.open(path, formats=[kind for kind in Image.OPEN if kind not in _NOT_DECODED])


def eight_bits(image):
    """A PIL image as it is to be seen: the right way up, as a camera's EXIF entry says, and no more than
    8 bits deep, where PIL's own conversion would clip to white."""
    from PIL import Image, ImageOps

    try:
        image = ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception:  # a damaged entry says nothing; a damaged picture comes up below
        pass
    if image.mode[0] not in "IF":
        return image
    values = np.asarray(image, np.float64)
    ends = {"F": (1, 255, 65535), "I": (255, 65535)}.get(image.mode, (65535,))
    end = next((e for e in ends if values.max(initial=0) <= e), ends[-1])
    return Image.fromarray((values.clip(0, end) * (255 / end)).round().astype(np.uint8))


def fit_image(image, shape: tuple[int, int, int]) -> np.ndarray:
    """uint8 (H, W, C) of a PIL image: RGB for C = 3, grey for C = 1. The image is shrunk by Lanczos
    until it just covers (H, W), and what hangs over is cropped, as usual."""
    from PIL import Image, ImageOps

    H, W, C = shape
    fitted = ImageOps.fit(eight_bits(image).convert(MODES[C]), (W, H), Image.Resampling.LANCZOS)
    return np.asarray(fitted).reshape(H, W, C)


def read_image(path: Path, shape: tuple[int, int, int]) -> tuple[np.ndarray | None, str]:
    """uint8 (H, W, C) and the file's colour mode; or None, and why it cannot be read."""
    from PIL import Image, UnidentifiedImageError

    too_large = f"more than {Image.MAX_IMAGE_PIXELS // 10**6} million pixels"
    try:
        with open_image(path) as image:
            if (
                image.width * image.height > Image.MAX_IMAGE_PIXELS
            ):  # where PIL warns, in any thread
                return None, too_large
            return fit_image(image, shape), image.mode
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return None, too_large
    except UnidentifiedImageError:
        return None, "not an image" if path.stat().st_size else "an empty file"
    except MemoryError:
        raise
    except Exception as error:  # each of Pillow's formats has its own
        return None, str(error) or type(error).__name__


def unusual(path: Path, mode: str, shape: tuple[int, int, int]) -> list[str]:
    """What stands out of a file, and what is done about it; mode: as read_image has it."""
    kinds, wanted = [], MODES[shape[2]]
    if mode != wanted:
        kinds.append(f"Colour mode {mode}, converted to {wanted}")
    with open_image(path) as opened:
        width, height = opened.size
        if mode == wanted and ";16" in str(opened.tile):  # how its pixels lie in the file
            kinds.append("16 bits deep, read as 8")
        try:
            frames = getattr(opened, "n_frames", 1)
        except Exception:  # of any kind: Pillow walks through the rest of the file
            frames = 1
            kinds.append("Cannot be read beyond its first picture, which is taken")
    if height < shape[0] or width < shape[1]:
        kinds.append(f"Smaller than {shape[1]} x {shape[0]} pixels, enlarged")
    if max(width, height) > 3 * min(width, height):
        kinds.append("More than three times as long as wide, cropped")
    if frames > 1:
        kinds.append("Animated, the first picture is taken")
    return kinds


def listed(paths: list) -> str:
    """The first 20, one per line, and how many more."""
    more = [f"and {len(paths) - 20} more"] if len(paths) > 20 else []
    return "\n".join(f"  {line}" for line in [*paths[:20], *more])
