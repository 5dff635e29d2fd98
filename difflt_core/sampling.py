"""Generate (stage 3): fill every class up to N_t images. Image i of class y depends on (model,
seed, y, i) alone."""

import numpy as np
import torch

from .config import DiffusionConfig, SamplingConfig
from .data import load_split, shortfall
from .diffusion import (
    compile_where_it_pays,
    load_diffusion,
    make_schedule,
    memory_format,
)
from .progress import half_precision, out_of_memory
from .seeding import generator
from .store import finish_chunks, open_chunks, unfilled

__all__ = ["build_samples", "generate", "make_sampler", "wanted_labels"]


def wanted_labels(class_counts, fill_to: int = 0) -> np.ndarray:
    """Labels int64 (N_gen,) of the images to draw: N_t - n_c for every class with n_c < N_t; N_t =
    fill_to or n_max."""
    missing = shortfall(class_counts, fill_to)
    return np.repeat(np.arange(len(missing)), missing)


def make_sampler(name: str, schedule):
    """diffusers' scheduler of that name on the training schedule."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    if name == "ddpm":
        return schedule
    config = {**schedule.config, "clip_sample": True, "timestep_spacing": "trailing"}
    if name == "ddim":
        return DDIMScheduler.from_config(config)
    karras = name == "dpm++ karras"  # steps crowded at low noise (Karras et al. 2022)
    return DPMSolverMultistepScheduler.from_config({**config, "use_karras_sigmas": karras})


@torch.inference_mode()
def generate(
    unet, schedule, config: SamplingConfig, labels: np.ndarray, indices: np.ndarray, seed: int
) -> np.ndarray:
    """Images uint8 (n, H, W, C) for labels (n,); indices (n,) is each image's number within its
    class. Its noise is a function of (seed, label, index) alone."""
    device = next(unet.parameters()).device
    shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    null = unet.config.num_class_embeds - 1
    noise = [generator(seed, "image", int(y), int(i)) for y, i in zip(labels, indices, strict=True)]
    x = torch.stack([torch.randn(shape, generator=g) for g in noise]).to(device)
    y = torch.from_numpy(np.asarray(labels)).to(device)
    guided = config.guidance > 1
    y_in = torch.cat([y, torch.full_like(y, null)]) if guided else y
    sampler = make_sampler(config.sampler, schedule)
    sampler.set_timesteps(config.n_steps)
    extra = {"generator": noise} if config.sampler == "ddpm" else {}
    half = torch.autocast(
        device.type, torch.bfloat16, enabled=half_precision(config.precision, device.type)
    )
    for t in sampler.timesteps:
        with half:
            eps = unet(torch.cat([x, x]) if guided else x, t, y_in, return_dict=False)[0].float()
        if guided:  # both predictions come from one call
            eps_y, eps_null = eps.chunk(2)
            eps = eps_null + config.guidance * (eps_y - eps_null)
        x = sampler.step(eps, t, x, return_dict=False, **extra)[0]
    image = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return image.permute(0, 2, 3, 1).cpu().numpy()


def build_samples(work, config: dict, inputs: dict, context) -> None:
    """Stage 3. inputs: data, diffusion. Streams to a memory-mapped images.npy, chunk by chunk;
    resumes after a kill; several processes share the chunks."""
    recipe, seed = SamplingConfig.model_validate(config["sampling"]), config["seed"]
    counts = load_split(inputs["data"], "train").class_counts
    labels = wanted_labels(counts, recipe.fill_to)
    indices = np.concatenate([np.arange(n) for n in np.bincount(labels, minlength=len(counts))])
    preset = inputs["diffusion"].json("model")["preset"]
    unet = load_diffusion(inputs["diffusion"], context.device)
    unet = unet.to(memory_format=memory_format(preset, context.device))
    compile_where_it_pays(unet, context, preset)
    schedule = make_schedule(DiffusionConfig.model_validate(config["diffusion"]))
    size, channels = unet.config.sample_size, unet.config.in_channels
    shape = (len(labels), size, size, channels)
    images, done = open_chunks(work, "samples", shape, recipe.batch_size)
    for part in unfilled(images, done, recipe.batch_size, f"generate, seed {seed}", context):
        try:
            images[part] = generate(unet, schedule, recipe, labels[part], indices[part], seed)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(error, "sampling.batch_size", recipe.batch_size) from None
    finish_chunks(work, "samples", labels, {"sampling": config["sampling"], "seed": seed})
