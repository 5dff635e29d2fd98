"""Augmentation that does not leak into what is generated: the network is told how a training image was
changed, and asked for unchanged ones (after Karras et al. 2022, appendix F.2; docs/readings.md: how it
differs)."""

import math

import torch
import torch.nn.functional as F

__all__ = ["N_LABELS", "draw_changes", "warp"]

# upside down; scale; cos - 1 and sin of the rotation; stretch at twice the angle of its axis (a stretch
# along an axis is a squeeze along the other, so one label has one map; EDM's has two); shift right, down
N_LABELS = 8
_SCALE_STD = 0.2  # of log2, of the size and of the stretch
_SHIFT_STD = 0.125  # of an image's side


def draw_changes(
    n: int, probability: float, g: torch.Generator, device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Changes of n images: each of five (upside down, scale, rotation, stretch, shift) with a probability.

    Returns:
        labels float (n, 8), what the network is told, all 0 for an image that stays; and inverse
        maps float (n, 2, 3), from places of the changed image to those of the original, in units of
        half a side from the centre, as torch's affine_grid has them.
    """

    def normal(*shape):
        return torch.randn(n, *shape, generator=g, device=device)

    def uniform(*shape):
        return torch.rand(n, *shape, generator=g, device=device)

    on = (uniform(5) < probability).float()  # (n, 5)
    mirrored = on[:, 0] * (uniform() < 0.5)
    scale, stretch, shift = on[:, 1] * normal(), on[:, 3] * normal(), on[:, 4:] * normal(2)
    turn = on[:, 2] * math.pi * (2 * uniform() - 1)
    axis = math.pi * (2 * uniform() - 1)
    labels = torch.stack(
        [
            mirrored, scale, turn.cos() - 1, turn.sin(),
            stretch * (2 * axis).cos(), stretch * (2 * axis).sin(), shift[:, 0], shift[:, 1],
        ],
        dim=1,
    )  # fmt: skip
    # an image is turned upside down, rotated, stretched, scaled, shifted: backwards
    upside = torch.diag_embed(torch.stack([torch.ones_like(mirrored), 1 - 2 * mirrored], dim=1))
    squeeze = torch.diag_embed(torch.exp2(-_SCALE_STD * torch.stack([stretch, -stretch], dim=1)))
    smaller = torch.exp2(-_SCALE_STD * scale)[:, None, None]
    back = smaller * upside @ _turned(-turn) @ _turned(axis) @ squeeze @ _turned(-axis)
    offset = -back @ (2 * _SHIFT_STD * shift)[:, :, None]
    return labels, torch.cat([back, offset], dim=2)


def warp(x: torch.Tensor, labels: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Images (B, C, H, W) in [-1, 1] as changed, mirrored at their border; those whose labels are 0 as
    they are."""
    grid = F.affine_grid(maps, list(x.shape), align_corners=False)
    # bicubic: half a pixel's shift leaves more of the finest detail than bilinear does
    changed = F.grid_sample(x, grid, "bicubic", "reflection", align_corners=False).clamp(-1, 1)
    return torch.where((labels != 0).any(dim=1)[:, None, None, None], changed, x)


def _turned(angle: torch.Tensor) -> torch.Tensor:
    """Rotations (n, 2, 2)."""
    c, s = angle.cos(), angle.sin()
    return torch.stack([c, -s, s, c], dim=1).unflatten(1, (2, 2))
