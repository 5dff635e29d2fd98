"""How fast the generator trains and samples: against a plain reference.

Reference: DDPM's eps, fp32, NCHW, two separate forwards for L_CBDM, per-tensor EMA and optimiser,
1,000 ancestral steps, guidance in two calls. Fast: what build_diffusion and build_samples do. Each
mode runs in a process of its own, so that its peak memory is its own.
"""

import numpy as np
import torch

from ..config import DiffusionConfig, load_config
from ..data.long_tail import LongTail
from ..engine.device import compiled
from ..engine.precision import fast_bf16, set_kernels
from ..engine.provenance import hardware
from ..generation.network import PRESETS, Denoiser, is_small, make_unet
from ..generation.network import memory_format as layout_of
from ..generation.noise import EpsNoise, make_noise
from ..generation.sampling import generate, make_sampler
from ..generation.training import StepLoss
from .cost import unet_flop
from .shared import add_steps, compare, in_a_process, write
from .timing import peak_gib, seconds

__all__ = ["add_options", "matmul_gflop_per_s", "measure", "run"]

SIZES = {
    "nano": (8, 1, 10),
    "tiny": (8, 1, 10),
    "small16": (16, 3, 10),
    "small32": (32, 3, 10),
    "cifar": (32, 3, 100),
    "imagenet64": (64, 3, 1000),
}  # pixels, C, K
BATCHES = {"nano": 64, "tiny": 64, "small16": 64, "small32": 64, "cifar": 16, "imagenet64": 4}
PROFILE = {
    "nano": "demo",
    "tiny": "smoke",
    "small16": "photos",
    "small32": "folder",
    "cifar": "cifar100",
    "imagenet64": "imagenet",
}  # parameterisation, sampler
REFERENCE_STEPS = 1000  # ancestral steps of the reference sampler

_ROWS = {
    "parameterisation": ("parameterisation", None, "{}"),
    "precision": ("precision", None, "{}"),
    "loss": ("loss of the first step", None, "{:.4f}"),
    "train_images_per_s": ("training, images/s", "more", "{:.4g}"),
    "train_gflop_per_s": ("training, model GFLOP/s", "more", "{:.4g}"),
    "train_share": ("training, share of the measured matmul peak", "more", "{:.2f}"),
    "sampler": ("sampler", None, "{}"),
    "sample_images_per_s": ("sampling, images/s", "more", "{:.4g}"),
    "sample_gflop_per_s": ("sampling, model GFLOP/s", "more", "{:.4g}"),
    "peak_gflop_per_s": ("matmul peak in its precision, GFLOP/s", "more", "{:.4g}"),
    "mem_gib": ("peak memory, GiB", "less", "{:.2f}"),
}


def add_options(parser) -> None:
    add_steps(parser)
    parser.add_argument("--preset", default="nano", choices=PRESETS)
    parser.add_argument("--batch", type=int, help="images per step (default: by preset)")
    parser.add_argument(
        "--parameterisation",
        choices=("eps", "edm"),
        help="of the fast mode (default: that of the profile which has the network)",
    )


def run(options) -> None:
    preset, batch = options.preset, options.batch or BATCHES[options.preset]
    own = load_config(PROFILE[preset]).diffusion.parameterisation
    kind = options.parameterisation or own
    arguments = (preset, options.device, batch, options.steps, kind)
    rows = [in_a_process(measure, mode, *arguments) for mode in ("reference", "fast")]
    name, face = f"{preset}-{options.device}", f"{preset}, batch {batch}, "
    face += hardware(options.device)
    alike = kind == "eps"
    notes = "" if alike else "The losses of two parameterisations do not compare."
    write(
        options, name, face, compare(*rows, _ROWS), {"arguments": arguments, "modes": rows}, notes
    )


def measure(
    mode: str, preset: str, device: str, batch: int, n_steps: int, parameterisation: str
) -> dict:
    """One mode's images/s, FLOP/s, share of peak and memory.

    Args:
        mode: "reference" or "fast". parameterisation: of the latter; the former has eps.

    Returns:
        A row; train_images_per_s counts an image once per step with L_CBDM (two forwards, one
        backward); the reference sampler is timed over n_steps of its 1,000 steps.
    """
    fast = mode == "fast"
    half = fast and fast_bf16(device)
    torch.backends.cudnn.allow_tf32 = False  # the peaks are of the precision that is named
    if fast:
        set_kernels(device)
    changes = {"parameterisation": parameterisation if fast else "eps", "tau": 1.0, "alpha": 0.0}
    recipe = DiffusionConfig(preset=preset, batch_size=batch, **changes)
    denoiser = _denoiser(recipe, device, fast, half)
    step, losses = _training_step(denoiser, recipe, device, fast), []
    step_s = seconds(lambda i: losses.append(float(step(i))), n_steps, device)
    flop = unet_flop(preset, *SIZES[preset]) / 1e9  # model GFLOP of one image's forward
    peak = matmul_gflop_per_s(device, torch.bfloat16 if half else torch.float32)
    sample = _sample_fast if fast else _sample_plainly
    sampler, sampled_s, n_forwards = sample(denoiser.eval(), preset, batch, n_steps, device)
    train_rate = 3 * 2 * flop * batch / step_s  # two forwards, and a backward of twice their cost
    return {
        "parameterisation": recipe.parameterisation,
        "precision": "bf16" if half else "fp32",
        "loss": losses[0],
        "train_images_per_s": batch / step_s,
        "train_gflop_per_s": train_rate,
        "train_share": train_rate / peak,
        "sampler": sampler,
        "sample_images_per_s": batch / sampled_s,
        "sample_gflop_per_s": flop * n_forwards * batch / sampled_s,
        "peak_gflop_per_s": peak,
        "mem_gib": peak_gib(device),
    }


