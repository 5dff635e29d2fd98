"""Published sets in their own files: CIFAR-10, CIFAR-100 and Fashion-MNIST, cut to a long tail."""

import contextlib
import gzip
import zlib
from pathlib import Path

import numpy as np
from filelock import FileLock

from ..config import DataConfig
from .image_files import fit_image
from .long_tail import class_sizes, left_out_indices, long_tail_indices

__all__ = ["DEBIAN_FASHION", "find_cifar", "find_fashion", "read_cifar", "read_fashion"]

DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")  # of Debian's dataset-fashion-mnist
_CIFAR_FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
_FASHION_PARTS = {"train": ("train", 60_000), "test": ("t10k", 10_000)}


def find_cifar(root: Path, data: DataConfig, download: bool) -> None:
    """Check that the set's own files are there, or may be fetched.

    Raises:
        FileNotFoundError: what is expected where.
    """
    base = root / _CIFAR_FOLDERS[data.name]
    if not base.is_dir() and not download:
        raise FileNotFoundError(
            f"{data.name}: expected the folder {base} (the unpacked Python version); "
            "put it there, choose another --data-dir, or let --download fetch it (in JupyterLab: %env DIFFLT_DOWNLOAD=1)"
        )


def read_cifar(root: Path, data: DataConfig, seed: int, download: bool):
    """Class names, and train, val and test as (split, images uint8 (N, S, S, 3), labels int64)."""
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[data.name]
    try:  # the files are checked by their hash before they are unpickled
        with _one_at_a_time(root, download):
            train, test = (kind(root, train=t, download=download) for t in (True, False))
    except RuntimeError as error:
        message = f"{data.name} in {root}: {error}; some file is missing or damaged: fetch it again"
        raise FileNotFoundError(message) from None
    parts = {
        s: (d.data, np.asarray(d.targets, np.int64)) for s, d in (("train", train), ("test", test))
    }
    return tuple(train.classes), _cut(parts, len(train.classes), data, seed)


def _one_at_a_time(root: Path, download: bool):
    """Where files are fetched: several stages may want them at once, and torchvision writes in place."""
    if not download:
        return contextlib.nullcontext()
    root.mkdir(parents=True, exist_ok=True)
    return FileLock(root / ".download.lock")


def find_fashion(root: Path, download: bool) -> Path | None:
    """The folder with Fashion-MNIST's four files, as torchvision or Debian's package put them; None
    where they may be fetched.

    Raises:
        FileNotFoundError: what is expected where.
    """
    wanted = [f"{name}-{kind}" for name, _ in _FASHION_PARTS.values() for kind in _FASHION_KINDS]
    for place in (root, root / "FashionMNIST" / "raw", DEBIAN_FASHION):
        if all((place / n).is_file() or (place / f"{n}.gz").is_file() for n in wanted):
            return place
    if download:
        return None
    raise FileNotFoundError(
        f"fashion_mnist: expected {', '.join(wanted)}, plain or .gz, in {root}, in "
        f"{root / 'FashionMNIST' / 'raw'} or in {DEBIAN_FASHION} (Debian's package "
        "dataset-fashion-mnist); put them there, or let --download fetch them (in JupyterLab: %env DIFFLT_DOWNLOAD=1)"
    )


def read_fashion(root: Path, data: DataConfig, seed: int, download: bool):
    """Class names, and train, val and test as (split, images uint8 (N, S, S, 1), labels int64).

    Raises:
        ValueError: a file that is damaged or not of Fashion-MNIST, by name.
    """
    from torchvision.datasets import FashionMNIST

    place = find_fashion(root, download)
    if place is None:
        with _one_at_a_time(root, download):
            try:
                FashionMNIST(root, download=True)  # checked by its hashes
            except RuntimeError as error:
                raise FileNotFoundError(
                    f"fashion_mnist: {root}: cannot be fetched ({error}); try again, or put the files there"
                ) from None
        place = root / "FashionMNIST" / "raw"
    parts = {}
    for split, (name, n) in _FASHION_PARTS.items():
        images, labels = (_read_idx(place, f"{name}-{k}", n) for k in _FASHION_KINDS)
        if bytes(labels[:10, 0]) in _MNIST:
            raise ValueError(
                f"fashion_mnist: {place} holds MNIST's handwritten digits, whose files have the same names; "
                "put Fashion-MNIST's there, or choose another --data-dir"
            )
        if labels.max() > 9:
            raise ValueError(
                f"fashion_mnist: {place}: the labels of {name} should be 0 to 9, one is {labels.max()}; "
                "remove the files, and fetch them again"
            )
        parts[split] = images.reshape(n, 28, 28, 1), labels[:, 0].astype(np.int64)
    return tuple(FashionMNIST.classes), _cut(parts, 10, data, seed)


# Of a file: the head that it must have, up to its number of entries, and the bytes of an entry.
_FASHION_KINDS = {"images-idx3-ubyte": (2051, 784), "labels-idx1-ubyte": (2049, 1)}
# The first labels of MNIST's training and test files, which have the same names and heads.
_MNIST = (bytes([5, 0, 4, 1, 9, 2, 1, 3, 1, 4]), bytes([7, 2, 1, 0, 4, 1, 4, 9, 5, 9]))


def _read_idx(place: Path, name: str, n: int) -> np.ndarray:
    """The entries uint8 (n, bytes of an entry) of an IDX file."""
    path = place / name if (place / name).is_file() else place / f"{name}.gz"
    magic, size = _FASHION_KINDS[name.partition("-")[2]]
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"fashion_mnist: {path} cannot be read ({error}); remove it, and fetch it again"
        ) from None
    head = 16 if size > 1 else 8
    found = int.from_bytes(data[:4], "big"), int.from_bytes(data[4:8], "big"), len(data)
    if found != (magic, n, head + n * size):
        raise ValueError(
            f"fashion_mnist: {path}: expected magic number {magic}, {n} entries and "
            f"{head + n * size} bytes, got {found[0]}, {found[1]} and {found[2]}; remove it, and fetch it again"
        )
    return np.frombuffer(data, np.uint8, offset=head).reshape(n, size)


def _cut(parts: dict, n_classes: int, data: DataConfig, seed: int):
    """Train cut to a long tail, val of what the cut leaves out, where there are as many, and the whole
    test set; all at the size asked for."""
    images, labels = parts["train"]
    counts = class_sizes(n_classes, data.n_max, data.imb_ratio, data.imb_type)
    rows = (
        long_tail_indices(labels, counts, seed),
        left_out_indices(labels, counts, data.n_val, seed),
    )
    for split, kept in zip(("train", "val"), rows, strict=True):
        yield split, _shrunk(images[kept], data.image_size), labels[kept]
    images, labels = parts["test"]
    yield "test", _shrunk(images, data.image_size), labels


def _shrunk(images: np.ndarray, size: int) -> np.ndarray:
    """uint8 (N, size, size, C), by Lanczos where the images are larger."""
    from PIL import Image

    if images.shape[1] == size:
        return images
    pictures = (Image.fromarray(i[..., 0] if i.shape[-1] == 1 else i) for i in images)
    shape = size, size, images.shape[-1]
    small = [fit_image(picture, shape) for picture in pictures]
    return np.stack(small) if small else np.zeros((0, *shape), np.uint8)
