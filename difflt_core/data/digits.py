"""The embedded dataset: the 1,797 real handwritten digits that scikit-learn ships (8x8, UCI Optical
Recognition), split by source image into train, val and test before anything else, and rendered with
nuisance that has nothing to do with the class: position, rotation, scale, contrast, a background
gradient and noise."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from ..config import DataConfig
from ..engine.seeding import generator
from .long_tail import SPLITS, class_sizes

__all__ = ["render_digits"]

_TEST_SEED = 0


def render_digits(data: DataConfig, seed: int):
    """Yield (split, images uint8 (N, size, size, 1), labels int64 (N,)) for train, val and test.

    The test images are the same for every seed, and no other seed trains or chooses on them.
    """
    sources = _digit_sources(seed)
    counts = {
        "train": class_sizes(data.n_classes, data.n_max, data.imb_ratio, data.imb_type),
        "val": [data.n_val] * data.n_classes,
        "test": [data.n_test] * data.n_classes,
    }
    for split in SPLITS:
        drawn = _TEST_SEED if split == "test" else seed
        yield split, *_render_split(sources[split], counts[split], data, drawn, split)


def _digit_sources(seed: int) -> dict[str, dict[int, np.ndarray]]:
    """Split the source images of each class 50 / 20 / 30 into train / val / test: {split: {class:
    (n, 8, 8) in 0..1}}. The seed decides between train and val alone."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    sources: dict[str, dict[int, np.ndarray]] = {split: {} for split in SPLITS}
    for c in range(10):
        images = digits.images[digits.target == c].astype(np.float32) / 16.0
        train, val = int(0.5 * len(images)), int(0.7 * len(images))
        order = _order(len(images), _TEST_SEED, "test", c)
        order[:val] = order[:val][_order(val, seed, "train", c)]
        for split, index in zip(SPLITS, np.split(order, [train, val]), strict=True):
            sources[split][c] = images[index]
    return sources


def _order(n: int, seed: int, *purpose) -> np.ndarray:
    """A permutation int64 (n,)."""
    return torch.randperm(n, generator=generator(seed, "digits", *purpose)).numpy()


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
