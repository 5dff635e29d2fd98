"""Stage 0: the data sets by name, as uint8 arrays on disk. READERS has one entry for each.

Nothing is downloaded unless it is asked for.
"""

import hashlib
import json
import shutil
import warnings
from pathlib import Path

import numpy as np

from ..config import DataConfig
from ..engine.chunks import give_out
from ..engine.files import file_sha256
from ..engine.provenance import ROOT
from .digits import render_digits
from .folders import check_layout, check_unchanged, folder_fingerprint, scan_folder
from .image_files import convert
from .imagenet_lt import find_lists, scan_lists, sizes_of_some
from .published import find_cifar, find_fashion, read_cifar, read_fashion

__all__ = ["READERS", "build_data", "fingerprint", "in_data_dir"]


def _digits(work, data: DataConfig, seed: int, context):
    return tuple(map(str, range(data.n_classes))), render_digits(data, seed)


def _cifar(work, data: DataConfig, seed: int, context):
    return read_cifar(in_data_dir(data.path, context.data_dir), data, seed, context.download)


def _fashion(work, data: DataConfig, seed: int, context):
    return read_fashion(in_data_dir(data.path, context.data_dir), data, seed, context.download)


def _folder(work, data: DataConfig, seed: int, context):
    root = in_data_dir(data.path, context.data_dir)
    try:
        return _from_files(work, scan_folder(root, data, seed), root, data, context)
    except ValueError:  # a repaired folder has another key, so nobody would use what was read
        for made in (*work.glob("*_chunks"), *work.glob("*_images.npy")):
            shutil.rmtree(made) if made.is_dir() else made.unlink()
        raise


def _imagenet(work, data: DataConfig, seed: int, context):
    root = in_data_dir(data.path, context.data_dir)
    found = scan_lists(root, in_data_dir("", context.data_dir))
    return _from_files(work, found, root, data, context)


def _from_files(work, found, root: Path, data: DataConfig, context):
    splits = convert(work, found, root, data.image_size, context)
    for split, files in found.files.items():
        (work / "out" / f"{split}_files.json").write_text(json.dumps(files), encoding="utf-8")
    return found.class_names, splits


# By name: (work, data, seed, context) -> class names, and (split, images uint8 (N, H, W, C), labels
# int64 (N,)) of train, val and test. A stage's code version has its own entry alone.
READERS = {
    "digits": _digits,
    "cifar10": _cifar,
    "cifar100": _cifar,
    "fashion_mnist": _fashion,
    "imagenet_lt": _imagenet,
    "folder": _folder,
}


def build_data(work, config: dict, inputs: dict, context) -> None:
    """Write <split>_images.npy uint8 (N, H, W, C), <split>_labels.npy int64 (N,), info.json, and for
    image files <split>_files.json: N paths inside the source folder, in the order of the rows.

    config: {"data": DataConfig, "seed": int, "source": fingerprint}. A split that a dataset does
    not have is empty.
    """
    data, out, counts = DataConfig.model_validate(config["data"]), work / "out", {}
    if data.name == "folder":
        root = in_data_dir(data.path, context.data_dir)
        check_unchanged(root, folder_fingerprint(root), config["source"])
    names, found = READERS[data.name](work, data, config["seed"], context)
    splits = list(found)
    _warn_of_duplicates(splits)
    for split, images, labels in splits:
        converted, final = (folder / f"{split}_images.npy" for folder in (work, out))
        if converted.exists():
            give_out(converted, final)
        else:
            np.save(final, images)
        np.save(out / f"{split}_labels.npy", labels)
        counts[split] = np.bincount(labels, minlength=len(names)).tolist()
    info = {"class_names": names, "counts": counts}
    (out / "info.json").write_text(json.dumps(info), encoding="utf-8")


def in_data_dir(path: str, data_dir) -> Path:
    """A path that a setting names: inside data_dir ("" is data/ in the checkout), or anywhere when it is
    absolute."""
    return Path(data_dir or ROOT / "data") / path


def fingerprint(data: DataConfig, data_dir, download: bool = False) -> str:
    """What makes two sources the same: names, sizes and times of a folder's images; the content of
    imagenet_lt's lists and the sizes of some of their files (looking at 186,000 at each use would take
    too long); "" for the digits, for CIFAR, whose content is checked, and for Fashion-MNIST, whose files
    are told from MNIST's alone.

    Raises:
        FileNotFoundError: what is expected where. ValueError: a folder that could not be trained or tested
            on (folders.check_layout).
    """
    root = in_data_dir(data.path, data_dir)
    if data.name == "imagenet_lt":
        lists = find_lists(root, in_data_dir("", data_dir))
        return " ".join([*map(file_sha256, lists.values()), sizes_of_some(root, lists)])
    if data.name == "fashion_mnist":
        find_fashion(root, download)
    if data.name in ("cifar10", "cifar100"):
        find_cifar(root, data, download)
    if data.name != "folder":
        return ""
    if not root.is_dir():
        raise FileNotFoundError(
            f"folder: expected a directory with one folder per class at {root}; "
            "choose it with --set path=NAME (inside --data-dir, or an absolute path)"
        )
    check_layout(root)
    return folder_fingerprint(root)


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
