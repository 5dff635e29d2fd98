"""Every random draw comes from a generator derived from (seed, purpose, index): none from global
state."""

import functools
import hashlib

import torch

__all__ = ["batch_indices", "derive_seed", "generator", "weighted_indices"]


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed that differs for every (seed, purpose...) and is the same on every machine."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: str | int, device: object = "cpu") -> torch.Generator:
    """A generator for one purpose, e.g. generator(0, "batch", step), on the CPU or on a device."""
    return torch.Generator(device).manual_seed(derive_seed(seed, *purpose))


def batch_indices(n_images: int, batch_size: int, step: int, seed: int) -> torch.Tensor:
    """Indices int64 (B,) of step's batch: epochs of shuffled data laid end to end, computed from
    (seed, step) alone."""
    first, last = step * batch_size, (step + 1) * batch_size
    epochs = range(first // n_images, (last - 1) // n_images + 1)
    order = torch.cat([_epoch_order(n_images, epoch, seed) for epoch in epochs])
    start = first - epochs[0] * n_images
    return order[start : start + batch_size]


def weighted_indices(weights: torch.Tensor, batch_size: int, step: int, seed: int) -> torch.Tensor:
    """Indices int64 (B,) of step's batch, drawn with replacement in proportion to weights (N,)."""
    return torch.multinomial(weights, batch_size, True, generator=generator(seed, "draw", step))


@functools.lru_cache(maxsize=4)
def _epoch_order(n_images: int, epoch: int, seed: int) -> torch.Tensor:
    return torch.randperm(n_images, generator=generator(seed, "epoch", epoch))
