"""The view that contrastive methods take of an image (docs/protocol.md, PaCo and SAU): a random crop,
a mirror image, colour jitter, grey, blur; of a whole batch at once, every image by its own draw.

torchvision's operations, in floating point where those on bytes round after each: equal to them up
to that rounding.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ..engine.device import to_device

__all__ = ["Draw", "draw_views", "look"]

_TRIES = 10  # of a crop that fits, before the whole image is taken
JITTER, GREY, BLUR = 0.8, 0.2, 0.5  # shares of the images
_LUMA = np.array([0.2989, 0.587, 0.114], np.float32)  # of red, green and blue in grey


@dataclass(frozen=True)
class Draw:
    """What happens to each of B images, on the host. box: top, left, height, width, int64 (B, 4).
    mirrored, jittered, grey, blurred: bool (B,). order: of brightness, contrast, saturation, hue,
    int64 (B, 4). factors: of the same four, float32 (B, 4). sigma: of the blur in pixels, float32 (B,)."""

    box: np.ndarray
    mirrored: np.ndarray
    jittered: np.ndarray
    order: np.ndarray
    factors: np.ndarray
    grey: np.ndarray
    blurred: np.ndarray
    sigma: np.ndarray


def draw_views(
    n: int, size: int, flip: bool, draws: np.random.Generator, blur: float = BLUR
) -> Draw:
    """Draws for n images of size x size pixels: crops of 20 to 100 % of the area and sides of 3 : 4 to
    4 : 3; half of them mirrored where flip is; blur: the share that is blurred."""
    coin = draws.random((4, n))
    spread = draws.uniform(-1, 1, (n, 4)) * [0.4, 0.4, 0.4, 0.1]
    return Draw(
        _draw_boxes(n, size, draws),
        coin[0] < (0.5 if flip else 0.0),
        coin[1] < JITTER,
        draws.random((n, 4)).argsort(axis=1),
        (spread + np.array([1.0, 1.0, 1.0, 0.0])).astype(np.float32),
        coin[2] < GREY,
        coin[3] < blur,
        draws.uniform(0.1, 2.0, n).astype(np.float32),
    )


def _draw_boxes(n: int, size: int, draws: np.random.Generator) -> np.ndarray:
    area = size**2 * draws.uniform(0.2, 1.0, (n, _TRIES))
    ratio = np.exp(np.log(4 / 3) * draws.uniform(-1, 1, (n, _TRIES)))
    w, h = (np.sqrt(a).round().astype(np.int64) for a in (area * ratio, area / ratio))
    fits = (w > 0) & (w <= size) & (h > 0) & (h <= size)
    first, row = fits.argmax(axis=1), np.arange(n)
    h, w = (np.where(fits.any(axis=1), side[row, first], size) for side in (h, w))
    top, left = (draws.random((2, n)) * (size + 1 - np.stack([h, w]))).astype(np.int64)
    return np.stack([top, left, h, w], axis=1)


def look(x: torch.Tensor, draw: Draw) -> torch.Tensor:
    """The views of a batch float (B, C, H, W) in 0..1, C = 1 or 3, H = W."""
    x, factors = _crop(x, draw), to_device(draw.factors, x.device)
    for place in range(4):
        for which, change in enumerate((_brightness, _contrast, _saturation, _hue)):
            members = np.flatnonzero(draw.jittered & (draw.order[:, place] == which))
            if len(members):
                rows = to_device(members, x.device)
                factor = factors[rows, which, None, None, None]
                x = x.index_copy(0, rows, change(x[rows], factor))
    grey, blurred = to_device(np.stack([draw.grey, draw.blurred]), x.device)[..., None, None, None]
    x = torch.where(grey, _grey(x).expand_as(x), x)
    return torch.where(blurred, _blur(x, draw.sigma), x)


def _crop(x: torch.Tensor, draw: Draw) -> torch.Tensor:
    """Each image's box, mirrored or not, at the size of the image (bilinear; a box is never larger)."""
    size = x.shape[-1]
    top, left, h, w = to_device(draw.box, x.device).unbind(dim=1)
    mirrored = to_device(draw.mirrored, x.device)
    rows = _interpolation(top, h, torch.zeros_like(mirrored), size).to(x)
    columns = _interpolation(left, w, mirrored, size).to(x)
    return torch.einsum("bih,bchw,bjw->bcij", rows, x, columns)


def _interpolation(start, length, mirrored, size: int) -> torch.Tensor:
    """Weights float (B, size, size) of the old pixels (last) in the new ones."""
    pixels = torch.arange(size, device=start.device)
    at = (pixels + 0.5) * (length[:, None] / size) - 0.5
    at = at.clamp_min(0)
    lower = at.floor().long().minimum(length[:, None] - 1)
    upper = (lower + 1).minimum(length[:, None] - 1)
    share = (at - lower)[..., None]
    weights = (1 - share) * ((lower + start[:, None])[..., None] == pixels)
    weights = weights + share * ((upper + start[:, None])[..., None] == pixels)
    return torch.where(mirrored[:, None, None], weights.flip(1), weights)


def _blend(x, other, factor) -> torch.Tensor:
    return (factor * x + (1 - factor) * other).clamp(0, 1)


def _grey(x) -> torch.Tensor:
    if x.shape[1] == 1:
        return x
    weights = to_device(_LUMA, x.device).to(x)
    return (x * weights[:, None, None]).sum(dim=1, keepdim=True)


def _brightness(x, factor) -> torch.Tensor:
    return (factor * x).clamp(0, 1)


def _contrast(x, factor) -> torch.Tensor:
    return _blend(x, _grey(x).mean(dim=(1, 2, 3), keepdim=True), factor)


def _saturation(x, factor) -> torch.Tensor:
    return x if x.shape[1] == 1 else _blend(x, _grey(x), factor)


def _hue(x, factor) -> torch.Tensor:
    """factor: a part of the whole circle of hues."""
    from torchvision.transforms.v2.functional._color import _hsv_to_rgb, _rgb_to_hsv

    if x.shape[1] == 1:
        return x
    hue, *rest = _rgb_to_hsv(x).unbind(dim=1)
    return _hsv_to_rgb(torch.stack([(hue + factor[:, 0]) % 1, *rest], dim=1))


def _blur(x, sigma) -> torch.Tensor:
    """Each image by a Gaussian of its own sigma, over a tenth of its side, three pixels at least."""
    B, C, H, W = x.shape
    k = max(3, H // 10 * 2 + 1)
    t = np.arange(k, dtype=np.float32) - k // 2
    kernel = np.exp(-(t**2) / (2 * sigma[:, None] ** 2))
    kernel = to_device(kernel / kernel.sum(axis=1, keepdims=True), x.device).to(x)  # (B, k)
    kernel = kernel.repeat_interleave(C, dim=0)[:, None]  # (B C, 1, k)
    flat = F.pad(x.reshape(1, B * C, H, W), (k // 2,) * 4, mode="reflect")
    flat = F.conv2d(flat, kernel[:, :, :, None], groups=B * C)
    return F.conv2d(flat, kernel[:, :, None, :], groups=B * C).reshape(B, C, H, W)
