"""Augmentation of a batch on its device, every image for itself, drawn from the seed alone.

x is float (B, C, H, W) in [-1, 1] throughout. All functions take whole batches, and none reads what is
on the device, or waits for a copy to it.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from ..config import TrainingConfig
from ..engine.device import to_device
from ..engine.seeding import derive_seed, generator, host_draws
from .contrastive import BLUR, draw_views, look
from .policies import autoaugment, randaugment

__all__ = [
    "POLICIES",
    "augment",
    "cutmix",
    "cutout",
    "mix",
    "mixup",
    "random_flip",
    "random_shift",
]


def augment(
    x: torch.Tensor, recipe: TrainingConfig, policy: str, cutout_size: int, seed: int, *purpose
) -> torch.Tensor:
    """One view of a batch: the recipe's crop and flip, then a policy and Cutout.

    Args:
        policy: a key of POLICIES. cutout_size: 0 for none. purpose: names the draw, e.g.
            ("phi_0", step, view).
    """
    if not policy.startswith("contrastive"):  # which crops and flips for itself
        g = generator(seed, *purpose, "crop")
        x = random_shift(x, recipe.shift, g, recipe.border)
        x = random_flip(x, g) if recipe.flip else x
    if policy != "none":
        x = POLICIES[policy](x, recipe.flip, derive_seed(seed, *purpose, policy))
    if cutout_size:
        x = cutout(x, cutout_size, generator(seed, *purpose, "cutout"))
    return x


def random_shift(
    x: torch.Tensor, pad: int, g: torch.Generator, border: str = "edge"
) -> torch.Tensor:
    """The usual pad-and-crop, one offset per image. border: "edge" repeats the outermost pixel,
    "black" pads with -1, as CIFAR's protocol does."""
    if pad == 0:
        return x
    B, C, H, W = x.shape
    kind = {"mode": "replicate"} if border == "edge" else {"value": -1.0}
    padded = F.pad(x, (pad,) * 4, **kind)
    dy, dx = to_device(torch.randint(0, 2 * pad + 1, (2, B), generator=g), x.device)
    rows = (dy[:, None] + torch.arange(H, device=x.device))[:, None, :, None]
    cols = (dx[:, None] + torch.arange(W, device=x.device))[:, None, None, :]
    image = torch.arange(B, device=x.device)[:, None, None, None]
    channel = torch.arange(C, device=x.device)[None, :, None, None]
    return padded[image, channel, rows, cols]


def random_flip(x: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """Mirror half of the images."""
    coin = to_device(torch.rand(len(x), generator=g), x.device)
    return torch.where(coin[:, None, None, None] < 0.5, x.flip(-1), x)


def cutout(x: torch.Tensor, size: int, g: torch.Generator) -> torch.Tensor:
    """A black square of `size` pixels at a uniform centre, cut off at the border (DeVries and Taylor
    2017; black, since GPaCo's and SAU's code zeroes pixels before it normalises them)."""
    B, _, H, W = x.shape
    centre = to_device(torch.rand(2, B, generator=g), x.device)
    rows = (torch.arange(H, device=x.device) - (centre[0] * H).floor()[:, None] + size // 2)[
        :, :, None
    ]
    cols = (torch.arange(W, device=x.device) - (centre[1] * W).floor()[:, None] + size // 2)[
        :, None, :
    ]
    inside = (rows >= 0) & (rows < size) & (cols >= 0) & (cols < size)
    return x.masked_fill(inside[:, None], -1.0)


def _none(x: torch.Tensor, flip: bool, seed: int) -> torch.Tensor:
    return x


def _rotate(x: torch.Tensor, flip: bool, seed: int) -> torch.Tensor:
    """By at most 15 degrees, the nearest pixel, black around the image."""
    angle = np.deg2rad(host_draws(seed).uniform(-15, 15, len(x)))
    turn = np.zeros((len(x), 2, 3), np.float32)
    turn[:, 0, 0] = turn[:, 1, 1] = np.cos(angle)
    turn[:, 0, 1], turn[:, 1, 0] = -np.sin(angle), np.sin(angle)
    grid = F.affine_grid(to_device(turn, x.device), list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid.to(x.dtype), "nearest", "zeros", align_corners=False) - 1


def _contrastive(x: torch.Tensor, flip: bool, seed: int, blur: float = BLUR) -> torch.Tensor:
    """A crop, mirror image, colours, grey and blur of its own for each image: see contrastive.py."""
    draw = draw_views(len(x), x.shape[-1], flip, host_draws(seed), blur)
    return look((x + 1) / 2, draw).clamp(0, 1) * 2 - 1


def _contrastive_blur02(x: torch.Tensor, flip: bool, seed: int) -> torch.Tensor:
    """The same with every fifth image blurred, not every second: GPaCo's on long-tailed CIFAR."""
    return _contrastive(x, flip, seed, 0.2)


# By name: (x, flip, seed) -> one more view of x. A stage's code version has its own entries alone.
POLICIES = {
    "none": _none,
    "rotate": _rotate,
    "autoaugment": autoaugment,
    "randaugment": randaugment,
    "contrastive": _contrastive,
    "contrastive_blur02": _contrastive_blur02,
}


def mix(x: torch.Tensor, kind: str, seed: int) -> tuple[torch.Tensor, float]:
    """MixUp or CutMix of a batch with itself, rolled by one; lam ~ Beta(1, 1).

    Returns:
        The mixed batch, and lam in 0..1, the weight of image i's own label; image i - 1's has
        1 - lam. CutMix's lam is the share of the area that stayed.
    """
    if len(x) == 1:  # nothing to mix with
        return x, 1.0
    draws, other = host_draws(seed), x.roll(1, 0)
    lam = float(draws.random())
    return (mixup(x, other, lam), lam) if kind == "mixup" else cutmix(x, other, lam, draws)


def mixup(x, other, lam: float) -> torch.Tensor:
    """lam x + (1 - lam) other, both (B, C, H, W)."""
    return lam * x + (1 - lam) * other


def cutmix(x, other, lam: float, draws: np.random.Generator) -> tuple[torch.Tensor, float]:
    """A box of other in x: sides sqrt(1 - lam) of the image's, uniform centre, cut off at the border.

    Returns:
        The images, and the share of the area that x keeps (lam itself is the nominal share).
    """
    H, W = x.shape[-2:]
    side = math.sqrt(1 - lam)
    cy, cx = (int(draws.integers(n)) for n in (H, W))
    h, w = round(H * side), round(W * side)
    rows = slice(max(0, cy - h // 2), min(H, cy - h // 2 + h))
    cols = slice(max(0, cx - w // 2), min(W, cx - w // 2 + w))
    mixed = x.clone()
    mixed[..., rows, cols] = other[..., rows, cols]
    area = (rows.stop - rows.start) * (cols.stop - cols.start)
    return mixed, 1 - area / (H * W)
