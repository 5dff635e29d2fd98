"""The generator (stage 2): a class-conditional DDPM trained with L = L_DDPM + L_CBDM(tau) + alpha *
L_AID."""

import json

import numpy as np
import torch
from torch import nn

from .classifiers import load_classifier
from .config import DiffusionConfig
from .data import batch_reader, load_split
from .filtering import class_geometry
from .parallel import make_accelerator, n_processes, rank
from .progress import bar, half_precision, out_of_memory
from .seeding import derive_seed, generator
from .store import save_tensors
from .training import (
    CHECK_EVERY,
    batch_indices,
    check_loss,
    load_checkpoint,
    save_checkpoint,
    set_lr,
)

__all__ = [
    "PRESETS",
    "StepLoss",
    "aid_loss",
    "build_diffusion",
    "cbdm_loss",
    "compile_where_it_pays",
    "drop_labels",
    "load_diffusion",
    "make_schedule",
    "make_unet",
    "memory_format",
    "predict_x0",
    "seen_images",
]

# Arguments of diffusers' UNet2DModel. Sizes are for C = 3 (tiny: 1) and one image through one forward.
PRESETS = {
    # 8x8, 0.6 M parameters, 30 MFLOP: two CPU cores train it in minutes.
    "tiny": {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
        "add_attention": False,
    },
    # 32x32, 35.8 M parameters, 12.4 GFLOP: the network of DDPM and CBDM on CIFAR (PEERS.md 3).
    "cifar": {
        "block_out_channels": (128, 256, 256, 256),
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": None,  # one head
        "dropout": 0.1,
    },
    # 64x64, 199 M parameters, 136 GFLOP: ADM's 64x64 widths with two blocks per level, not three
    # (ADM: 296 M, 208 GFLOP), because 115,846 images need less than 1.28 million.
    "imagenet64": {
        "block_out_channels": (192, 384, 576, 768),
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        "attention_head_dim": 64,
        "dropout": 0.1,
    },
}


def make_unet(preset: str, n_classes: int, image_size: int, channels: int) -> nn.Module:
    """UNet2DModel that predicts epsilon; class embedding n_classes is the null class of guidance."""
    from diffusers import UNet2DModel

    levels = len(PRESETS[preset]["block_out_channels"])
    if image_size % 2 ** (levels - 1):
        raise ValueError(
            f"preset {preset!r}: expected an image size that divides by {2 ** (levels - 1)}, got "
            f"{image_size}; resize the images or choose another preset ({', '.join(PRESETS)})"
        )
    return UNet2DModel(
        sample_size=image_size,
        in_channels=channels,
        out_channels=channels,
        num_class_embeds=n_classes + 1,
        **PRESETS[preset],
    )


def memory_format(preset: str, device) -> torch.memory_format:
    """Channels-last on a GPU, but for the tiny network; on a CPU a training step is 7 % faster without
    (figures/benchmark)."""
    pays = torch.device(device).type != "cpu" and preset != "tiny"
    return torch.channels_last if pays else torch.contiguous_format


def compile_where_it_pays(model: nn.Module, context, preset: str) -> None:
    """torch.compile on a GPU for all but the tiny network; what cannot be compiled stays eager."""
    if context.device != "cpu" and preset != "tiny":
        torch._dynamo.config.suppress_errors = True
        model.compile()


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
    dropped = torch.rand(len(y), generator=g, device=g.device).to(y.device) < rate
    return torch.where(dropped, torch.full_like(y, n_classes), y)


def build_diffusion(work, config: dict, inputs: dict, context) -> None:
    """Stage 2. inputs: data, extractor (for L_AID). Writes the EMA weights and the loss curves.

    On several processes each takes an equal slice of the same global batch; the main one writes.
    """
    n_steps, seed = config["diffusion"]["n_steps"], config["seed"]
    with torch.random.fork_rng(devices=[]):
        trainer = _Trainer(work, config, inputs, context)
        first = trainer.step
        with bar(n_steps, f"diffusion, seed {seed}", initial=first, context=context) as progress:
            for _ in range(first, n_steps):
                trainer.train_step()
                progress.update()
        trainer.finish()


