"""Images and labels in: the long-tail protocol and the embedded dataset `digits` (PEERS.md 1).

`digits` takes the 1,797 real handwritten digits that scikit-learn ships (8x8, UCI Optical
Recognition), splits them by source image into train, val and test before anything else, and renders
each with nuisance that has nothing to do with its class: position, rotation, scale, contrast, a
background gradient and noise.
"""

import json
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from .config import DataConfig
from .seeding import generator

__all__ = [
    "LongTail",
    "batch_reader",
    "build_data",
    "class_sizes",
    "load_split",
    "shot_groups",
    "to_float",
]

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class LongTail:
    """One split. images uint8 (N, H, W, C) 0..255, labels int64 (N,) 0..K-1, class_counts int64
    (K,)."""

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    split: str
    fingerprint: str

    @property
    def class_counts(self) -> np.ndarray:
        return np.bincount(self.labels, minlength=len(self.class_names))


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


def batch_reader(images: np.ndarray, device, share: float = 0.4):
    """A function from indices int64 (B,) to float32 (B, C, H, W) in [-1, 1] on the device.

    images: uint8 (N, H, W, C), often memory-mapped. They move to a GPU as bytes when they take less
    than `share` of its free memory; else each batch is read from disk.
    """
    device = torch.device(device)
    if device.type == "cuda" and images.nbytes < share * torch.cuda.mem_get_info(device)[0]:
        resident = torch.from_numpy(np.array(images)).to(device)
        return lambda index: to_float(resident[index.to(device)])
    return lambda index: to_float(images[index.cpu().numpy()]).to(device, non_blocking=True)


def load_split(artifact, split: str) -> LongTail:
    """A split of a data artifact, memory-mapped."""
    info = artifact.json("info")
    return LongTail(
        artifact.array(f"{split}_images"),
        np.asarray(artifact.array(f"{split}_labels")),
        tuple(info["class_names"]),
        split,
        artifact.key,
    )


def build_data(work, config: dict, inputs: dict, context) -> None:
    """Stage 0: write <split>_images.npy, <split>_labels.npy and info.json. config: {"data":
    DataConfig, "seed": int}."""
    data = DataConfig.model_validate(config["data"])
    sources = _digit_sources(config["seed"])
    counts = {
        "train": class_sizes(data.n_classes, data.n_max, data.imb_ratio, data.imb_type),
        "val": [data.n_val] * data.n_classes,
        "test": [data.n_test] * data.n_classes,
    }
    for split in SPLITS:
        images, labels = _render_split(sources[split], counts[split], data, config["seed"], split)
        np.save(work / "out" / f"{split}_images.npy", images)
        np.save(work / "out" / f"{split}_labels.npy", labels)
    names = [str(c) for c in range(data.n_classes)]
    (work / "out" / "info.json").write_text(json.dumps({"class_names": names, "counts": counts}))


def _digit_sources(seed: int) -> dict[str, dict[int, np.ndarray]]:
    """Split the source images of each class 50 / 20 / 30 into train / val / test: {split: {class:
    (n, 8, 8) in 0..1}}."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    sources: dict[str, dict[int, np.ndarray]] = {split: {} for split in SPLITS}
    for c in range(10):
        images = digits.images[digits.target == c].astype(np.float32) / 16.0
        order = torch.randperm(len(images), generator=generator(seed, "digits", "split", c)).numpy()
        train, val = int(0.5 * len(images)), int(0.7 * len(images))
        for split, index in zip(SPLITS, np.split(order, [train, val]), strict=True):
            sources[split][c] = images[index]
    return sources


def _render_split(sources, counts, data: DataConfig, seed: int, split: str):
    """Render counts[c] images of each class; source j is used again only when all of its class have
    been used.

    Image i of a class depends on (seed, split, class, i) alone, so a smaller class is the beginning
    of a larger one.
    """
    images, labels = [], []
    for c, n in enumerate(counts):
        picked = torch.from_numpy(sources[c][np.arange(n) % len(sources[c])])
        draws = [generator(seed, "digits", split, c, i) for i in range(n)]
        uniform = torch.stack([torch.rand(8, generator=g) for g in draws])
        noise = torch.stack(
            [torch.randn(data.image_size, data.image_size, generator=g) for g in draws]
        )
        images.append(_render(picked, uniform, noise, data.nuisance))
        labels.append(np.full(n, c, dtype=np.int64))
    return np.concatenate(images), np.concatenate(labels)


def _render(
    digits: torch.Tensor, uniform: torch.Tensor, noise: torch.Tensor, strength: float
) -> np.ndarray:
    """Digits (N, 8, 8) in 0..1 to uint8 (N, size, size, 1).

    uniform: (N, 8) in 0..1, the draws of the eight kinds of nuisance. noise: standard normal (N,
        size, size).
    """

    def spread(kind: int, low: float, high: float) -> torch.Tensor:
        return low + (high - low) * uniform[:, kind]

    N, size = len(digits), noise.shape[-1]
    angle = strength * spread(0, -0.44, 0.44)  # radians, 25 degrees
    scale = 1.0 - strength * spread(1, -0.05, 0.30)
    dx, dy = (
        strength * spread(2, -0.25, 0.25),
        strength * spread(3, -0.25, 0.25),
    )  # of half the image
    contrast = 1.0 - strength * spread(4, 0.0, 0.6)
    slope, direction = strength * spread(5, 0.0, 0.35), spread(6, 0.0, 2 * math.pi)
    level = strength * spread(7, 0.0, 0.25)
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    theta = torch.stack([torch.stack([cos, -sin, dx], 1), torch.stack([sin, cos, dy], 1)], 1)
    grid = F.affine_grid(theta, [N, 1, size, size], align_corners=False)
    ink = F.grid_sample(digits[:, None], grid, mode="bilinear", align_corners=False)[:, 0]
    axis = torch.linspace(-1, 1, size)
    ramp = (
        torch.cos(direction)[:, None, None] * axis
        + torch.sin(direction)[:, None, None] * axis[:, None]
    )
    background = level[:, None, None] + slope[:, None, None] * (ramp + 1.4) / 2.8
    image = background + (1 - background) * contrast[:, None, None] * ink + strength * 0.03 * noise
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)[..., None].numpy()
