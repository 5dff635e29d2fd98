"""Images and labels: the long-tail protocol (docs/protocol.md), and a data artifact's splits.

The datasets themselves are in the other files of this room; sources.py finds them by name.
"""

from dataclasses import dataclass

import numpy as np
import torch

from ..engine.device import to_device

__all__ = [
    "LongTail",
    "StackedImages",
    "batch_reader",
    "class_sizes",
    "left_out_indices",
    "load_split",
    "long_tail_indices",
    "shortfall",
    "shot_groups",
    "to_float",
]

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class LongTail:
    """One split. images uint8 (N, H, W, C) 0..255, labels int64 (N,) 0..K-1, class_counts int64
    (K,). files: the N image files that the rows were read from, relative to the source folder; None
    for data that are not image files."""

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    split: str
    fingerprint: str
    files: tuple[str, ...] | None = None

    @property
    def class_counts(self) -> np.ndarray:
        return np.bincount(self.labels, minlength=len(self.class_names))


class StackedImages:
    """Several uint8 arrays (N_i, H, W, C), often memory-mapped, read as one without copying them.

    Args:
        parts: (array, rows): which rows of an array, int64 in their order; None is all of them.
    """

    def __init__(self, *parts: tuple[np.ndarray, np.ndarray | None]):
        whole = [(a, np.arange(len(a)) if rows is None else rows) for a, rows in parts]
        self.parts = [(a, rows) for a, rows in whole if len(rows)]
        self.ends = np.cumsum([len(rows) for _, rows in self.parts])
        self.shape = (int(sum(len(rows) for _, rows in whole)), *parts[0][0].shape[1:])

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape))

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        """Copies of the rows index int64 (B,), as uint8 (B, H, W, C)."""
        found = np.empty((len(index), *self.shape[1:]), np.uint8)
        part = np.searchsorted(self.ends, index, side="right")
        for i, (array, rows) in enumerate(self.parts):
            mine, start = part == i, self.ends[i] - len(rows)
            found[mine] = array[rows[index[mine] - start]]
        return found


def class_sizes(n_classes: int, n_max: int, imb_ratio: float, imb_type: str = "exp") -> list[int]:
    """How many images each class keeps, in class order (LDAM's protocol: float64, truncated, never
    rounded).

    Args:
        n_classes: K >= 2. n_max: images of class 0. imb_ratio: n_max / n_min >= 1.
        imb_type: "exp": floor(n_max * (1/r)^(c/(K-1))); "step": the first K//2 classes n_max, the
            rest floor(n_max/r).
    """
    if imb_ratio < 1:
        raise ValueError(f"imb_ratio: expected >= 1, got {imb_ratio}; did you pass its inverse?")
    if imb_type not in ("exp", "step"):
        raise ValueError(f"imb_type: expected 'exp' or 'step', got {imb_type!r}")
    f = 1.0 / imb_ratio
    if imb_type == "exp":
        return [int(n_max * f ** (c / (n_classes - 1.0))) for c in range(n_classes)]
    return [int(n_max)] * (n_classes // 2) + [int(n_max * f)] * (n_classes - n_classes // 2)


def long_tail_indices(labels, counts, seed: int = 0) -> np.ndarray:
    """Which images the community's protocol keeps: int64, class after class (docs/protocol.md, Which images).

    NumPy's legacy generator is seeded once; each class, in ascending order, is shuffled in file
    order and its first n_c are kept. So a smaller subset is part of a larger one.

    Raises:
        ValueError: a class with fewer images than asked for, or none left.
    """
    members = _shuffled(labels, len(counts), seed)
    for c, (n, found) in enumerate(zip(counts, members, strict=True)):
        if not 1 <= n <= len(found):
            raise ValueError(
                f"class {c}: expected 1 to {len(found)} images after the cut, got {n}; "
                "change n_max or imb_ratio"
            )
    return np.concatenate([found[:n] for n, found in zip(counts, members, strict=True)])


def left_out_indices(labels, counts, n_val: int, seed: int = 0) -> np.ndarray:
    """n_val images of each class that no cut of this seed to max(counts) images or fewer keeps, class
    after class: int64; none at all where a class has not as many."""
    members, largest = _shuffled(labels, len(counts), seed), max(counts)
    if any(len(found) < largest + n_val for found in members):
        return np.zeros(0, np.int64)
    return np.concatenate([found[largest : largest + n_val] for found in members])


def _shuffled(labels, n_classes: int, seed: int) -> list[np.ndarray]:
    """The images of each class in the order in which the protocol takes them."""
    labels, generator = np.asarray(labels), np.random.RandomState(seed)
    members = [np.flatnonzero(labels == c) for c in range(n_classes)]
    for found in members:
        generator.shuffle(found)
    return members


def shortfall(class_counts, fill_to: int = 0) -> np.ndarray:
    """How many images each class lacks, int64 (K,): N_t - n_c where n_c < N_t, else 0; N_t = fill_to
    or n_max, the largest class."""
    counts = np.asarray(class_counts)
    return np.maximum((fill_to or counts.max()) - counts, 0)


def shot_groups(class_counts, many_above: int = 100, few_below: int = 20) -> dict[str, np.ndarray]:
    """Class indices by group: many n > many_above, few n < few_below, medium between (RIDE, PaCo,
    BALMS)."""
    n = np.asarray(class_counts)
    return {
        "many": np.flatnonzero(n > many_above),
        "medium": np.flatnonzero((n >= few_below) & (n <= many_above)),
        "few": np.flatnonzero(n < few_below),
    }


def to_float(images: np.ndarray | torch.Tensor) -> torch.Tensor:
    """uint8 (N, H, W, C) 0..255 to float32 (N, C, H, W) in [-1, 1], the range of the diffusion
    model."""
    x = torch.from_numpy(np.array(images)) if isinstance(images, np.ndarray) else images
    return x.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def batch_reader(images: np.ndarray | StackedImages, device, share: float = 0.4):
    """A function from indices int64 (B,), an array, to float32 (B, C, H, W) in [-1, 1] on the device.

    images: uint8 (N, H, W, C), often memory-mapped. They move to a GPU as bytes when they take less
    than `share` of its free memory; else each batch is read from disk and moves as bytes.
    """
    device = torch.device(device)
    if device.type == "cuda" and images.nbytes < share * torch.cuda.mem_get_info(device)[0]:
        resident = torch.from_numpy(images[np.arange(images.shape[0])]).to(device)
        return lambda index: to_float(resident[to_device(index, device)])
    return lambda index: to_float(to_device(images[index], device))


def load_split(artifact, split: str) -> LongTail:
    """A split of a data artifact, memory-mapped."""
    info, files = artifact.json("info"), f"{split}_files"
    return LongTail(
        artifact.array(f"{split}_images"),
        np.asarray(artifact.array(f"{split}_labels")),
        tuple(info["class_names"]),
        split,
        artifact.key,
        tuple(artifact.json(files)) if (artifact.path / f"{files}.json").exists() else None,
    )
