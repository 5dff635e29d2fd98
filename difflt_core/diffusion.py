"""The generator (stage 2): a class-conditional DDPM trained with L = L_DDPM + L_CBDM(tau) + alpha *
L_AID."""

import json

import numpy as np
import torch
from torch import nn

from .classifiers import load_classifier
from .config import DiffusionConfig
from .data import load_split, to_float
from .filtering import class_geometry
from .progress import bar
from .seeding import derive_seed, generator
from .store import save_tensors
from .training import batch_indices, check_finite, load_checkpoint, save_checkpoint, warmup_cosine

__all__ = [
    "PRESETS",
    "aid_loss",
    "build_diffusion",
    "cbdm_loss",
    "drop_labels",
    "load_diffusion",
    "make_schedule",
    "make_unet",
    "predict_x0",
]

# Arguments of diffusers' UNet2DModel. "tiny" is 32 MFLOP per 8x8 image and forward.
PRESETS = {
    "tiny": {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
        "add_attention": False,
    },
}


def make_unet(preset: str, n_classes: int, image_size: int, channels: int) -> nn.Module:
    """UNet2DModel that predicts epsilon; class embedding n_classes is the null class of
    guidance."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=image_size,
        in_channels=channels,
        out_channels=channels,
        num_class_embeds=n_classes + 1,
        **PRESETS[preset],
    )


def make_schedule(config: DiffusionConfig):
    """diffusers' DDPMScheduler: T steps, linear 1e-4..0.02 (Ho et al. 2020) or the squared
    cosine."""
    from diffusers import DDPMScheduler

    name = {"linear": "linear", "cosine": "squaredcos_cap_v2"}[config.beta_schedule]
    return DDPMScheduler(num_train_timesteps=config.n_timesteps, beta_schedule=name)


def predict_x0(xt, eps, alpha_bar) -> torch.Tensor:
    """x0_pred = (xt - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar). xt, eps: (B, C, H, W); alpha_bar:
    (B,)."""
    a = alpha_bar[:, None, None, None]
    return (xt - (1 - a).sqrt() * eps) / a.sqrt()


def cbdm_loss(h, h_other, t, tau: float, n_timesteps: int, active=None) -> torch.Tensor:
    """Class-balancing regulariser L_r + L_c / 4 (Qin et al., CVPR 2023; PEERS.md section 3).

    Args:
        h: epsilon predicted under the true label y, float (B, C, H, W).
        h_other: epsilon predicted under y', same xt and t, same shape.
        t: int64 (B,) in 0..T-1. tau: >= 0. active: bool (B,), False where y was dropped for
            guidance.
    """
    w = tau * t.to(h.dtype) / n_timesteps
    if active is not None:
        w = w * active
    w = w[:, None, None, None]
    return (w * (h - h_other.detach()).square()).mean() + 0.25 * (
        w * (h.detach() - h_other).square()
    ).mean()


def aid_loss(d: torch.Tensor, aid_factor: float = 2.0) -> torch.Tensor:
    """L_AID = mean(relu(1 - d) + relu(d - aid_factor)): zero for AID samples, growing into ID and
    into OOD.

    Our reading: the public record of the paper states the aim and not the formula (PAPER.md section
        1).
    d: float (M,), distance of x0_pred to its class centre in radii. No sample gives 0.
    """
    if len(d) == 0:
        return d.sum()
    return (torch.relu(1 - d) + torch.relu(d - aid_factor)).mean()


def drop_labels(y, rate: float, n_classes: int, g: torch.Generator) -> torch.Tensor:
    """Replace each label by the null class n_classes with probability rate, one coin per sample."""
    dropped = torch.rand(len(y), generator=g).to(y.device) < rate
    return torch.where(dropped, torch.full_like(y, n_classes), y)


def build_diffusion(work, config: dict, inputs: dict, context) -> None:
    """Stage 2. inputs: data, extractor (for L_AID). Writes the EMA weights and the loss curves."""
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel

    recipe, seed = DiffusionConfig.model_validate(config["diffusion"]), config["seed"]
    accelerator = Accelerator(cpu=context.device == "cpu")
    device = accelerator.device
    train = load_split(inputs["data"], "train")
    x, y = to_float(train.images).to(device), torch.from_numpy(np.array(train.labels)).to(device)
    K, size, channels = len(train.class_names), train.images.shape[1], train.images.shape[-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "unet", "init"))
        unet = make_unet(recipe.preset, K, size, channels)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=recipe.lr, weight_decay=0.0, foreach=True)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    ema = EMAModel(unet.parameters(), decay=recipe.ema_decay, foreach=True)
    step_loss = _StepLoss(recipe, seed, y, K, device, inputs, config)
    first, extra = load_checkpoint(work, unet, optimizer)
    curve = extra.get("curve", torch.zeros(recipe.n_steps, 3))
    if first:
        ema.shadow_params = [extra[f"ema.{i}"].to(device) for i in range(len(ema.shadow_params))]
        ema.optimization_step = first
    with bar(recipe.n_steps, f"diffusion, seed {seed}", initial=first, context=context) as progress:
        for step in range(first, recipe.n_steps):
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * warmup_cosine(step, recipe.n_steps, recipe.warmup_steps)
            terms = step_loss(unet, x, step)
            optimizer.zero_grad(set_to_none=True)
            accelerator.backward(terms.sum())
            accelerator.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            ema.step(unet.parameters())
            curve[step] = terms.detach().cpu()
            check_finite(float(curve[step].sum()), step, "diffusion")
            progress.update()
            if (step + 1) % recipe.checkpoint_every == 0 and step + 1 < recipe.n_steps:
                shadow = {f"ema.{i}": p for i, p in enumerate(ema.shadow_params)}
                save_checkpoint(work, step + 1, unet, optimizer, {"curve": curve, **shadow})
    ema.copy_to(unet.parameters())
    save_tensors(work / "out" / "model.safetensors", unet.state_dict())
    np.save(work / "out" / "loss.npy", curve.numpy())
    info = {"preset": recipe.preset, "n_classes": K, "image_size": size, "channels": channels}
    (work / "out" / "model.json").write_text(json.dumps(info))


class _StepLoss:
    """The three terms of one step, float (3,): L_DDPM, L_CBDM, alpha * L_AID."""

    def __init__(
        self, recipe: DiffusionConfig, seed: int, y, n_classes: int, device, inputs, config
    ):
        self.recipe, self.seed, self.y, self.K = recipe, seed, y, n_classes
        self.schedule = make_schedule(recipe)
        self.alpha_bar = self.schedule.alphas_cumprod.to(device)
        if recipe.alpha > 0:
            phi0 = load_classifier(inputs["extractor"], device).requires_grad_(False)
            centres, radii = class_geometry(
                phi0, load_split(inputs["data"], "train"), config["radius"]
            )
            self.phi0, self.aid_factor = phi0, config["aid_factor"]
            self.centres, self.radii = (
                torch.from_numpy(a).float().to(device) for a in (centres, radii)
            )

    def __call__(self, unet, x, step: int) -> torch.Tensor:
        recipe, device = self.recipe, x.device
        index = batch_indices(
            len(x), recipe.batch_size, step, derive_seed(self.seed, "unet", "order")
        ).to(device)
        g = generator(self.seed, "unet", "noise", step)
        x0, y = x[index], self.y[index]
        B = len(y)
        eps = torch.randn(x0.shape, generator=g).to(device)
        t = torch.randint(0, recipe.n_timesteps, (B,), generator=g).to(device)
        xt = self.schedule.add_noise(x0, eps, t)
        y_in = drop_labels(y, recipe.label_dropout, self.K, g)
        h_other, y_other = None, self._other_labels(B, g).to(device)
        l_cbdm = xt.new_zeros(())
        if recipe.tau > 0 or (recipe.alpha > 0 and recipe.aid_label == "other"):
            both = unet(
                xt.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([y_in, y_other]), return_dict=False
            )[0]  # (2B, C, H, W): both forwards in one batch
            h, h_other = both.chunk(2)
            if recipe.tau > 0:
                l_cbdm = cbdm_loss(h, h_other, t, recipe.tau, recipe.n_timesteps, y_in < self.K)
        else:
            h = unet(xt, t, y_in, return_dict=False)[0]
        l_ddpm = (h - eps).square().mean()
        if recipe.aid_label == "other":
            l_aid = self._aid(xt, h_other, t, y_other)
        else:
            l_aid = self._aid(xt, h, t, y_in)
        return torch.stack([l_ddpm, l_cbdm, l_aid])

    def _other_labels(self, n: int, g: torch.Generator) -> torch.Tensor:
        """y' of L_CBDM and of L_AID's "other" reading, int64 (n,) in 0..K-1."""
        if self.recipe.cbdm_labels == "uniform":
            return torch.randint(0, self.K, (n,), generator=g)
        return self.y.cpu()[torch.randint(0, len(self.y), (n,), generator=g)]

    def _aid(self, xt, h, t, y) -> torch.Tensor:
        """alpha * L_AID of the clean images that h predicts for labels y; the null class is left out."""
        recipe = self.recipe
        if recipe.alpha == 0:
            return xt.new_zeros(())
        alpha_bar = self.alpha_bar[t]
        used = (alpha_bar > recipe.aid_min_alpha_bar) & (alpha_bar <= recipe.aid_max_alpha_bar)
        used &= y < self.K
        x0_pred = predict_x0(xt[used], h[used], alpha_bar[used])
        distance = (self.phi0.features(x0_pred) - self.centres[y[used]]).norm(dim=1)
        return recipe.alpha * aid_loss(distance / self.radii[y[used]], self.aid_factor)


def load_diffusion(artifact, device: str = "cpu") -> nn.Module:
    """The EMA model of a diffusion artifact, in evaluation mode."""
    unet = make_unet(**artifact.json("model"))
    unet.load_state_dict(artifact.tensors("model"))
    return unet.to(device).eval()