class _Trainer:
    """Network, optimiser, EMA and loss curve of one run, and where they stand."""

    def __init__(self, work, config: dict, inputs: dict, context):
        from diffusers.training_utils import EMAModel

        self.work, self.recipe = work, DiffusionConfig.model_validate(config["diffusion"])
        recipe, seed = self.recipe, config["seed"]
        train = load_split(inputs["data"], "train")
        _check_batch(recipe, len(train.labels))  # with head_share < 1 an epoch is shorter
        self.accelerator = make_accelerator(context.device)
        device = self.accelerator.device
        torch.manual_seed(derive_seed(seed, "unet", "init"))
        self.info = {
            "preset": recipe.preset,
            "n_classes": len(train.class_names),
            "image_size": train.images.shape[1],
            "channels": train.images.shape[-1],
        }
        layout = memory_format(recipe.preset, device)
        self.unet = make_unet(**self.info).to(device, memory_format=layout)
        optimizer = torch.optim.AdamW(
            self.unet.parameters(), lr=recipe.lr, weight_decay=0.0, fused=True
        )
        self.model, self.optimizer = self.accelerator.prepare(self.unet, optimizer)
        compile_where_it_pays(self.model, context, recipe.preset)
        self.ema = EMAModel(self.unet.parameters(), decay=recipe.ema_decay, foreach=True)
        self.loss = StepLoss(recipe, seed, train, device, inputs, config)
        self.identity = {**self.info, **recipe.model_dump(mode="json"), "seed": seed}
        self.step, extra = load_checkpoint(work, self.unet, self.optimizer, self.identity)
        self.curve = extra.get("curve", torch.zeros(recipe.n_steps, 3)).to(device)
        self.checked = self.step
        if self.step:
            n = len(self.ema.shadow_params)
            self.ema.shadow_params = [extra[f"ema.{i}"].to(device) for i in range(n)]
            self.ema.optimization_step = self.step

    def train_step(self) -> None:
        recipe, step = self.recipe, self.step
        set_lr(self.optimizer, recipe, step)
        try:
            terms = self.loss(self.model, step)
            self.optimizer.zero_grad(set_to_none=True)
            self.accelerator.backward(terms.sum())
        except torch.OutOfMemoryError as error:
            raise out_of_memory(error, "diffusion.batch_size", recipe.batch_size) from None
        self.accelerator.clip_grad_norm_(self.unet.parameters(), recipe.clip_norm)
        self.optimizer.step()
        self.ema.step(self.unet.parameters())
        self.curve[step] = terms.detach()
        self.step = step + 1
        at_checkpoint = self.step % recipe.checkpoint_every == 0 and self.step < recipe.n_steps
        if at_checkpoint or self.step % CHECK_EVERY == 0 or self.step == recipe.n_steps:
            self._check()
        if at_checkpoint and rank() == 0:
            shadow = {f"ema.{i}": p for i, p in enumerate(self.ema.shadow_params)}
            extra = {"curve": self.curve, **shadow}
            save_checkpoint(self.work, self.step, self.unet, self.optimizer, extra, self.identity)

    def _check(self) -> None:
        """Average the new part of the curve over the processes and look for NaN and divergence."""
        new = slice(self.checked, self.step)
        self.curve[new] = self.accelerator.reduce(self.curve[new], "mean")
        ceiling = 2.0 if self.checked else float("inf")  # the first steps may start anywhere
        check_loss(self.curve[new], self.checked, "diffusion", ceiling)
        self.checked = self.step

    def finish(self) -> None:
        """The averaged weights; buffers, which no step changes, are those of the network."""
        self.ema.copy_to(self.unet.parameters())
        if rank() == 0:
            out = self.work / "out"
            save_tensors(out / "model.safetensors", self.unet.state_dict())
            np.save(out / "loss.npy", self.curve.cpu().numpy())
            (out / "model.json").write_text(json.dumps(self.info))


def _check_batch(recipe: DiffusionConfig, n_images: int) -> None:
    B, n = recipe.batch_size, n_processes()
    if n_images < B:
        raise ValueError(
            f"diffusion.batch_size: expected at most {n_images}, the number of training images, "
            f"got {B}; use a smaller batch or more data"
        )
    if B % n:
        raise ValueError(
            f"diffusion.batch_size: expected a multiple of {n}, the number of processes, got {B}"
        )


