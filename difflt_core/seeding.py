"""Every random draw comes from a generator derived from (seed, purpose, index): none from global
state."""

import hashlib

import torch

__all__ = ["derive_seed", "generator"]


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed that differs for every (seed, purpose...) and is the same on every machine."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: str | int, device: object = "cpu") -> torch.Generator:
    """A generator for one purpose, e.g. generator(0, "batch", step), on the CPU or on a device."""
    return torch.Generator(device).manual_seed(derive_seed(seed, *purpose))
