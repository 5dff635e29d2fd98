"""What a step of SAU costs: against four forwards one after the other.

Plain: fp32, NCHW, four forwards one after the other. Ours: what the stage does. Both draw the same
views, and give the same loss to rounding. Each runs in a process of its own, for its peak memory.
"""

import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from ..config import load_config
from ..engine.precision import set_kernels
from ..engine.progress import Context
from ..engine.provenance import hardware
from ..recognition.networks import split_norms
from ..recognition.sau import SauSteps
from .shared import add_steps, compare, in_a_process, write
from .timing import peak_gib, seconds

__all__ = ["add_options", "measure_sau", "run"]

_ROWS = {
    "precision": ("precision", None, "{}"),
    "loss": ("loss of the first step", None, "{:.4f}"),
    "step_s": ("a step, s", "less", "{:.3g}"),
    "images_per_s": ("images/s", "more", "{:.4g}"),
    "mem_gib": ("peak memory, GiB", "less", "{:.2f}"),
}


def add_options(parser) -> None:
    add_steps(parser)
    parser.add_argument("--arch", default="resnet32x4", choices=("resnet32", "resnet32x4"))
    parser.add_argument("--batch", type=int, default=32, help="images per step (default: 32)")


def run(options) -> None:
    arguments = (options.arch, options.device, options.batch, options.steps)
    rows = [in_a_process(measure_sau, mode, *arguments) for mode in ("plain", "ours")]
    face = f"SAU, {options.arch}, batch {options.batch} seen four times, {hardware(options.device)}"
    name = f"sau-{options.arch}-{options.device}"
    write(options, name, face, compare(*rows, _ROWS), {"modes": rows})


def measure_sau(mode: str, arch: str, device: str, batch: int, n_steps: int) -> dict:
    """Seconds of a step, images/s, and peak memory in GiB of one mode, "plain" or "ours".

    Args:
        batch: real and synthetic images of a step, each seen four times.
    """
    ours, changes = mode == "ours", {"arch": arch, "batch_size": batch, "n_steps": n_steps + 2}
    recipe = load_config("cifar10").sau.model_dump(mode="json") | changes
    recipe["precision"] = "auto" if ours else "fp32"
    context = Context(device, progress=False)
    if ours:
        set_kernels(device)
    else:
        os.environ["DIFFLT_COMPILE"] = "off"
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        sau = SauSteps({"sau": recipe, "seed": 0}, _noise(4 * batch, work), context)
        if not ours:
            _forward_one_by_one(sau.model)
        losses = []

        def update(k: int) -> None:
            loss, _ = sau.step(k)
            sau.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            sau.optimizer.step()
            losses.append(loss.detach())

        step_s = seconds(update, n_steps, device)
    return {
        "precision": "bf16" if sau.half else "fp32",
        "loss": float(losses[0]),
        "images_per_s": batch / step_s,
        "step_s": step_s,
        "mem_gib": peak_gib(device),
    }


def _forward_one_by_one(model) -> None:
    """Let the network take a joined batch apart again, and hold it in the usual layout."""
    model.to(memory_format=torch.contiguous_format)
    split_norms(model, 1)
    for module, name, n_parts in ((model.net, "features", 4), (model, "project", 2)):
        whole = getattr(module, name)
        setattr(module, name, lambda x, f=whole, n=n_parts: _in_parts(model, f, x, n))


def _in_parts(model, forward, x: torch.Tensor, n: int) -> torch.Tensor:
    return torch.cat([forward(part) for part in x.chunk(n)]) if model.training else forward(x)


def _noise(n: int, path: Path) -> dict:
    """Artifacts of n real and n synthetic noise images of ten classes."""
    g = np.random.default_rng(0)
    images, labels = g.integers(0, 256, (n, 32, 32, 3), np.uint8), np.arange(n) % 10
    arrays = {"train_images": images, "train_labels": labels, "images": images, "labels": labels}
    info = {"class_names": [str(c) for c in range(10)]}
    artifact = SimpleNamespace(
        array=arrays.__getitem__, json=lambda _: info, key="noise", path=path
    )
    return {"data": artifact, "synthetic": artifact}
