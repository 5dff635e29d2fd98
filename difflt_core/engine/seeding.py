"""Every random draw comes from a generator derived from (seed, purpose, index): none from global
state."""

import functools
import hashlib

import numpy as np
import torch

__all__ = ["batch_indices", "derive_seed", "generator", "host_draws", "weighted_indices"]


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed that differs for every (seed, purpose...) and is the same on every machine."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: str | int, device: object = "cpu") -> torch.Generator:
    """A generator for one purpose, e.g. generator(0, "batch", step), on the CPU or on a device."""
    return torch.Generator(device).manual_seed(derive_seed(seed, *purpose))


def host_draws(seed: int, *purpose: str | int) -> np.random.Generator:
    """A generator for what the host reads: numpy's, so that no device is asked."""
    return np.random.default_rng(derive_seed(seed, *purpose))


def batch_indices(n_images: int, batch_size: int, step: int, seed: int) -> np.ndarray:
    """Indices int64 (B,) of step's batch: epochs of shuffled data laid end to end, computed from
    (seed, step) alone."""
    first, last = step * batch_size, (step + 1) * batch_size
    epochs = range(first // n_images, (last - 1) // n_images + 1)
    order = np.concatenate([_epoch_order(n_images, epoch, seed) for epoch in epochs])
    start = first - epochs[0] * n_images
    return order[start : start + batch_size]


def weighted_indices(cumulated: np.ndarray, batch_size: int, step: int, seed: int) -> np.ndarray:
    """Indices int64 (B,) of step's batch, drawn with replacement.

    Args:
        cumulated: float64 (N,), the running sum of the weights to draw in proportion to.
    """
    at = host_draws(seed, "draw", step).random(batch_size) * cumulated[-1]
    return np.minimum(np.searchsorted(cumulated, at, side="right"), len(cumulated) - 1)


@functools.lru_cache(maxsize=4)
def _epoch_order(n_images: int, epoch: int, seed: int) -> np.ndarray:
    return torch.randperm(n_images, generator=generator(seed, "epoch", epoch)).numpy()
