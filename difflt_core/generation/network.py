"""The generator's network: diffusers' UNet inside one denoiser, D(x, sigma, y) -> x0."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from ..config import DiffusionConfig
from ..engine.precision import half_precision
from .augmentation import N_LABELS
from .noise import make_noise

__all__ = [
    "PRESETS",
    "Denoiser",
    "is_small",
    "load_denoiser",
    "make_unet",
    "memory_format",
]

# Arguments of diffusers' UNet2DModel. Sizes are for C = 3 (tiny: 1) and one image through one forward.
PRESETS = {
    # 8x8, 0.2 M parameters, 8 MFLOP: of the widths tried on two CPU cores the best for its seconds,
    # because it can be trained longer.
    "nano": {
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
        "add_attention": False,
    },
    # 8x8, 0.6 M parameters, 30 MFLOP: two CPU cores train it in minutes.
    "tiny": {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
        "add_attention": False,
    },
    # 16x16, 2.4 M parameters, 0.27 GFLOP: small photographs on a CPU.
    "small16": {
        "block_out_channels": (48, 96, 96),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D",) * 3,
        "up_block_types": ("UpBlock2D",) * 3,
    },
    # 32x32, the same for the price of 16x16: the network sees squares of 2x2 pixels.
    "small32": {
        "patch": 2,
        "block_out_channels": (48, 96, 96),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D",) * 3,
        "up_block_types": ("UpBlock2D",) * 3,
    },
    # 32x32, 35.8 M parameters, 12.4 GFLOP: the network of DDPM and CBDM on CIFAR (docs/protocol.md, CBDM).
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


def make_unet(
    preset: str, n_classes: int, image_size: int, channels: int, augmented: bool = False
) -> nn.Module:
    """UNet2DModel F; class embedding n_classes is the null class of guidance.

    Args:
        augmented: F is told how an image was changed (augmentation.draw_changes).
    """
    from diffusers import UNet2DModel

    arguments = {"patch": 1, **PRESETS[preset]}
    patch = arguments.pop("patch")
    smallest = patch * 2 ** (len(arguments["block_out_channels"]) - 1)
    if image_size % smallest:
        raise ValueError(
            f"preset {preset!r}: expected an image size that divides by {smallest}, got "
            f"{image_size}; resize the images or choose another preset ({', '.join(PRESETS)})"
        )
    unet = UNet2DModel(
        sample_size=image_size // patch,
        in_channels=channels * patch**2,
        out_channels=channels * patch**2,
        num_class_embeds=n_classes + 1,
        **arguments,
    )
    if augmented:
        unet.class_embedding = _Conditions(unet.class_embedding)
    return unet if patch == 1 else _Patched(unet, patch)


class _Conditions(nn.Module):
    """The embedding of a class and of how an image was changed."""

    def __init__(self, of_class: nn.Embedding):
        super().__init__()
        self.of_class = of_class
        self.of_change = nn.Linear(N_LABELS, of_class.embedding_dim, bias=False)

    def forward(self, labels: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """labels: classes int64 (B,), of images as they are, or with them changes float (B, 8)."""
        if isinstance(labels, torch.Tensor):
            return self.of_class(labels)
        y, changes = labels
        return self.of_class(y) + self.of_change(changes)


class _Patched(nn.Module):
    """A UNet that sees each square of patch x patch pixels as one of more channels, so that its widest
    level is patch^2 times cheaper (pixel shuffle, Shi et al. 2016)."""

    def __init__(self, unet: nn.Module, patch: int):
        super().__init__()
        self.unet, self.patch, inside = unet, patch, unet.config
        self.config = SimpleNamespace(
            sample_size=inside.sample_size * patch,
            in_channels=inside.in_channels // patch**2,
            num_class_embeds=inside.num_class_embeds,
        )

    def forward(self, x, c_noise, y, return_dict: bool = False) -> tuple[torch.Tensor]:
        out = self.unet(F.pixel_unshuffle(x, self.patch), c_noise, y, return_dict=False)[0]
        return (F.pixel_shuffle(out, self.patch),)


class Denoiser(nn.Module):
    """D(x, sigma, y): the clean image that a network sees in a noisy one. Training, L_AID, sampling
    and measuring all call this, and nothing else calls the network.

    Args:
        unet: F(input, c_noise, y). noise: EdmNoise or EpsNoise. half: compute F in bf16.
        layout: memory format of F's input.
    """

    def __init__(self, unet, noise, half: bool = False, layout=torch.contiguous_format):
        super().__init__()
        self.unet, self.noise, self.half, self.layout = unet, noise, half, layout
        weight = next(unet.parameters(), None)
        if weight is not None:
            noise.ready(weight.device)
        self.augmented = any(isinstance(part, _Conditions) for part in self.modules())

    def forward(self, x, sigma, y, changes=None) -> torch.Tensor:
        """x0_pred float32 (B, C, H, W).

        Args:
            x: x0 + sigma eps, float (B, C, H, W). sigma: float (B,), > 0. y: int64 (B,), 0..K-1 or
                the null class K. changes: float (B, 8), of images that were augmented in training,
                None for images as they are.
        """
        c_skip, c_out, c_in, c_noise = self.noise.scalings(sigma)
        shape = (-1, 1, 1, 1)
        if self.augmented and changes is not None:
            y = y, changes
        net_in = (c_in.view(shape) * x).contiguous(memory_format=self.layout)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.half):
            out = self.unet(net_in, c_noise, y, return_dict=False)[0]
        return c_skip.view(shape) * x + c_out.view(shape) * out.float()

    @property
    def null(self) -> int:
        """The label that means no class."""
        return self.unet.config.num_class_embeds - 1


def load_denoiser(
    artifact, config: DiffusionConfig, device: str = "cpu", precision: str = "fp32"
) -> Denoiser:
    """The averaged weights of a diffusion artifact, in evaluation mode.

    Args:
        config: of the generator; its parameterisation must be that of the training.
        precision: "fp32", "bf16", or "auto" for bf16 where the device is fast at it.
    """
    info = artifact.json("model")
    unet = make_unet(**info)
    unet.load_state_dict(artifact.tensors("model"))
    layout = memory_format(info["preset"], device)
    half = half_precision(precision, torch.device(device).type)
    return Denoiser(unet.to(device, memory_format=layout), make_noise(config), half, layout).eval()


def memory_format(preset: str, device) -> torch.memory_format:
    """Channels-last on a GPU, but for the small networks; on a CPU a training step is 7 % faster
    without (figures/benchmark)."""
    pays = torch.device(device).type != "cpu" and not is_small(preset)
    return torch.channels_last if pays else torch.contiguous_format


def is_small(preset: str) -> bool:
    """Whether starting a kernel takes a network longer than what it computes."""
    return preset in ("nano", "tiny")
