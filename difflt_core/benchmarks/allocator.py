"""What it is worth that a stage's process keeps the memory that it has freed: images generated in a
second, and peak memory, with and without."""

import time

import torch

from ..config import load_config
from ..engine.provenance import hardware
from ..engine.stage_process import keep_freed_memory
from ..generation.network import Denoiser, make_unet
from ..generation.noise import make_noise
from ..generation.sampling import generate
from .shared import compare, in_a_process, write
from .timing import peak_gib

__all__ = ["add_options", "run"]


def add_options(parser) -> None:
    parser.add_argument("--steps", type=int, default=14, help="of sampling (default: 14)")
    parser.add_argument("--profile", default="photos", help="whose generator (default: photos)")
    parser.add_argument("--images", type=int, default=512, metavar="N", help="default: 512")


def run(options) -> None:
    """Each in a process of its own, in turn, on one thread as a stage has it."""
    options.device = "cpu"
    wanted = options.profile, options.images, options.steps
    given_back, kept = (in_a_process(_measured, *wanted, keeps) for keeps in (False, True))
    kinds = {
        "s": ("seconds", "less", "{:.1f}"),
        "gib": ("peak memory, GiB", "less", "{:.2f}"),
        "sum": ("sum of the images' bytes", None, "{:,}"),
    }
    face = (
        f"{options.images:,} images of the generator of profile {options.profile}, untrained, in "
        f"{options.steps} steps on one thread; reference: memory is given back as glibc does it; "
        f"{hardware('cpu')}."
    )
    record = {"modes": [given_back, kept]}
    write(options, "allocator-cpu", face, compare(given_back, kept, kinds), record)


def _measured(profile: str, n: int, n_steps: int, keeps: bool) -> dict:
    if keeps:
        keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = load_config(profile)
    recipe, K = config.diffusion, config.data.n_classes or 10
    unet = make_unet(recipe.preset, K, config.data.image_size, 3)
    denoiser = Denoiser(unet.eval(), make_noise(recipe))
    sampling = config.sampling.model_copy(update={"n_steps": n_steps, "precision": "fp32"})
    labels, started = [i % K for i in range(n)], time.perf_counter()
    images = generate(denoiser, sampling, labels, list(range(n)), 0)
    found = {"s": time.perf_counter() - started, "gib": peak_gib("cpu")}
    return found | {"sum": int(images.sum(dtype="int64"))}
