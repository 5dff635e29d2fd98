"""A batch through each augmentation policy: all images at once, as a training step has it, against
torchvision's transform of one image after the other."""

import pandas as pd
import torch

from ..data.augment import POLICIES
from ..data.policies import as_bytes
from ..engine.provenance import hardware
from .shared import add_steps, write
from .timing import seconds

__all__ = ["add_options", "one_by_one", "run"]

SIZES = ((128, 32), (64, 16))  # images, pixels


def add_options(parser) -> None:
    add_steps(parser)


def run(options) -> None:
    """On one CPU thread, the two ways in turn."""
    options.device, threads = "cpu", torch.get_num_threads()
    torch.set_num_threads(1)
    rows = [
        _compare(name, n, size, options.steps)
        for n, size in SIZES
        for name in ("autoaugment", "randaugment", "contrastive")
    ]
    torch.set_num_threads(threads)
    table = pd.DataFrame(rows).round({"one at a time, ms": 1, "at once, ms": 1, "gain": 2})
    face = f"Milliseconds of a batch, median of {options.steps}, one thread, {hardware('cpu')}"
    write(options, "augment-cpu", face, table, {"rows": rows})


def _transform(name: str, size: int):
    """torchvision's own, for one image as bytes."""
    from torchvision.transforms import v2

    if name == "autoaugment":
        return v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10, fill=128)
    if name == "randaugment":
        return v2.RandAugment(num_ops=2, magnitude=10, fill=128)
    blur = v2.GaussianBlur(kernel_size=max(3, size // 10 * 2 + 1), sigma=(0.1, 2.0))
    view = [
        v2.RandomResizedCrop(size, scale=(0.2, 1.0), antialias=True),
        v2.RandomHorizontalFlip(0.5),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        v2.RandomGrayscale(0.2),
        v2.RandomApply([blur], p=0.5),
    ]
    return v2.Compose(view)


def one_by_one(x: torch.Tensor, transform, seed: int) -> torch.Tensor:
    """torchvision's transform of each image of a batch in [-1, 1], as bytes, one after the other."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        changed = torch.stack([transform(image) for image in as_bytes(x)])
    return changed.to(x.dtype) / 127.5 - 1


def _compare(name: str, n: int, size: int, steps: int) -> dict:
    x = torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    transform = _transform(name, size)
    slow = seconds(lambda i: one_by_one(x, transform, i), steps, "cpu")
    fast = seconds(lambda i: POLICIES[name](x, True, i), steps, "cpu")
    times = {"one at a time, ms": 1000 * slow, "at once, ms": 1000 * fast}
    return {"policy": name, "batch": f"{n} of {size}x{size}", **times, "gain": slow / fast}
