"""Generate (stage 3): fill every class up to N_t images. Image i of class y depends on (model,
seed, y, i) alone."""

import warnings

import numpy as np
import torch

from ..config import DiffusionConfig, SamplingConfig
from ..data.long_tail import load_split, shortfall
from ..engine.chunks import Chunks, finish_images
from ..engine.device import Compiled, compiled
from ..engine.precision import out_of_memory
from ..engine.seeding import generator
from .network import is_small, load_denoiser
from .noise import make_noise

__all__ = [
    "Sampler",
    "build_samples",
    "check_sampling",
    "generate",
    "make_sampler",
    "wanted_labels",
]


_HEUN_MAX = 157.0  # sigma of the last timestep of its scheduler


def wanted_labels(class_counts, fill_to: int = 0) -> np.ndarray:
    """Labels int64 (N_gen,) of the images to draw: N_t - n_c for every class with n_c < N_t; N_t =
    fill_to or n_max."""
    missing = shortfall(class_counts, fill_to)
    return np.repeat(np.arange(len(missing)), missing)


class Sampler:
    """One of diffusers' schedulers, driven by clean images: step(D, i, x) -> x at the next sigma.

    Args:
        scheduler: with its timesteps set. sigmas: float32 (n,), the noise level of each call.
        wants: "x0" or "eps", what the scheduler's step takes.
        vp: whether the scheduler works on x_t = x / sqrt(1 + sigma^2), as DDPM and DDIM do.
    """

    def __init__(self, scheduler, sigmas, wants: str, vp: bool = False, random: bool = False):
        self.scheduler, self.sigmas, self.wants, self.vp = scheduler, sigmas, wants, vp
        self.random = random

    def step(self, d, i: int, x, noise: list | None = None) -> torch.Tensor:
        """x (B, C, H, W) after call i, from D(x, sigmas[i], y); noise: a generator per image, for
        samplers that draw."""
        sigma = self.sigmas[i].to(x)
        out = d if self.wants == "x0" else (x - d) / sigma
        state = x / (1 + sigma**2).sqrt() if self.vp else x
        extra = {"generator": noise} if self.random else {}
        timestep = self.scheduler.timesteps[i]
        state = self.scheduler.step(out, timestep, state, return_dict=False, **extra)[0]
        if self.vp and i + 1 < len(self.sigmas):
            state = state * (1 + self.sigmas[i + 1].to(x) ** 2).sqrt()
        return state


def make_sampler(
    name: str, noise, n_steps: int, sigma_min: float | None = None, sigma_max: float | None = None
) -> Sampler:
    """A sampler of SamplingConfig.sampler on the sigmas of Karras et al. 2022 (rho = 7), or on DDPM's
    own timesteps for "ddim" and "ddpm".

    Args:
        noise: EdmNoise or EpsNoise. n_steps: calls of the network (heun: one less than twice that).
        sigma_min, sigma_max: None is the range of noise.

    Raises:
        ValueError: a range that the network was not trained on. RuntimeError: diffusers resolved
            another configuration than the one asked for.
    """
    low, high = sigma_min or noise.sigma_min, sigma_max or noise.sigma_max
    if not noise.sigma_min * 0.999 <= low < high <= noise.sigma_max * 1.001:
        raise ValueError(
            f"sigma_min, sigma_max: expected {noise.sigma_min:g} <= sigma_min < sigma_max <= "
            f"{noise.sigma_max:g}, got {low:g} and {high:g}"
        )
    if name in ("ddim", "ddpm"):
        return _on_timesteps(name, noise, n_steps)
    scheduler = _on_sigmas(name, low, high)
    scheduler.set_timesteps(n_steps)
    sigmas = scheduler.sigmas[:-1]
    if name == "euler":
        scheduler.is_scale_input_called = True  # the denoiser scales its input itself
    wants = "eps" if name == "heun" else "x0"
    return Sampler(scheduler, sigmas, wants, random=name.endswith("sde"))


