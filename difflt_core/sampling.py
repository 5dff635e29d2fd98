"""Generate (stage 3): fill every class up to N_t images. Image i of class y depends on (model,
seed, y, i) alone."""

import json
import os

import numpy as np
import torch

from .config import DiffusionConfig, SamplingConfig
from .data import load_split
from .diffusion import load_diffusion, make_schedule
from .progress import bar
from .seeding import derive_seed
from .store import atomic_write

__all__ = ["build_samples", "generate", "make_sampler", "wanted_labels"]


def wanted_labels(class_counts, fill_to: int = 0) -> np.ndarray:
    """Labels int64 (N_gen,) of the images to draw: N_t - n_c for every class with n_c < N_t; N_t =
    fill_to or n_max."""
    counts = np.asarray(class_counts)
    missing = np.maximum((fill_to or counts.max()) - counts, 0)
    return np.repeat(np.arange(len(counts)), missing)


def make_sampler(name: str, schedule):
    """diffusers' scheduler of that name on the training schedule."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    if name == "ddpm":
        return schedule
    config = {**schedule.config, "clip_sample": True, "timestep_spacing": "trailing"}
    if name == "ddim":
        return DDIMScheduler.from_config(config)
    return DPMSolverMultistepScheduler.from_config(config)


@torch.no_grad()
def generate(
    unet, schedule, config: SamplingConfig, labels: np.ndarray, indices: np.ndarray, seed: int
) -> np.ndarray:
    """Images uint8 (n, H, W, C) for labels (n,); indices (n,) is each image's number within its
    class."""
    device = next(unet.parameters()).device
    size, channels, null = (
        unet.config.sample_size,
        unet.config.in_channels,
        unet.config.num_class_embeds - 1,
    )
    noise = [
        torch.Generator().manual_seed(derive_seed(seed, "image", int(y), int(i)))
        for y, i in zip(labels, indices, strict=True)
    ]
    x = torch.cat([torch.randn(1, channels, size, size, generator=g) for g in noise]).to(device)
    y = torch.from_numpy(np.asarray(labels)).to(device)
    guided = config.guidance > 1
    y_in = torch.cat([y, torch.full_like(y, null)]) if guided else y
    sampler = make_sampler(config.sampler, schedule)
    sampler.set_timesteps(config.n_steps)
    extra = {"generator": noise} if config.sampler == "ddpm" else {}
    for t in sampler.timesteps:
        eps = unet(x.repeat(2, 1, 1, 1) if guided else x, t, y_in, return_dict=False)[0]
        if guided:
            eps_y, eps_null = eps.chunk(2)
            eps = eps_null + config.guidance * (eps_y - eps_null)
        x = sampler.step(eps, t, x, return_dict=False, **extra)[0]
    image = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return image.permute(0, 2, 3, 1).cpu().numpy()


def build_samples(work, config: dict, inputs: dict, context) -> None:
    """Stage 3. inputs: data, diffusion. Streams to a memory-mapped images.npy and resumes after a
    kill."""
    recipe, seed = SamplingConfig.model_validate(config["sampling"]), config["seed"]
    counts = load_split(inputs["data"], "train").class_counts
    labels = wanted_labels(counts, recipe.fill_to)
    indices = np.concatenate([np.arange(n) for n in np.bincount(labels, minlength=len(counts))])
    unet = load_diffusion(inputs["diffusion"], context.device)
    schedule = make_schedule(DiffusionConfig.model_validate(config["diffusion"]))
    shape = (len(labels), unet.config.sample_size, unet.config.sample_size, unet.config.in_channels)
    np.save(work / "out" / "labels.npy", labels)
    if not len(labels):  # balanced data: nothing is missing
        np.save(work / "out" / "images.npy", np.zeros(shape, np.uint8))
        return
    partial, done_file = work / "images.npy", work / "done.json"
    done = (
        json.loads(done_file.read_text())["images"]
        if done_file.exists() and partial.exists()
        else 0
    )
    images = np.lib.format.open_memmap(
        partial, "r+" if done else "w+", np.uint8, None if done else shape
    )
    with bar(
        len(labels), f"generate, seed {seed}", unit="image", initial=done, context=context
    ) as progress:
        for start in range(done, len(labels), recipe.batch_size):
            part = slice(start, min(start + recipe.batch_size, len(labels)))
            images[part] = generate(unet, schedule, recipe, labels[part], indices[part], seed)
            images.flush()
            atomic_write(done_file, json.dumps({"images": part.stop}))
            progress.update(part.stop - start)
    del images
    os.replace(partial, work / "out" / "images.npy")
