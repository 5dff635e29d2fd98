"""Which sampler is how fast and how good: images/s and FID on the demo's generator."""

import time

import numpy as np
import pandas as pd

from ..config import load_config
from ..engine.provenance import hardware
from ..generation.network import load_denoiser
from ..generation.quality import Quality, fid
from ..generation.sampling import generate, make_sampler
from .shared import add_runs, four_digits, open_pipeline, write

__all__ = ["SAMPLERS", "add_options", "compare_samplers", "run"]

SAMPLERS = [  # and their steps
    ("euler", 50),
    ("heun", 18),
    ("dpm++ 2m", 12),
    ("dpm++ 2m", 15),
    ("dpm++ 2m", 20),
    ("dpm++ 2m", 50),
    ("dpm++ 2m sde", 50),
]


def add_options(parser) -> None:
    add_runs(parser)
    parser.add_argument(
        "--per-class", type=int, default=100, metavar="N", help="images (default: 100)"
    )


def run(options) -> None:
    config = load_config(options.profile or "demo")
    pipeline = open_pipeline(options, config)
    rows, words = compare_samplers(pipeline, options.per_class)
    face = (
        f"{config.data.name}, the {config.profile}'s generator "
        f"({config.diffusion.parameterisation}, seed {config.seed}), guidance "
        f"{config.sampling.guidance:g}; FID of {words}; gain: over the slowest; "
        f"{hardware(options.device)}"
    )
    record = {"protocol": face, "rows": rows.to_dict("records")}
    write(options, f"samplers-{options.device}", face, four_digits(rows), record)


def compare_samplers(pipeline, n_per_class: int) -> tuple[pd.DataFrame, str]:
    """Network calls, images/s and FID of each sampler, and what FID compares, in words."""
    config, quality, networks = pipeline.config, Quality(pipeline), _networks(pipeline)
    K = len(quality.reference.class_names)
    labels, indices = np.repeat(np.arange(K), n_per_class), np.tile(np.arange(n_per_class), K)
    rows = []
    for name, n_steps in SAMPLERS:
        recipe = config.sampling.model_copy(update={"sampler": name, "n_steps": n_steps})
        _draw(networks, recipe.model_copy(update={"n_steps": 2}), labels[:K], indices[:K])
        started = time.perf_counter()
        images = _draw(networks, recipe, labels, indices)
        elapsed_s = time.perf_counter() - started
        ends = (recipe.sigma_min, recipe.sigma_max)
        calls = len(make_sampler(name, networks[0].noise, n_steps, *ends).sigmas)
        score = fid(quality.real, quality.features(images))
        row = {"sampler": name, "steps": n_steps, "calls": calls}
        rows.append({**row, "images/s": len(labels) / elapsed_s, "FID": score})
    table = pd.DataFrame(rows)
    table.insert(4, "gain", table["images/s"] / table["images/s"].min())
    return table, quality.words(len(labels))


def _networks(pipeline) -> tuple:
    """The denoiser, and the weak one where guidance leads away from an earlier network."""
    config, device = pipeline.config, pipeline.store.context.device
    options = (config.diffusion, device, config.sampling.precision)
    denoiser = load_denoiser(pipeline.train_diffusion(), *options)
    earlier = config.sampling.guide == "earlier"
    return denoiser, load_denoiser(pipeline.train_plain(), *options) if earlier else None


def _draw(networks, recipe, labels, indices) -> np.ndarray:
    denoiser, weak = networks
    size, parts = recipe.batch_size, []
    for start in range(0, len(labels), size):
        part = slice(start, start + size)
        parts.append(generate(denoiser, recipe, labels[part], indices[part], 0, weak, "measured"))
    return np.concatenate(parts)