def check_sampling(config: SamplingConfig, of_generator: DiffusionConfig) -> None:
    """Refuse what make_sampler would refuse after the training.

    Raises:
        ValueError: noise that the network does not see in training, or that heun cannot start from.
    """
    noise = make_noise(of_generator)
    make_sampler(config.sampler, noise, config.n_steps, config.sigma_min, config.sigma_max)
    if config.sampler == "heun" and (config.sigma_max or noise.sigma_max) > _HEUN_MAX:
        raise ValueError(
            f"sigma_max: diffusers' heun expects at most {_HEUN_MAX:g}, got "
            f"{config.sigma_max or noise.sigma_max:g}; set it lower or use dpm++ 2m"
        )


def _on_sigmas(name: str, low: float, high: float):
    from diffusers import (
        EDMDPMSolverMultistepScheduler,
        EDMEulerScheduler,
        HeunDiscreteScheduler,
    )

    if name == "heun":
        wanted = {"use_karras_sigmas": True, "beta_start": 1e-4, "beta_end": 0.02}
        scheduler = HeunDiscreteScheduler(**wanted)
        scheduler.register_to_config(sigma_min=low, sigma_max=high)
        wanted |= {"sigma_min": low, "sigma_max": high, "prediction_type": "epsilon"}
        return _resolved(scheduler, wanted)
    wanted = {"sigma_min": low, "sigma_max": high, "sigma_schedule": "karras", "rho": 7.0}
    kind = EDMEulerScheduler if name == "euler" else EDMDPMSolverMultistepScheduler
    if kind is EDMDPMSolverMultistepScheduler:
        sde = name.endswith("sde")
        wanted["algorithm_type"] = "sde-dpmsolver++" if sde else "dpmsolver++"
        wanted |= {"solver_order": 2, "final_sigmas_type": "zero"}

    class OfCleanImages(kind):  # our denoiser is preconditioned already
        def precondition_outputs(self, sample, model_output, sigma):
            return model_output

    return _resolved(OfCleanImages(**wanted), wanted)


def _on_timesteps(name: str, noise, n_steps: int) -> Sampler:
    from diffusers import DDIMScheduler, DDPMScheduler

    betas = noise.schedule.config.beta_schedule
    wanted = {"num_train_timesteps": noise.n_timesteps, "beta_schedule": betas}
    wanted |= {"clip_sample": True, "timestep_spacing": "trailing"}
    kind = DDIMScheduler if name == "ddim" else DDPMScheduler
    scheduler = _resolved(kind(**wanted), wanted)
    scheduler.set_timesteps(n_steps)
    sigmas = noise.sigmas[scheduler.timesteps]
    return Sampler(scheduler, sigmas, "eps", vp=True, random=name == "ddpm")


def _resolved(scheduler, wanted: dict):
    """The scheduler, whose configuration is what was asked for: diffusers drops what it knows not."""
    found = {key: scheduler.config.get(key) for key in wanted}
    if found != wanted:
        raise RuntimeError(
            f"{type(scheduler).__name__}: expected the settings {wanted}, diffusers resolved {found}"
        )
    return scheduler


@torch.inference_mode()
def generate(
    denoiser, config: SamplingConfig, labels, indices, seed: int, weak=None, purpose: str = "image"
) -> np.ndarray:
    """Images uint8 (n, H, W, C) for labels (n,); indices (n,) is each image's number within its
    class. Its noise is a function of (seed, purpose, label, index) alone.

    Args:
        denoiser: Denoiser in evaluation mode. weak: the Denoiser that guidance leads away from
            (autoguidance, Karras et al. 2024); None: the denoiser itself with no class.
    """
    device = next(denoiser.parameters()).device
    net = denoiser.unet.config
    shape = (net.in_channels, net.sample_size, net.sample_size)
    noise = [generator(seed, purpose, int(y), int(i)) for y, i in zip(labels, indices, strict=True)]
    sampler = make_sampler(
        config.sampler, denoiser.noise, config.n_steps, config.sigma_min, config.sigma_max
    )
    x = torch.stack([torch.randn(shape, generator=g) for g in noise]).to(device)
    x = x * sampler.sigmas[0].to(device).pow(2).add(1 if sampler.vp else 0).sqrt()
    y = torch.from_numpy(np.asarray(labels)).to(device)
    for i, level in enumerate(sampler.sigmas.tolist()):
        d = _guided(denoiser, weak, x, level, y, config)
        x = sampler.step(d, i, x, noise)
    image = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return image.permute(0, 2, 3, 1).cpu().numpy()


