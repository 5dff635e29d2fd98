"""ImageNet-LT: ILSVRC2012's files by the published lists (docs/protocol.md, ImageNet-LT)."""

import hashlib
import os
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from .image_files import Scan, listed
from .long_tail import SPLITS

__all__ = ["find_lists", "parse_lists", "scan_lists", "sizes_of_some"]

_LIST = "ImageNet_LT_{}.txt"
_ROW = re.compile(r"(\S+/\S+) (\d{1,18})")


def find_lists(root: Path, data_dir: Path) -> dict[str, Path]:
    """The list of each split, in the ILSVRC2012 root or in the data folder.

    Raises:
        FileNotFoundError: what is expected where.
    """
    if not all((root / part).is_dir() for part in ("train", "val")):
        raise FileNotFoundError(
            f"imagenet_lt: expected the unpacked ILSVRC2012 at {root}, with train/ and val/ of one "
            "folder per synset; choose it with --set path=NAME (inside --data-dir, or absolute)"
        )
    places, lists = dict.fromkeys((root, data_dir)), {}
    for split in SPLITS:
        name = _LIST.format(split)
        lists[split] = next((d / name for d in places if (d / name).is_file()), None)
        if lists[split] is None:
            raise FileNotFoundError(
                f"imagenet_lt: expected {name} in {' or '.join(map(str, places))}; put it there: "
                "the three lists come with OLTR (Liu et al., CVPR 2019; OpenLongTailRecognition)"
            )
    return lists


def sizes_of_some(root: Path, lists: dict[str, Path]) -> str:
    """SHA-256 of the sizes of a hundred files of each list at most: another copy of the images, at another
    size, has others; a file that was mended is hardly among them. What is not there is named when it is
    read."""
    digest = hashlib.sha256()
    for path in lists.values():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        every = max(8, len(lines) // 100)
        for line in lines[every // 2 :: every]:
            file = root / line.rpartition(" ")[0]
            digest.update(f"{file.stat().st_size if file.is_file() else -1} ".encode())
    return digest.hexdigest()


def scan_lists(root: Path, data_dir: Path) -> Scan:
    """What the lists name, all of it present under the root.

    Raises:
        ValueError: as parse_lists. FileNotFoundError: no root, no list, or files that are missing.
    """
    lists = find_lists(root, data_dir)
    found = parse_lists({s: p.read_text("utf-8-sig", "replace") for s, p in lists.items()})
    paths = [root / name for split in SPLITS for name in found.files[split]]
    with ThreadPoolExecutor() as pool:
        missing = [
            p for p, there in zip(paths, pool.map(os.path.isfile, paths), strict=True) if not there
        ]
    if missing:
        raise FileNotFoundError(
            f"imagenet_lt: {len(missing)} of the {len(paths)} listed files are missing; unpack them "
            f"(one folder per synset, in val/ too):\n{listed(missing)}"
        )
    return found


def parse_lists(texts: dict[str, str]) -> Scan:
    """Paths, labels and classes from the text of the lists, one `relative/path label` per line.

    A class is named by its synset, the parent folder of its files; class c is the synset at
    position c in sorted order.

    Raises:
        ValueError: naming list and line: no `path label`, a path that leaves the root, a label of
            two synsets or that training does not know, a class without a training image.
    """
    rows = {split: _parse_rows(texts[split], _LIST.format(split)) for split in SPLITS}
    names = _class_names(rows["train"])
    for split in SPLITS:
        for i, (path, label) in enumerate(rows[split], 1):
            where = f"{_LIST.format(split)}, line {i}"
            if label >= len(names):
                raise ValueError(
                    f"{where}: expected a label of the training list, 0 to {len(names) - 1}, got {label}"
                )
            if _synset(path) != names[label]:
                raise ValueError(
                    f"{where}: label {label} is {names[label]} in the training list, got {path[:100]}"
                )
    files = {split: [path for path, _ in rows[split]] for split in SPLITS}
    _warn_of_shared_paths(files)
    labels = {s: np.array([label for _, label in rows[s]], dtype=np.int64) for s in SPLITS}
    return Scan(names, files, labels)


def _parse_rows(text: str, name: str) -> list[tuple[str, int]]:
    """(path, label) of each line."""
    rows = []
    for i, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        match = _ROW.fullmatch(line)
        if match is None:
            raise ValueError(
                f"{name}, line {i}: expected `relative/path label`, a label from 0 on, "
                f"got {line[:100]!r}"
            )
        path = match[1]
        if path[0] == "/" or ".." in path.split("/"):
            raise ValueError(
                f"{name}, line {i}: expected a path inside the ILSVRC2012 root, got {path[:100]!r}"
            )
        rows.append((path, int(match[2])))
    return rows


def _class_names(rows: list[tuple[str, int]]) -> tuple[str, ...]:
    """The synset of each label of the training list, which must be sorted and without a gap."""
    name, first = _LIST.format("train"), {}
    for path, label in rows:
        first.setdefault(label, _synset(path))
    empty = next(c for c in range(len(first) + 1) if c not in first)
    if empty < len(first):
        raise ValueError(
            f"{name}: class {empty} has no training image, but there is a label {max(first)}; "
            "expected every label from 0 to K-1: is the list whole?"
        )
    for c in range(1, len(first)):
        if first[c - 1] >= first[c]:
            raise ValueError(
                f"{name}: expected labels in the sorted order of the synsets, got {first[c]} for "
                f"label {c} after {first[c - 1]}"
            )
    return tuple(first[c] for c in range(len(first)))


def _synset(path: str) -> str:
    return path.rsplit("/", 2)[-2]


def _warn_of_shared_paths(files: dict[str, list[str]]) -> None:
    """Told before the conversion; the same pixels under two names are told after it."""
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        both = sorted(set(files[a]) & set(files[b]))
        if both:
            warnings.warn(
                f"{len(both)} files are in both {a} and {b}, e.g. {both[0]}; accuracies will flatter",
                stacklevel=2,
            )
