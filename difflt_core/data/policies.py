"""AutoAugment and RandAugment by torchvision's operations, a whole batch at once, every image by its
own draw; the same bits as torchvision's transform of one image after the other on a CPU.

Most operations say for each pixel which one it comes from, or for each of the 256 values what becomes
of it, whatever the image: torchvision is asked once, and a batch looks it up. So nothing is read from
the device, no copy to it is waited for, and there are few launches.
"""

import functools
import itertools

import numpy as np
import torch
import torch.nn.functional as F

from ..engine.device import to_device
from ..engine.seeding import host_draws

__all__ = ["as_bytes", "autoaugment", "randaugment"]

_FILL = 128  # grey, where a turned or moved image leaves a gap
_MOVES = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")  # pixels, by a table
_RECOLOURS = ("Brightness", "Posterize", "Solarize", "Invert")  # values, by a table


def autoaugment(x: torch.Tensor, flip: bool, seed: int) -> torch.Tensor:
    """One of CIFAR-10's 25 sub-policies of two operations, each with its probability."""
    from torchvision.transforms import v2

    transform, B = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10), len(x)
    draws = host_draws(seed)
    policy = draws.integers(len(transform._policies), size=B)
    coin, negative = draws.random((B, 2)), draws.random((B, 2)) <= 0.5
    steps: list[list] = []
    for k in (0, 1):
        drawn = enumerate(transform._policies[p][k] for p in policy)
        steps.append(
            [
                (name, level, bool(negative[i, k])) if coin[i, k] <= probability else None
                for i, (name, probability, level) in drawn
            ]
        )
    return _by_steps(x, transform, steps, 10)


def randaugment(x: torch.Tensor, flip: bool, seed: int) -> torch.Tensor:
    """Two operations of magnitude 10 of 30."""
    from torchvision.transforms import v2

    transform, B = v2.RandAugment(num_ops=2, magnitude=10), len(x)
    names = list(transform._AUGMENTATION_SPACE)
    draws = host_draws(seed)
    drawn, negative = draws.integers(len(names), size=(2, B)), draws.random((2, B)) <= 0.5
    steps = [
        [(names[op], 10, bool(sign)) for op, sign in zip(ops, signs, strict=True)]
        for ops, signs in zip(drawn, negative, strict=True)
    ]
    return _by_steps(x, transform, steps, 31)


def _by_steps(x: torch.Tensor, transform, steps: list[list], n_levels: int) -> torch.Tensor:
    """Every image through its own operations, one after the other.

    Args:
        steps: for each step and image, (name, level, negative), or None for no operation.
        n_levels: of the magnitudes.
    """
    images, size = as_bytes(x), tuple(x.shape[-2:])
    named = {
        drawn: drawn and _operation(transform, drawn, n_levels, size)
        for drawn in set(itertools.chain.from_iterable(steps))
    }
    for drawn in steps:
        images = _one_each(images, [named[one] for one in drawn])
    return images.to(x.dtype) / 127.5 - 1


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 of a float in [-1, 1], of the same shape."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _operation(transform, drawn: tuple[str, int, bool], n_levels: int, size) -> tuple[str, float]:
    """An operation of torchvision's policies, by name, and its magnitude."""
    name, level, negative = drawn
    magnitudes, signed = transform._AUGMENTATION_SPACE[name]
    found = magnitudes(n_levels, *size)
    magnitude = 0.0 if found is None else found.tolist()[level]
    return name, -magnitude if signed and negative else magnitude


def _one_each(images: torch.Tensor, operations: list[tuple[str, float] | None]) -> torch.Tensor:
    """Bytes (B, C, H, W), each through its operation: sorted, so that those which have the same lie
    beside each other, first those with a table, last those that stay as they are."""
    groups: dict[tuple[str, float] | None, list[int]] = {}
    for i, operation in enumerate(operations):
        groups.setdefault(operation, []).append(i)
    none = groups.pop(None, []) + groups.pop(("Identity", 0.0), [])
    ranks = {operation: _rank(operation[0]) for operation in groups}
    by_kind = sorted(groups, key=lambda operation: ranks[operation])
    order = np.concatenate([groups[operation] for operation in by_kind] + [none]).astype(np.int64)
    there, back = to_device(np.stack([order, order.argsort()]), images.device)
    images, start = images[there], 0
    for rank in (0, 1):
        tables = [
            _table(*operation, *images.shape[-2:], images.device).expand(len(groups[operation]), -1)
            for operation in by_kind
            if ranks[operation] == rank
        ]
        if tables:
            rows = slice(start, start := start + sum(map(len, tables)))
            images[rows] = (_moved, _recoloured)[rank](images[rows], torch.cat(tables))
    for operation in by_kind:
        if ranks[operation] == 2:
            rows = slice(start, start := start + len(groups[operation]))
            images[rows] = _changed(images[rows], *operation)
    return images[back]


def _rank(name: str) -> int:
    """0: moves pixels by a table. 1: changes values by a table. 2: neither."""
    return 0 if name in _MOVES else 1 if name in _RECOLOURS else 2


@functools.lru_cache(maxsize=1000)
def _table(name: str, magnitude: float, H: int, W: int, device) -> torch.Tensor:
    """What torchvision's operation does to any image: where each pixel comes from, int64 (H W,), H W
    being outside; or what becomes of each value, uint8 (256,)."""
    if name in _MOVES:
        pixels = torch.arange(H * W, dtype=torch.float32).reshape(1, H, W)
        return to_device(_by_torchvision(pixels, name, magnitude, H * W).flatten().long(), device)
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    return to_device(_by_torchvision(values, name, magnitude).flatten(), device)


def _moved(images: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Bytes (n, C, H, W) by int64 (n, H W)."""
    with_outside = F.pad(images.flatten(2), (0, 1), value=_FILL)
    return with_outside.gather(2, source[:, None].expand(-1, images.shape[1], -1)).view_as(images)


def _recoloured(images: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Bytes (n, C, H, W) by bytes (n, 256)."""
    return values.gather(1, images.flatten(1).long()).view_as(images)


def _changed(images: torch.Tensor, name: str, magnitude: float) -> torch.Tensor:
    if name == "Sharpness":
        return _sharpened(images, 1 + magnitude)
    return _by_torchvision(images, name, magnitude)


def _sharpened(images: torch.Tensor, factor: float) -> torch.Tensor:
    """torchvision's, without the copy of its kernel that the host waits for: 1 around a 5, by 13."""
    if min(images.shape[-2:]) <= 2:
        return images
    sharp = images.float()
    inside = sharp[..., 1:-1, 1:-1]
    # thirteenths are never near a half, so any rounding of the sum gives the same integer
    blurred = ((F.avg_pool2d(sharp, 3, 1) * 9 + 4 * inside) / 13).round()
    inside.add_(blurred - inside, alpha=1 - factor)
    return sharp.clamp_(0, 255).to(torch.uint8)


def _by_torchvision(images: torch.Tensor, name: str, magnitude: float, outside: int = _FILL):
    transform = _transform(outside)
    how = {"interpolation": transform.interpolation, "fill": transform._fill}
    return transform._apply_image_or_video_transform(images, name, magnitude, **how)


@functools.lru_cache(maxsize=100)
def _transform(outside: int):
    from torchvision.transforms import v2

    return v2.RandAugment(fill=outside)  # which knows AutoAugment's operations too
