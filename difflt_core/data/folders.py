"""Class folders of images: which files there are, in which split, and what makes two folders the same."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from ..config import DataConfig
from .image_files import Scan, endings
from .long_tail import SPLITS, class_sizes, left_out_indices, long_tail_indices

__all__ = [
    "check_layout",
    "check_unchanged",
    "class_folders",
    "folder_fingerprint",
    "images_in",
    "kinds",
    "left_out",
    "loose_images",
    "scan_folder",
    "training_counts",
]

_NOT_VAL = ("valid", "validation", "dev", "eval")  # what others call val/
_PARTS = {*SPLITS, *_NOT_VAL, "training", "testing"}
_TEST_SEED = 0
_LINKED = 2  # class folders and splits may be links to elsewhere; below them, a link may be a loop


def folder_fingerprint(root: Path, every_file: bool = False) -> str:
    """SHA-256 of the names, sizes and times of all images below a folder, or of every file, hidden ones
    apart."""
    digest, start = hashlib.sha256(), len(os.fspath(root)) + 1
    for entry in _files_below(root, _LINKED):
        if not (every_file or _is_image(entry)):
            continue  # a file that a file manager leaves there changes nothing
        stat = entry.stat()
        name = os.fsencode(entry.path)[start:]
        digest.update(name + f"|{stat.st_size}|{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def check_unchanged(path: Path, now: str, then: str) -> None:
    """Raise ValueError where a source is not what it was when the run looked at it.

    Args:
        now, then: its fingerprints.
    """
    if now != then:
        raise ValueError(
            f"{path}: has changed since this run first looked at it; start the run again (in a "
            "notebook: from the first cell)"
        )


def scan_folder(root: Path, data: DataConfig, seed: int) -> Scan:
    """Find the images of a directory: train/, val/, test/ with class folders, or class folders alone,
    which are then split by class and seed (data.val_share, data.test_share). Where train/ has no test/
    beside it, the share for testing is taken from it.

    With data.imb_ratio the training part is cut to a long tail, classes in the order of their names; a
    folder without val/ then gets data.n_val images of each class that the cut leaves out, where there
    are as many.

    Raises:
        ValueError: no class, an empty one, or one that only val or test knows.
    """
    split_here = not (root / "train").is_dir()
    base = root if split_here else root / "train"
    names = tuple(class_folders(base))
    _refuse_classes_beside(root, split_here)
    if len(names) < 2:
        raise ValueError(f"{base}: expected at least two class folders, got {len(names)}")
    if data.n_classes not in (None, len(names)):
        raise ValueError(
            f"n_classes: expected the {len(names)} class folders of {base}, got {data.n_classes}; leave it out"
        )
    untested = not split_here and not (root / "test").is_dir()
    files: dict[str, list[Path]] = {split: [] for split in SPLITS}
    labels: dict[str, list[int]] = {split: [] for split in SPLITS}
    for c, name in enumerate(names):
        if split_here:
            parts = _split_class(images_in(base / name), data, seed, name)
        else:
            parts = {split: images_in(root / split / name) for split in SPLITS}
            if untested:
                alone = data.model_copy(update={"val_share": 0.0})
                parts |= _split_class(parts["train"], alone, seed, name) | {"val": parts["val"]}
        if not parts["train"]:
            raise ValueError(
                f"class {name!r} has no training image in {base / name}: add some or remove it"
            )
        for split, found in parts.items():
            files[split] += found
            labels[split] += [c] * len(found)
    for split in ("val", "test") if not split_here else ():
        here = root / split
        unknown = [n for n in class_folders(here) if n not in names] if here.is_dir() else []
        if unknown:
            raise ValueError(f"{here}: unknown classes {unknown}; {base} has {list(names)}")
    arrays = {split: np.asarray(labels[split], dtype=np.int64) for split in SPLITS}
    if data.imb_ratio is not None:
        largest = data.n_max or int(np.bincount(arrays["train"]).max())
        counts = class_sizes(len(names), largest, data.imb_ratio, data.imb_type)
        rows = {"train": long_tail_indices(arrays["train"], counts, seed)}
        if not files["val"]:
            rows["val"] = left_out_indices(arrays["train"], counts, data.n_val, seed)
        offered, classes = files["train"], arrays["train"]
        for split, kept in rows.items():
            files[split], arrays[split] = [offered[i] for i in kept], classes[kept]
    relative = {s: [p.relative_to(root).as_posix() for p in files[s]] for s in SPLITS}
    return Scan(names, relative, arrays)


def _refuse_classes_beside(root: Path, split_here: bool) -> None:
    """Raise where a folder train/ may be a class, as others with images stand beside it."""
    beside = [] if split_here else [p for p in _folders(root) if p.name not in SPLITS]
    classes = [p.name for p in beside if _has_image(p)]
    if classes:
        raise ValueError(
            f"{root}: train/ is the training part, with a folder for each class, and beside it are images "
            f"in {', '.join(classes[:5])}; move those away, or rename train/ if it is a class"
        )


def check_layout(root: Path) -> None:
    """What a scan lets pass, or cannot name the reason of, before anything is trained.

    Raises:
        ValueError: a test part without an image in any class folder, parts of other names, a class whose
            files are all of kinds that are not read, a file name that is not UTF-8.
    """
    _refuse_not_utf8(root, (entry.path for entry in _files_below(root, _LINKED)))
    train, test = root / "train", root / "test"
    names = [] if train.is_dir() else class_folders(root)
    if names and _PARTS.issuperset(map(str.lower, names)):
        raise ValueError(
            f"{root}: {', '.join(names)} look like parts of a data set, not like classes; the parts are called "
            "train/, val/ and test/ here, train/ at least: rename them"
        )
    for name in _NOT_VAL if train.is_dir() else ():
        if _has_image(root / name):
            raise ValueError(f"{root / name}: the validation part is called val/ here; rename it")
    if train.is_dir() and test.is_dir():
        if not any(_has_image(test / name) for name in class_folders(test)):
            raise ValueError(
                f"{test}: expected images in class folders, as in train/, got {kinds(_below(test))}; put them "
                "there, or remove test/: then a fifth of train/ is kept for testing"
            )
    base = train if train.is_dir() else root
    for name in class_folders(base):
        if not _has_image(base / name) and (there := _below(base / name)):
            raise ValueError(
                f"class {name!r}: expected images in {base / name}, got {kinds(there)}; convert them to JPEG "
                "or PNG, or remove the folder"
            )


def kinds(names: Iterable[str]) -> str:
    """Files in words: "500 .heic, 2 no extension", or "nothing"."""
    found = Counter(Path(name).suffix.lower() or "no extension" for name in names)
    return ", ".join(f"{n} {kind}" for kind, n in found.most_common()) or "nothing"


def _has_image(folder: Path) -> bool:
    """Looks no farther than the first one."""
    return folder.is_dir() and any(map(_is_image, _files_below(folder)))


def _below(folder: Path) -> list[str]:
    return [entry.path for entry in _files_below(folder)]


def training_counts(root: Path, data: DataConfig, seed: int) -> list[int]:
    """How many training images each class of a directory has before any cut; raises as scan_folder
    does."""
    whole = data.model_copy(update={"n_max": None, "imb_ratio": None})
    found = scan_folder(root, whole, seed)
    return np.bincount(found.labels["train"], minlength=len(found.class_names)).tolist()


def class_folders(folder: Path) -> list[str]:
    """The names of its folders that are not hidden, sorted.

    Raises:
        ValueError: a name that is not UTF-8, as no table could be written with it.
    """
    found = _folders(folder)
    _refuse_not_utf8(folder, map(str, found))
    return [p.name for p in found]


def _refuse_not_utf8(folder: Path, paths: Iterable[str]) -> None:
    """Raise where the names of what is below a folder are not UTF-8; its own may be."""
    start = len(os.fspath(folder))
    odd = [os.fsencode(path[start:].lstrip("/")) for path in paths if not _is_utf8(path[start:])]
    if odd:
        raise ValueError(f"{folder}: {len(odd)} names are not UTF-8, as {odd[0]!r}; rename them")


def _is_utf8(name: str) -> bool:
    """Python keeps the other bytes of a name as lone surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def _folders(folder: Path) -> list[Path]:
    """Its folders that are not hidden, by name."""
    return sorted(p for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")


def left_out(root: Path) -> list[str]:
    """Files of a directory, relative to it, that nothing reads: without an image's extension."""
    others = (e for e in _files_below(root, _LINKED) if not _is_image(e))
    return [Path(entry.path).relative_to(root).as_posix() for entry in others]


def loose_images(root: Path) -> list[str]:
    """Images of a directory, relative to it, that lie beside the class folders and in none: nothing reads
    them."""
    parts = [root, *(root / split for split in SPLITS if (root / "train").is_dir())]
    found: list[Path] = []
    for part in (p for p in parts if p.is_dir()):
        with os.scandir(part) as entries:
            images = (e for e in entries if e.name[0] != "." and e.is_file() and _is_image(e))
            found += sorted(Path(entry.path) for entry in images)
    return [path.relative_to(root).as_posix() for path in found]


def images_in(folder: Path) -> list[Path]:
    """Its files with an image's extension, by name, at any depth."""
    found = _files_below(folder) if folder.is_dir() else ()
    return [Path(entry.path) for entry in found if _is_image(entry)]


def _is_image(entry: os.DirEntry) -> bool:
    return entry.name.lower().endswith(endings())


def _files_below(folder: Path | str, linked: int = 0) -> Iterator[os.DirEntry]:
    """Its files at any depth, in the order of their paths' parts, without hidden ones and hidden
    folders. Links to folders are entered in so many levels from here."""
    with os.scandir(folder) as found:
        entries = sorted((e for e in found if e.name[0] != "."), key=lambda entry: entry.name)
    for entry in entries:
        try:
            is_folder = entry.is_dir(follow_symlinks=linked > 0)
            is_file = not is_folder and entry.is_file()
        except OSError:  # a link that leads to itself
            continue
        if is_folder:
            yield from _files_below(entry.path, linked - 1)
        elif is_file:
            yield entry


def _split_class(
    files: list[Path], data: DataConfig, seed: int, name: str
) -> dict[str, list[Path]]:
    """At least one image stays for training; a class of one or two has no test or no val image. The
    seed decides between val and train alone, so that no other seed trains or chooses on the test images."""
    n_test = min(max(1, round(data.test_share * len(files))), len(files) - 1) if files else 0
    n_val = min(round(data.val_share * len(files)), len(files) - n_test - 1) if files else 0
    order = _shuffled(len(files), _TEST_SEED, name)
    order[n_test:] = order[n_test:][_shuffled(len(files) - n_test, seed, name)]
    parts = np.split(order, [n_test, n_test + max(0, n_val)])
    return {
        s: [files[i] for i in np.sort(p)]
        for s, p in zip(("test", "val", "train"), parts, strict=True)
    }


def _shuffled(n: int, seed: int, name: str) -> np.ndarray:
    """A permutation int64 (n,) of a class's images."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big")).permutation(n)
