"""Stage 0: the datasets by name, as uint8 arrays on disk.

digits (embedded, see digits.py), cifar10 and cifar100 (torchvision's files), imagenet_lt (see
imagenet_lt.py), and folder: any directory of class folders. Nothing is downloaded unless it is asked
for.
"""

import hashlib
import json
import os
import warnings
from pathlib import Path

import numpy as np

from ..config import DataConfig
from ..engine.artifacts import file_sha256
from .digits import render_digits
from .image_files import Scan, convert
from .imagenet_lt import find_lists, scan_lists
from .long_tail import SPLITS, class_sizes

__all__ = [
    "build_data",
    "fingerprint",
    "folder_fingerprint",
    "images_in",
    "in_data_dir",
    "long_tail_indices",
    "scan_folder",
]


def build_data(work, config: dict, inputs: dict, context) -> None:
    """Write <split>_images.npy uint8 (N, H, W, C), <split>_labels.npy int64 (N,), info.json, and for
    image files <split>_files.json: N paths inside the source folder, in the order of the rows.

    config: {"data": DataConfig, "seed": int, "source": fingerprint}. A split that a dataset does
    not have is empty.
    """
    data = DataConfig.model_validate(config["data"])
    out, root, counts = work / "out", in_data_dir(data.path, context.data_dir), {}
    if data.name == "digits":
        names, splits = tuple(map(str, range(data.n_classes))), render_digits(data, config["seed"])
    elif data.from_files:
        if data.name == "folder":
            found = scan_folder(root, data, config["seed"])
        else:
            found = scan_lists(root, in_data_dir("", context.data_dir))
        names, splits = found.class_names, convert(work, found, root, data.image_size, context)
        for split, files in found.files.items():
            (out / f"{split}_files.json").write_text(json.dumps(files), encoding="utf-8")
    else:
        names, splits = _read_cifar(root, data, context.download)
    splits = list(splits)
    _warn_of_duplicates(splits)
    for split, images, labels in splits:
        converted, final = (folder / f"{split}_images.npy" for folder in (work, out))
        if converted.exists():
            os.replace(converted, final)  # last: what is in out is lost when killed
        else:
            np.save(final, images)
        np.save(out / f"{split}_labels.npy", labels)
        counts[split] = np.bincount(labels, minlength=len(names)).tolist()
    info = {"class_names": names, "counts": counts}
    (out / "info.json").write_text(json.dumps(info), encoding="utf-8")


def in_data_dir(path: str, data_dir) -> Path:
    """A path that a setting names: inside data_dir, or anywhere when it is absolute."""
    return Path(data_dir or "data") / path


def fingerprint(data: DataConfig, data_dir, download: bool = False) -> str:
    """What makes two sources the same: names, sizes and times of a folder's files; the content of
    imagenet_lt's lists (looking at 186,000 files at each use would take too long); "" for the rest,
    which are checked by content.

    Raises:
        FileNotFoundError: what is expected where.
    """
    root = in_data_dir(data.path, data_dir)
    if data.name == "digits":
        return ""
    if data.name == "imagenet_lt":
        return " ".join(map(file_sha256, find_lists(root, in_data_dir("", data_dir)).values()))
    if data.name != "folder":
        base = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[data.name]
        if not (root / base).is_dir() and not download:
            raise FileNotFoundError(
                f"{data.name}: expected the folder {root / base} (the unpacked Python version); "
                "put it there, choose another --data-dir, or let --download fetch it"
            )
        return ""
    if not root.is_dir():
        raise FileNotFoundError(
            f"folder: expected a directory with one folder per class at {root}; "
            "choose it with --set path=NAME (inside --data-dir, or an absolute path)"
        )
    return folder_fingerprint(root)