class StepLoss:
    """The three terms of one step, float (3,): L_DDPM, L_CBDM, alpha * L_AID.

    Everything random is drawn for the global batch, and a process works on its slice of it, so the
    mean over the processes is the loss of the global batch whatever their number.
    """

    def __init__(self, recipe: DiffusionConfig, seed: int, train, device, inputs, config):
        self.recipe, self.seed, self.device = recipe, seed, device
        self.half = half_precision(recipe.precision, torch.device(device).type)
        self.read = batch_reader(train.images, device)
        self.seen = seen_images(train.labels, recipe.head_share, config.get("many_above"))
        self.N = len(self.seen)
        self.y, self.K = torch.from_numpy(np.array(train.labels)).to(device), len(train.class_names)
        self.shape = (train.images.shape[-1], *train.images.shape[1:3])
        self.schedule = make_schedule(recipe)
        self.alpha_bar = self.schedule.alphas_cumprod.to(device)
        if recipe.alpha > 0:
            self.phi0 = load_classifier(inputs["extractor"], device).requires_grad_(False)
            geometry = class_geometry(self.phi0, train, config["radius"])
            self.centres, self.radii = (torch.from_numpy(a).float().to(device) for a in geometry)
            self.aid_factor = config["aid_factor"]

    def __call__(self, unet, step: int) -> torch.Tensor:
        recipe, K = self.recipe, self.K
        B, size = recipe.batch_size, recipe.batch_size // n_processes()
        mine = slice(rank() * size, (rank() + 1) * size)
        index = batch_indices(self.N, B, step, derive_seed(self.seed, "unet", "order"))
        index = self.seen[index]
        g = generator(self.seed, "unet", "noise", step, device=self.device)
        torch.manual_seed(derive_seed(self.seed, "unet", "dropout", step, rank()))
        eps = torch.randn(B, *self.shape, generator=g, device=self.device)[mine]
        t = torch.randint(0, recipe.n_timesteps, (B,), generator=g, device=self.device)
        y = drop_labels(self.y[index.to(self.device)], recipe.label_dropout, K, g)  # (B,)
        y_other = self._other_labels(B, g)
        flipped = torch.rand(B, generator=g, device=self.device) < (0.5 if recipe.flip else 0.0)
        x0 = self.read(index[mine])  # (B / processes, C, H, W)
        if recipe.flip:
            x0 = torch.where(flipped[mine, None, None, None], x0.flip(-1), x0)
        xt = self.schedule.add_noise(x0, eps, t[mine])
        xt = xt.contiguous(memory_format=memory_format(recipe.preset, self.device))
        h_other, l_cbdm = None, xt.new_zeros(())
        if recipe.tau > 0 or (recipe.alpha > 0 and recipe.aid_label == "other"):
            both = torch.cat([y[mine], y_other[mine]])  # two forwards in one batch of 2B
            h, h_other = self._forward(unet, torch.cat([xt, xt]), t[mine].repeat(2), both).chunk(2)
            if recipe.tau > 0:
                active = y[mine] < K
                l_cbdm = cbdm_loss(h, h_other, t[mine], recipe.tau, recipe.n_timesteps, active)
        else:
            h = self._forward(unet, xt, t[mine], y[mine])
        l_ddpm = (h - eps).square().mean()
        own = recipe.aid_label == "own"
        l_aid = self._aid(xt, h if own else h_other, t, y if own else y_other, mine)
        return torch.stack([l_ddpm, l_cbdm, l_aid])

    def _forward(self, unet, xt, t, y) -> torch.Tensor:
        """eps float32 (B, C, H, W), computed in the recipe's precision."""
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.half):
            return unet(xt, t, y, return_dict=False)[0].float()

    def _other_labels(self, n: int, g: torch.Generator) -> torch.Tensor:
        """y' of L_CBDM and of L_AID's "other" reading, int64 (n,) in 0..K-1."""
        if self.recipe.cbdm_labels == "uniform":
            return torch.randint(0, self.K, (n,), generator=g, device=self.device)
        drawn = torch.randint(0, self.N, (n,), generator=g, device=self.device)
        return self.y[self.seen.to(self.device)[drawn]]

    def _aid(self, xt, h, t, y, mine: slice) -> torch.Tensor:
        """alpha * L_AID of the clean images that h predicts for y; the null class is left out."""
        recipe = self.recipe
        if recipe.alpha == 0:
            return xt.new_zeros(())
        alpha_bar = self.alpha_bar[t]
        used = (alpha_bar > recipe.aid_min_alpha_bar) & (alpha_bar <= recipe.aid_max_alpha_bar)
        used &= y < self.K
        n_used, used, y = used.sum().clamp_min(1), used[mine], y[mine]
        x0_pred = predict_x0(xt[used], h[used], alpha_bar[mine][used])
        distance = (self.phi0.features(x0_pred) - self.centres[y[used]]).norm(dim=1)
        share = used.sum() * n_processes() / n_used  # the mean over the global batch
        return recipe.alpha * share * aid_loss(distance / self.radii[y[used]], self.aid_factor)


def seen_images(labels, head_share: float, many_above: int | None) -> torch.Tensor:
    """Indices int64 of the training images that the generator sees: of each class with more than
    many_above images only the first head_share (PAPER.md, table 4)."""
    labels = np.asarray(labels)
    counts = np.bincount(labels)
    rank_in_class = np.empty(len(labels), dtype=np.int64)
    for c in range(len(counts)):
        rank_in_class[labels == c] = np.arange(counts[c])
    head = counts[labels] > (many_above or counts.max())
    return torch.from_numpy(np.flatnonzero(~head | (rank_in_class < head_share * counts[labels])))


def load_diffusion(artifact, device: str = "cpu") -> nn.Module:
    """The EMA model of a diffusion artifact, in evaluation mode."""
    unet = make_unet(**artifact.json("model"))
    unet.load_state_dict(artifact.tensors("model"))
    return unet.to(device).eval()
