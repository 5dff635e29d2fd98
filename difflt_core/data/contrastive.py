"""The view that contrastive methods take of an image (docs/protocol.md, PaCo and SAU): a random crop,
a mirror image, colour jitter, grey, blur; of a whole batch at once, every image by its own draw.

torchvision's operations, in floating point where those on bytes round after each: equal to them up
to that rounding.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

__all__ = ["Draw", "draw_views", "look"]

_TRIES = 10  # of a crop that fits, before the whole image is taken
JITTER, GREY, BLUR = 0.8, 0.2, 0.5  # shares of the images


@dataclass(frozen=True)
class Draw:
    """What happens to each of B images. box: top, left, height, width, int64 (B, 4). mirrored,
    jittered, grey, blurred: bool (B,). order: of brightness, contrast, saturation, hue, int64 (B, 4).
    factors: of the same four, float (B, 4). sigma: of the blur in pixels, float (B,)."""

    box: torch.Tensor
    mirrored: torch.Tensor
    jittered: torch.Tensor
    order: torch.Tensor
    factors: torch.Tensor
    grey: torch.Tensor
    blurred: torch.Tensor
    sigma: torch.Tensor


def draw_views(n: int, size: int, flip: bool, g: torch.Generator) -> Draw:
    """Draws for n images of size x size pixels: crops of 20 to 100 % of the area and sides of 3 : 4 to
    4 : 3; half of them mirrored where flip is."""
    coin = torch.rand(4, n, generator=g)
    spread = torch.rand(n, 4, generator=g) * 2 - 1
    return Draw(
        _draw_boxes(n, size, g),
        coin[0] < (0.5 if flip else 0.0),
        coin[1] < JITTER,
        torch.rand(n, 4, generator=g).argsort(dim=1),
        spread * torch.tensor([0.4, 0.4, 0.4, 0.1]) + torch.tensor([1.0, 1.0, 1.0, 0.0]),
        coin[2] < GREY,
        coin[3] < BLUR,
        0.1 + 1.9 * torch.rand(n, generator=g),
    )


def _draw_boxes(n: int, size: int, g: torch.Generator) -> torch.Tensor:
    area = size**2 * (0.2 + 0.8 * torch.rand(n, _TRIES, generator=g))
    log_ratio = torch.log(torch.tensor(4 / 3)) * (2 * torch.rand(n, _TRIES, generator=g) - 1)
    w = (area * log_ratio.exp()).sqrt().round().long()
    h = (area / log_ratio.exp()).sqrt().round().long()
    fits = (w > 0) & (w <= size) & (h > 0) & (h <= size)
    first, any_fits = fits.long().argmax(dim=1, keepdim=True), fits.any(dim=1)
    h, w = (torch.where(any_fits, side.gather(1, first)[:, 0], size) for side in (h, w))
    place = torch.rand(2, n, generator=g)
    top, left = (place * (size + 1 - torch.stack([h, w]))).long()
    return torch.stack([top, left, h, w], dim=1)


def look(x: torch.Tensor, draw: Draw) -> torch.Tensor:
    """The views of a batch float (B, C, H, W) in 0..1, C = 1 or 3, H = W."""
    x = _crop(x, draw)
    for place in range(4):
        for which, change in enumerate((_brightness, _contrast, _saturation, _hue)):
            rows = (draw.jittered & (draw.order[:, place] == which)).nonzero()[:, 0].to(x.device)
            if len(rows):
                factor = draw.factors[:, which].to(x.device)[rows, None, None, None]
                x = x.index_copy(0, rows, change(x[rows], factor))
    x = torch.where(draw.grey.to(x.device)[:, None, None, None], _grey(x).expand_as(x), x)
    return torch.where(draw.blurred.to(x.device)[:, None, None, None], _blur(x, draw.sigma), x)


def _crop(x: torch.Tensor, draw: Draw) -> torch.Tensor:
    """Each image's box, mirrored or not, at the size of the image (bilinear; a box is never larger)."""
    size = x.shape[-1]
    top, left, h, w = draw.box.T
    rows = _interpolation(top, h, torch.zeros_like(draw.mirrored), size).to(x)
    columns = _interpolation(left, w, draw.mirrored, size).to(x)
    return torch.einsum("bih,bchw,bjw->bcij", rows, x, columns)


def _interpolation(start, length, mirrored, size: int) -> torch.Tensor:
    """Weights float (B, size, size) of the old pixels (last) in the new ones."""
    at = (torch.arange(size) + 0.5) * (length[:, None] / size) - 0.5
    at = at.clamp_min(0)
    lower = at.floor().long().minimum(length[:, None] - 1)
    upper = (lower + 1).minimum(length[:, None] - 1)
    share = (at - lower)[..., None]
    weights = (1 - share) * F.one_hot(lower + start[:, None], size)
    weights = weights + share * F.one_hot(upper + start[:, None], size)
    return torch.where(mirrored[:, None, None], weights.flip(1), weights)


def _blend(x, other, factor) -> torch.Tensor:
    return (factor * x + (1 - factor) * other).clamp(0, 1)


def _grey(x) -> torch.Tensor:
    if x.shape[1] == 1:
        return x
    return (x * x.new_tensor([0.2989, 0.587, 0.114])[:, None, None]).sum(dim=1, keepdim=True)


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
    t = torch.arange(k) - k // 2
    kernel = torch.softmax(-(t**2) / (2 * sigma[:, None] ** 2), dim=1).to(x)  # (B, k)
    kernel = kernel.repeat_interleave(C, dim=0)[:, None]  # (B C, 1, k)
    flat = F.pad(x.reshape(1, B * C, H, W), (k // 2,) * 4, mode="reflect")
    flat = F.conv2d(flat, kernel[:, :, :, None], groups=B * C)
    return F.conv2d(flat, kernel[:, :, None, :], groups=B * C).reshape(B, C, H, W)