def folder_fingerprint(root: Path) -> str:
    """SHA-256 of the names, sizes and times of all files below a folder."""
    digest = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        stat = path.stat()
        digest.update(f"{path.relative_to(root)}|{stat.st_size}|{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def long_tail_indices(labels, counts, seed: int = 0) -> np.ndarray:
    """Which images the community's protocol keeps: int64, class after class (docs/protocol.md, Which images).

    NumPy's legacy generator is seeded once; each class, in ascending order, is shuffled in file
    order and its first n_c are kept. So a smaller subset is part of a larger one.

    Raises:
        ValueError: a class with fewer images than asked for, or none left.
    """
    labels, generator, kept = np.asarray(labels), np.random.RandomState(seed), []
    for c, n in enumerate(counts):
        members = np.flatnonzero(labels == c)
        if not 1 <= n <= len(members):
            raise ValueError(
                f"class {c}: expected 1 to {len(members)} images after the cut, got {n}; "
                "change n_max or imb_ratio"
            )
        generator.shuffle(members)
        kept.append(members[:n])
    return np.concatenate(kept)


def _read_cifar(root: Path, data: DataConfig, download: bool):
    """Class names, and train (cut to a long tail), no val, and the whole test set."""
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[data.name]
    try:  # the files are checked by their hash before they are unpickled
        train, test = (kind(root, train=t, download=download) for t in (True, False))
    except RuntimeError as error:
        message = f"{data.name} in {root}: {error}; some file is missing or damaged: fetch it again"
        raise FileNotFoundError(message) from None
    labels = np.asarray(train.targets, dtype=np.int64)
    counts = class_sizes(len(train.classes), data.n_max, data.imb_ratio, data.imb_type)
    kept = long_tail_indices(labels, counts)
    none = np.zeros((0, *test.data.shape[1:]), np.uint8)
    splits = [
        ("train", train.data[kept], labels[kept]),
        ("val", none, np.zeros(0, np.int64)),
        ("test", test.data, np.asarray(test.targets, dtype=np.int64)),
    ]
    return tuple(train.classes), splits


def scan_folder(root: Path, data: DataConfig, seed: int) -> Scan:
    """Find the images of a directory: train/, val/, test/ with class folders, or class folders alone,
    which are then split by class and seed (data.val_share, data.test_share).

    With data.imb_ratio the training part is cut to a long tail, classes in the order of their names.

    Raises:
        ValueError: no class, an empty one, or one that only val or test knows.
    """
    split_here = not (root / "train").is_dir()
    base = root if split_here else root / "train"
    names = tuple(sorted(p.name for p in base.iterdir() if p.is_dir() and p.name[0] != "."))
    if len(names) < 2:
        raise ValueError(f"{base}: expected at least two class folders, got {len(names)}")
    files: dict[str, list[Path]] = {split: [] for split in SPLITS}
    labels: dict[str, list[int]] = {split: [] for split in SPLITS}
    for c, name in enumerate(names):
        if split_here:
            parts = _split_class(images_in(base / name), data, seed, name)
        else:
            parts = {split: images_in(root / split / name) for split in SPLITS}
        if not parts["train"]:
            raise ValueError(
                f"class {name!r} has no training image in {base / name}: add some or remove it"
            )
        for split, found in parts.items():
            files[split] += found
            labels[split] += [c] * len(found)
    for split in ("val", "test") if not split_here else ():
        here = root / split
        unknown = (
            sorted({p.name for p in here.iterdir() if p.is_dir()} - set(names))
            if here.is_dir()
            else []
        )
        if unknown:
            raise ValueError(f"{here}: unknown classes {unknown}; {base} has {list(names)}")
    arrays = {split: np.asarray(labels[split], dtype=np.int64) for split in SPLITS}
    if data.imb_ratio is not None:
        largest = data.n_max or int(np.bincount(arrays["train"]).max())
        counts = class_sizes(len(names), largest, data.imb_ratio, data.imb_type)
        kept = long_tail_indices(arrays["train"], counts)
        files["train"], arrays["train"] = [files["train"][i] for i in kept], arrays["train"][kept]
    relative = {s: [p.relative_to(root).as_posix() for p in files[s]] for s in SPLITS}
    return Scan(names, relative, arrays)


def images_in(folder: Path) -> list[Path]:
    """Its files with an image's extension, by name, at any depth."""
    from PIL import Image

    known = {extension for extension in Image.registered_extensions()}
    found = folder.rglob("*") if folder.is_dir() else ()
    return sorted(p for p in found if p.suffix.lower() in known and p.name[0] != ".")


def _split_class(
    files: list[Path], data: DataConfig, seed: int, name: str
) -> dict[str, list[Path]]:
    """At least one image stays for training; a class of one or two has no test or no val image."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    order = np.random.default_rng(int.from_bytes(digest[:8], "big")).permutation(len(files))
    n_test = min(max(1, round(data.test_share * len(files))), len(files) - 1) if files else 0
    n_val = min(round(data.val_share * len(files)), len(files) - n_test - 1) if files else 0
    parts = np.split(order, [n_test, n_test + max(0, n_val)])
    return {
        s: [files[i] for i in np.sort(p)]
        for s, p in zip(("test", "val", "train"), parts, strict=True)
    }


def _warn_of_duplicates(splits: list) -> None:
    """The same picture in training and test flatters every method."""
    seen = {
        split: {hashlib.sha256(image.tobytes()).digest() for image in images}
        for split, images, _ in splits
    }
    for split in ("val", "test"):
        both = len(seen["train"] & seen[split])
        if both:
            warnings.warn(
                f"{both} images are in both train and {split}; accuracies will flatter",
                stacklevel=2,
            )