def _denoiser(recipe: DiffusionConfig, device: str, fast: bool, half: bool) -> Denoiser:
    size, channels, K = SIZES[recipe.preset]
    torch.manual_seed(0)
    layout = layout_of(recipe.preset, device) if fast else torch.contiguous_format
    unet = make_unet(recipe.preset, K, size, channels, recipe.augment > 0)
    unet = unet.to(device, memory_format=layout)
    return Denoiser(unet, make_noise(recipe), half, layout)


def _training_step(denoiser: Denoiser, recipe: DiffusionConfig, device: str, fast: bool):
    """A function of the step number that trains one step and returns its loss."""
    from diffusers.training_utils import EMAModel

    size, channels, K = SIZES[recipe.preset]
    train = _noise_images(max(4 * recipe.batch_size, K), size, channels, K)
    loss, unet = StepLoss(recipe, 0, train, device, {}, {}), denoiser.unet
    if not fast:
        loss.terms = loss._terms  # not compiled
    options = {"fused": True} if fast else {"foreach": False, "fused": False}
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, weight_decay=0.0, **options)
    ema = EMAModel(unet.parameters(), decay=0.999, foreach=fast)

    def in_two_calls(*asked):
        halves = [a.chunk(2) for a in asked]
        return torch.cat([denoiser(*(h[i] for h in halves)) for i in (0, 1)])

    def step(i: int) -> torch.Tensor:
        total = loss(denoiser if fast else in_two_calls, i).sum()
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        ema.step(unet.parameters())
        return total.detach()

    return step


def _sample_fast(denoiser, preset, batch, n_steps, device) -> tuple[str, float, int]:
    """The profile's sampler, guided: its name, seconds for one batch of finished images,
    and how many forwards each image took."""
    if not is_small(preset):
        denoiser.forward = compiled(denoiser.forward, "samples", device)
    guided = {"guidance": 2.0, "guide": "null", "guidance_from": 0.0, "guidance_to": None}
    config = load_config(PROFILE[preset]).sampling.model_copy(update=guided)
    labels, indices = np.arange(batch) % SIZES[preset][2], np.zeros(batch, int)
    sampled_s = seconds(lambda i: generate(denoiser, config, labels, indices, i), 1, device)
    ends = (config.sigma_min, config.sigma_max)
    sampler = make_sampler(config.sampler, denoiser.noise, config.n_steps, *ends)
    return f"{config.sampler}, {config.n_steps} steps", sampled_s, 2 * len(sampler.sigmas)


def _sample_plainly(denoiser, preset, batch, n_steps, device) -> tuple[str, float, int]:
    """The same of 1,000 ancestral steps on diffusers' own scheduler, each in two calls."""
    unet, schedule = denoiser.unet, EpsNoise().schedule
    x = torch.randn(batch, unet.config.in_channels, *(unet.config.sample_size,) * 2, device=device)
    y = torch.arange(batch, device=device) % SIZES[preset][2]
    null = torch.full_like(y, denoiser.null)

    @torch.no_grad()
    def one_step(i: int) -> None:
        t = schedule.timesteps[i]
        eps_y, eps_null = (unet(x, t, label, return_dict=False)[0] for label in (y, null))
        schedule.step(eps_null + 2.0 * (eps_y - eps_null), t, x)

    sampled_s = REFERENCE_STEPS * seconds(one_step, n_steps, device)
    return f"ddpm, {REFERENCE_STEPS} steps", sampled_s, 2 * REFERENCE_STEPS


def matmul_gflop_per_s(device: str, dtype: torch.dtype, n: int = 0) -> float:
    """The rate of a large square matrix product: the peak that the shares refer to."""
    n = n or (8192 if device == "cuda" else 2048)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / 1e9 / seconds(lambda _: a @ b, 5, device)


def _noise_images(n: int, size: int, channels: int, n_classes: int) -> LongTail:
    images = np.random.default_rng(0).integers(0, 256, (n, size, size, channels), np.uint8)
    names = tuple(map(str, range(n_classes)))
    return LongTail(images, np.arange(n) % n_classes, names, "train", "noise")