def _guided(denoiser, weak, x, level: float, y, config: SamplingConfig) -> torch.Tensor:
    """D_weak + guidance (D_y - D_weak) at sigma = level; D_y alone where guidance is 1, and outside
    the interval of sigma in which it helps (Kynkaanniemi et al. 2024)."""
    sigma, upper = x.new_full((len(x),), level), config.guidance_to or float("inf")
    if config.guidance == 1 or not config.guidance_from < level <= upper:
        return denoiser(x, sigma, y)
    if weak is None:  # both predictions come from one call
        null = torch.full_like(y, denoiser.null)
        both = torch.cat([x, x]), torch.cat([sigma, sigma]), torch.cat([y, null])
        d, d_weak = denoiser(*both).chunk(2)
    else:
        d, d_weak = denoiser(x, sigma, y), weak(x, sigma, y)
    return d_weak + config.guidance * (d - d_weak)


def _fewer(batch: int, error: torch.OutOfMemoryError) -> int:
    """Half as many images at a time, none of which depends on the others; raises where it is one."""
    if batch == 1:
        raise out_of_memory(error, "sampling.batch_size", 1) from None
    torch.cuda.empty_cache()
    warnings.warn(
        f"{batch} images at a time do not fit into memory; going on with {batch // 2}",
        stacklevel=2,
    )
    return batch // 2


def build_samples(work, config: dict, inputs: dict, context) -> None:
    """Stage 3. inputs: data, diffusion; plain, the earlier network, for autoguidance. Resumes
    after a kill; several processes share the chunks.

    config["n_per_class"]: instead of filling classes up, so many images of every class, of a draw of
    their own: what quality is measured on.
    """
    recipe, seed = SamplingConfig.model_validate(config["sampling"]), config["seed"]
    of_generator = DiffusionConfig.model_validate(config["diffusion"])
    train, n_per_class = load_split(inputs["data"], "train"), config.get("n_per_class")
    K = len(train.class_names)
    labels = wanted_labels(train.class_counts, recipe.fill_to)
    labels = labels[inputs["diffusion"].array("seen")[labels] > 0]  # it has not learnt the others
    if n_per_class:
        labels = np.repeat(np.arange(K), n_per_class)
    indices = np.concatenate([np.arange(n) for n in np.bincount(labels, minlength=K)])
    precision = recipe.precision
    names = ["diffusion", *(["plain"] if recipe.guide == "earlier" else [])]
    nets = [load_denoiser(inputs[n], of_generator, context.device, precision) for n in names]
    for net in nets if not is_small(of_generator.preset) else ():
        net.forward = compiled(net.forward, "samples", context.device)
    fast = isinstance(nets[0].forward, Compiled)
    denoiser, weak = nets[0], nets[1] if len(nets) > 1 else None
    shape = (len(labels), *train.images.shape[1:])
    chunks = Chunks(work, "samples", shape, recipe.batch_size)
    draw, batch = (seed, weak, "measured" if n_per_class else "image"), recipe.batch_size
    for part in chunks.todo(f"generate, seed {seed}", context):
        n, images = part.stop - part.start, None
        while images is None:
            # a graph for each size: a last piece has the others', and is cut
            rows = np.arange(part.start, part.stop)
            rows = np.resize(rows, -(-n // batch) * batch) if fast else rows
            pieces = [rows[i : i + batch] for i in range(0, len(rows), batch)]
            try:
                made = [generate(denoiser, recipe, labels[r], indices[r], *draw) for r in pieces]
                images = np.concatenate(made)[:n]
            except torch.OutOfMemoryError as error:
                batch = _fewer(batch, error)
        chunks.write(part, images)
    chunks.merge()
    finish_images(work, "samples", labels, {"sampling": config["sampling"], "seed": seed})
