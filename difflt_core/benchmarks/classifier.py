"""How fast a classifier trains: an epoch against the usual loop's.

Usual: fp32, NCHW, PIL transforms (crop, flip, normalise) in a DataLoader with two workers. Ours:
what the stage does with profile cifar10's recipe. The images are noise: speed does not depend on
what they show.
"""

import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from ..config import load_config
from ..engine.precision import set_kernels
from ..engine.progress import Context
from ..engine.provenance import hardware
from ..recognition.classifier import train_on
from ..recognition.networks import make_backbone
from .shared import add_steps, four_digits, write
from .timing import now

__all__ = ["add_options", "compare_epochs", "run"]

N_IMAGES, N_CLASSES, BATCH = 12_406, 10, 128  # CIFAR-10-LT, r = 100
WARM_UP = 3  # steps that are not counted


def add_options(parser) -> None:
    add_steps(parser)
    parser.add_argument("--arch", default="resnet32", choices=("resnet32", "resnet32x4"))


def run(options) -> None:
    rows = compare_epochs(options.arch, options.device, options.steps)
    hard = hardware(options.device)
    face = f"{options.arch}, batch {BATCH}, {options.steps} timed steps, {hard}"
    name, record = f"classifier-{options.arch}-{options.device}", {"n_steps": options.steps}
    write(options, name, face, four_digits(pd.DataFrame(rows)), {**record, "rows": rows})


def compare_epochs(arch: str, device: str, n_steps: int) -> list[dict]:
    """Rows of the usual loop and of ours: images/s, and seconds of an epoch of CIFAR-10-LT (r 100).

    Args:
        n_steps: timed steps of 128 images each, at most an epoch (93 after the warm-up).
    """
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (N_IMAGES, 32, 32, 3), np.uint8)
    labels = generator.integers(0, N_CLASSES, N_IMAGES)
    n_steps = min(n_steps, N_IMAGES // BATCH - WARM_UP)
    times = {
        "usual loop (fp32, PIL, DataLoader with 2 workers)": _usual(
            arch, device, images, labels, n_steps
        ),
        "ours": _ours(arch, device, images, labels, n_steps),
    }
    rates = {name: BATCH * n_steps / seconds for name, seconds in times.items()}
    usual = next(iter(rates.values()))
    return [
        {"loop": name, "images/s": rate, "s per epoch": N_IMAGES / rate, "gain": rate / usual}
        for name, rate in rates.items()
    ]


class _Pictures(Dataset):
    def __init__(self, images, labels):
        from torchvision import transforms

        self.images, self.labels = images, labels
        self.transform = transforms.Compose(
            [
                transforms.ToPILImage(),
                transforms.RandomCrop(32, 4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int):
        return self.transform(self.images[i]), int(self.labels[i])


def _usual(arch: str, device: str, images, labels, n_steps: int) -> float:
    """Seconds of n_steps of the loop that the peers' code has."""
    loader = DataLoader(_Pictures(images, labels), BATCH, shuffle=True, num_workers=2)
    net = make_backbone(arch, N_CLASSES, 3).to(device, memory_format=torch.contiguous_format)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9, weight_decay=2e-4)
    started = 0.0
    for step, (x, y) in enumerate(loader):
        if step == WARM_UP:
            started = now(device)
        if step == WARM_UP + n_steps:
            break
        loss = F.cross_entropy(net(x.to(device)), y.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return now(device) - started


def _ours(arch: str, device: str, images, labels, n_steps: int) -> float:
    """Seconds of n_steps of the stage itself: a run of a few steps is taken off a longer one."""
    set_kernels(device)
    recipe = load_config("cifar10").extractor.model_dump() | {"arch": arch}
    weights, seconds = np.ones(len(labels), np.float32), []
    for n in (WARM_UP, WARM_UP, WARM_UP + n_steps):
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            (work / "out").mkdir()
            config = {"classifier": {**recipe, "n_steps": n}, "seed": 0}
            context, started = Context(device, progress=False), now(device)
            train_on(work, config, images, labels, weights, N_CLASSES, "benchmark", context)
            seconds.append(now(device) - started)
    return seconds[2] - seconds[1]
