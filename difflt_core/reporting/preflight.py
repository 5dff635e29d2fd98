"""A look at a folder of images before anything is trained: classes and their sizes, files that cannot be
read, that are there twice or that are unusual:
`python -m difflt_core.reporting.preflight --data-dir /data --set path=my_images`.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path

import numpy as np

from ..config import DataConfig, RunConfig
from ..data.folders import check_layout, kinds, left_out, loose_images, scan_folder
from ..data.image_files import CHUNK, listed, read_image, unusual
from ..data.long_tail import SPLITS, shortfall, shot_groups
from ..data.sources import in_data_dir
from ..engine.parallel import n_cores
from ..engine.progress import Context, bar
from ..options import build_parser, read_run
from ..profiles import DISK_GB

__all__ = ["Preflight", "look_at", "main"]

_FEATURES = 256  # numbers that phi_0 has of an image, about


@dataclass(frozen=True)
class Preflight:
    """What a folder holds.

    class_names: K of them. counts: images by split, int64 (K,). unreadable: files, and why. twice:
    groups of files with the same picture, neither a leak nor of two classes; leaks: with one in training
    and one in val or test; two_classes: with two labels. odd: what is unusual, and the files. loose:
    images in no class folder; left_out: files that are no images by their extension; neither is read.
    """

    data: DataConfig
    class_names: tuple[str, ...]
    counts: dict[str, np.ndarray]
    unreadable: dict[str, str]
    twice: list[list[str]]
    leaks: list[list[str]]
    two_classes: list[list[str]]
    odd: dict[str, list[str]]
    loose: list[str]
    left_out: list[str]

    def words(self) -> str:
        """The report, for a terminal."""
        n, many, few = self.counts["train"], self.data.many_above, self.data.few_below
        total = {split: int(found.sum()) for split, found in self.counts.items()}
        lines = [
            f"{len(self.class_names)} classes; training {total['train']}, validation {total['val']}, "
            f"test {total['test']} images, read at {self.data.image_size} x {self.data.image_size}",
            "",
            *self._bars(),
            "",
            f"Largest class {n.max()}, smallest {n.min()}: r = {n.max() / n.min():.3g}. Generated "
            f"images to fill up: {int((n.max() - n).sum())}.",
        ]
        groups = shot_groups(n, many, few)
        rule = {"many": f"n > {many}", "medium": f"{few} to {many}", "few": f"n < {few}"}
        told = (f"{group} ({rule[group]}): {len(found)}" for group, found in groups.items())
        lines.append(f"Classes by training images: {', '.join(told)}.")
        if (n == 1).any():
            alone = [name for name, k in zip(self.class_names, n, strict=True) if k == 1]
            lines.append(f"One image only, so no radius of their own: {', '.join(alone)}.")
        if not total["test"]:
            lines.append("No test images: nothing can be measured. Put some into test/.")
        elif total["test"] < 10 * len(n):
            lines.append("Fewer than ten test images per class: accuracies will be coarse.")
        for title, groups_of in (
            ("The same picture in training and in test or validation (a leak)", self.leaks),
            ("The same picture under two classes", self.two_classes),
            ("The same picture more than once", self.twice),
        ):
            if groups_of:
                lines += [
                    "",
                    f"{title}: {len(groups_of)}",
                    listed([" = ".join(g) for g in groups_of]),
                ]
        for what, files in self.odd.items():
            lines += ["", f"{what}: {len(files)}", listed(files)]
        if self.loose:
            lines += ["", f"In no class folder, so not read: {len(self.loose)}", listed(self.loose)]
        if self.left_out:
            lines += ["", f"Not read, since no image by their extension: {kinds(self.left_out)}"]
        if self.unreadable:
            lines += ["", f"Cannot be read, remove or repair: {len(self.unreadable)}"]
            lines.append(listed([f"{name}: {why}" for name, why in self.unreadable.items()]))
        return "\n".join(lines)

    def _bars(self) -> list[str]:
        """A bar for each class, the largest first."""
        n = self.counts["train"]
        order, width = np.argsort(-n, kind="stable"), max(map(len, self.class_names))
        shown = [
            f"  {self.class_names[c]:{width}} {n[c]:6} {'#' * max(1, round(40 * n[c] / n.max()))}"
            for c in order[:40]
        ]
        return shown + ([f"  and {len(order) - 40} more"] if len(order) > 40 else [])


def look_at(root: Path, data: DataConfig, seed: int, context: Context | None = None) -> Preflight:
    """Read every image of a folder once; nothing is written.

    Args:
        data: settings of the folder, e.g. load_config("folder").data. seed: of its split.

    Raises:
        ValueError: what check_layout and scan_folder refuse.
    """
    check_layout(root)
    scan = scan_folder(root, data, seed)
    every = [(split, c, name) for split in SPLITS for name, c in
             zip(scan.files[split], scan.labels[split].tolist(), strict=True)]  # fmt: skip
    K = len(scan.class_names)
    counts = {split: np.bincount(scan.labels[split], minlength=K) for split in SPLITS}
    unreadable, odd = {}, {}
    same: dict[bytes, list[tuple[str, int, str]]] = {}
    side = data.image_size
    with (
        bar(len(every), "looking", "image", context=context) as progress,
        ThreadPoolExecutor(n_cores()) as pool,
    ):
        # a batch at a time: a task waiting takes more memory than a file's name
        batches = (every[i : i + CHUNK] for i in range(0, len(every), CHUNK))
        facts = (pool.map(lambda item: _facts(root / item[2], side), batch) for batch in batches)
        for item, (digest, unusual) in zip(every, chain.from_iterable(facts), strict=True):
            if digest is None:
                unreadable[item[2]] = unusual.pop()
            else:
                same.setdefault(digest, []).append(item)
            for kind in unusual:
                odd.setdefault(kind, []).append(item[2])
            progress.update()
    twice, leaks, two_classes = [], [], []
    for group in (g for g in same.values() if len(g) > 1):
        splits, classes = {s for s, _, _ in group}, {c for _, c, _ in group}
        names = [name for _, _, name in group]
        is_leak, of_two = "train" in splits and len(splits) > 1, len(classes) > 1
        if is_leak:
            leaks.append(names)
        if of_two:
            two_classes.append(names)
        if not (is_leak or of_two):
            twice.append(names)
    same_pictures = twice, leaks, two_classes
    others = odd, loose_images(root), left_out(root)
    return Preflight(data, scan.class_names, counts, unreadable, *same_pictures, *others)


def _facts(path: Path, side: int) -> tuple[bytes | None, list[str]]:
    """A hash of what is seen of a file, and what is unusual about it; or None, and why it cannot be
    read."""
    shape = side, side, 3
    image, mode = read_image(path, shape)
    if image is None:
        return None, [mode]
    return sha256(image.tobytes()).digest(), unusual(path, mode, shape)


def _disk_gb(config: RunConfig, counts: np.ndarray) -> float:
    """What a run writes: the profile's usual, and of each repeat the generated images, twice while their
    chunks become one file, and their features."""
    images = shortfall(counts, config.sampling.fill_to).sum() * len(config.seeds)
    of_image = 2 * 3 * config.data.image_size**2 + 4 * _FEATURES
    return DISK_GB[config.profile] + float(images) * of_image / 1e9


def main(argv: list[str] | None = None) -> int:
    about = __doc__.split("\n\n")[0]
    parser = build_parser("python -m difflt_core.reporting.preflight", about)
    parser.set_defaults(profile="folder")
    run = read_run(argv, parser)
    if run is None:
        return 2
    config = run.config
    try:
        root = in_data_dir(config.data.path, run.data_dir)
        if not root.is_dir():
            raise FileNotFoundError(f"{root}: there is no such folder; name it by --set path=NAME")
        found = look_at(root, config.data, config.data_seed, Context(run.device))
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    print(found.words())
    print(f"\nDisk for a run: about {_disk_gb(config, found.counts['train']):.2g} GB.")
    return 1 if found.unreadable else 0


if __name__ == "__main__":
    sys.exit(main())
