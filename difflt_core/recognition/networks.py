"""Classifier networks: a small CNN for the embedded data, ResNet-32 for CIFAR, ResNet-10 and
ResNet-50 for ImageNet-LT, the former also with CIFAR's stem for small crops; with one head, or
shared early layers and several experts (RIDE).

Input float32 (B, C, H, W). features: (B, D), pooled, experts side by side; logits: (B, K), the mean
over the experts.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from .losses import COSINE_SCALE

__all__ = [
    "BACKBONES",
    "Backbone",
    "CifarResNet",
    "CosineHead",
    "ImageNetResNet",
    "SmallCNN",
    "make_backbone",
    "split_norms",
]


class Backbone(nn.Module):
    """A trunk that all experts share, and a tail and a head for each of them.

    Args:
        tails: one per expert, each ending in (B, width, H, W). cosine: heads of unit class vectors
            and scale 30 instead of linear ones (LDAM, RIDE).
    """

    channels_last = True  # the layout in which its convolutions are faster

    def __init__(self, trunk, tails, width: int, n_classes: int, cosine: bool = False):
        super().__init__()
        self.trunk, self.tails = trunk, nn.ModuleList(tails)
        self.n_classes, self.n_features = n_classes, width * len(tails)
        head = CosineHead if cosine else nn.Linear
        self.heads = nn.ModuleList(head(width, n_classes) for _ in tails)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        shared = self.trunk(x)
        return torch.cat([tail(shared).mean(dim=(2, 3)) for tail in self.tails], dim=1)

    def expert_logits(self, features: torch.Tensor) -> torch.Tensor:
        """(E, B, K) of features (B, E * D), in full precision also where the rest is bf16: a margin of
        0.1 on a logit of 20 is below bf16's resolution."""
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(next(self.heads.parameters()).dtype)
            parts = features.chunk(len(self.heads), dim=1)
            return torch.stack([head(f) for head, f in zip(self.heads, parts, strict=True)])

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        return self.expert_logits(features).mean(dim=0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits(self.features(x))


class CosineHead(nn.Module):
    """scale * cosine of feature and class vector; no bias (Cao et al. 2019)."""

    def __init__(self, n_features: int, n_classes: int, scale: float = COSINE_SCALE):
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.empty(n_classes, n_features)), scale
        nn.init.xavier_uniform_(self.weight)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.scale * F.linear(F.normalize(features), F.normalize(self.weight))


class SmallCNN(Backbone):
    """For small images: two stages of two 3x3 convolutions with batch norm; the second per expert."""

    channels_last = False

    def __init__(
        self,
        n_classes: int,
        in_channels: int = 1,
        width: int = 32,
        n_experts: int = 1,
        cosine=False,
    ):
        def block(a: int, b: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()
            )

        trunk = nn.Sequential(block(in_channels, width), block(width, width), nn.MaxPool2d(2))
        tails = [
            nn.Sequential(block(width, 2 * width), block(2 * width, 2 * width))
            for _ in range(n_experts)
        ]
        super().__init__(trunk, tails, 2 * width, n_classes, cosine)


class _Block(nn.Module):
    """Two 3x3 convolutions; where the shape changes, option A: every second pixel, zero channels."""

    def __init__(self, inside: int, out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.stride, self.pad = stride, out - inside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1 or self.pad:
            before = self.pad // 2
            zeros = (0, 0, 0, 0, before, self.pad - before)
            x = F.pad(x[:, :, :: self.stride, :: self.stride], zeros)
        return F.relu(x + y)


class CifarResNet(Backbone):
    """ResNet-(6n + 2) for 32x32 images: three stages of n blocks (He et al. 2016, section 4.2).

    Args:
        widths: (16, 32, 64) everywhere, (64, 128, 256) in SAU. Several experts share the first stage, and
            have three quarters of the others' (RIDE: 16, 24, 48). n_blocks: 5 for ResNet-32.
        width: of no use here.
    """

    def __init__(
        self, n_classes: int, in_channels: int = 3, width: int = 0, n_experts: int = 1,
        cosine: bool = False, widths=(16, 32, 64), n_blocks: int = 5,
    ):  # fmt: skip
        def stage(inside: int, width: int, stride: int) -> list[nn.Module]:
            return [
                _Block(width if i else inside, width, 1 if i else stride) for i in range(n_blocks)
            ]

        first, second, third = widths
        if n_experts > 1:
            second, third = second * 3 // 4, third * 3 // 4
        stem = [
            nn.Conv2d(in_channels, first, 3, 1, 1, bias=False),
            nn.BatchNorm2d(first),
            nn.ReLU(),
        ]
        trunk = nn.Sequential(*stem, *stage(first, first, 1))
        tails = [
            nn.Sequential(*stage(first, second, 2), *stage(second, third, 2))
            for _ in range(n_experts)
        ]
        super().__init__(trunk, tails, third, n_classes, cosine)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)


class ImageNetResNet(Backbone):
    """torchvision's ResNet with 10 (one basic block per stage) or 50 layers (bottlenecks).

    Args:
        small_images: begin with a 3x3 convolution and no pooling, as on CIFAR.
        n_experts: more than one share the stem and the first two stages, and have last stages of 192
            and 384 planes instead of 256 and 512 (RIDE on ImageNet-LT).
        width: of no use here.
    """

    def __init__(
        self, n_classes: int, in_channels: int = 3, width: int = 0, n_experts: int = 1,
        cosine: bool = False, depth: int = 50, small_images: bool = False,
    ):  # fmt: skip
        from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

        blocks = {10: (BasicBlock, [1, 1, 1, 1]), 50: (Bottleneck, [3, 4, 6, 3])}
        block, depths = blocks[depth]
        net = ResNet(block, depths)
        stem = [net.conv1, net.bn1, net.relu, net.maxpool]
        if small_images:
            conv = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            stem = [conv, net.bn1, net.relu]
        elif in_channels != 3:
            stem[0] = nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False)
        trunk = nn.Sequential(*stem, net.layer1, net.layer2)
        tails, width = [nn.Sequential(net.layer3, net.layer4)], 512
        if n_experts > 1:
            tails, width = [], 384
            for _ in range(n_experts):
                net.inplanes = 128 * block.expansion  # where the next stage begins
                third = net._make_layer(block, 192, depths[2], stride=2)
                tails.append(
                    nn.Sequential(third, net._make_layer(block, width, depths[3], stride=2))
                )
            for module in nn.ModuleList(tails).modules():
                if isinstance(module, nn.Conv2d):  # as torchvision begins
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        super().__init__(trunk, tails, width * block.expansion, n_classes, cosine)


# Networks by name: called with n_classes, in_channels, width (of small_cnn), n_experts and cosine. A stage's
# code version follows the entry of its own network alone, so that a new one retrains nothing: a dict literal.
BACKBONES = {
    "small_cnn": SmallCNN,
    "resnet32": CifarResNet,
    "resnet32x4": partial(CifarResNet, widths=(64, 128, 256)),
    "resnet10": partial(ImageNetResNet, depth=10),
    "resnet10_cifar": partial(ImageNetResNet, depth=10, small_images=True),
    "resnet50": partial(ImageNetResNet, depth=50),
}


def make_backbone(
    arch: str, n_classes: int, in_channels: int, width: int = 32, n_experts: int = 1,
    cosine: bool = False,
) -> Backbone:  # fmt: skip
    """A network by name, channels-last where that is faster.

    Args:
        arch: a key of BACKBONES. width: of small_cnn.

    Raises:
        TypeError: the entry is no Backbone.
    """
    net = BACKBONES[arch](n_classes, in_channels, width, n_experts, cosine)
    if not isinstance(net, Backbone):
        raise TypeError(
            f"arch {arch}: expected a networks.Backbone, whose trunk and tails give features "
            f"(B, D, H, W), got {type(net).__name__}; make it a subclass"
        )
    return net.to(memory_format=torch.channels_last) if net.channels_last else net


class _SplitNorm:
    """Batch norm over each of n equal parts of the batch in turn, as n forwards would have it."""

    n_parts = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.n_parts == 1:
            return super().forward(x)
        return torch.cat([super(_SplitNorm, self).forward(part) for part in x.chunk(self.n_parts)])


class SplitBatchNorm1d(_SplitNorm, nn.BatchNorm1d):
    pass


class SplitBatchNorm2d(_SplitNorm, nn.BatchNorm2d):
    pass


def split_norms(module: nn.Module, n_parts: int) -> nn.Module:
    """Let one forward of a batch of n parts give what n forwards give, running statistics included.
    In place; the names of the weights stay."""
    kinds = {nn.BatchNorm1d: SplitBatchNorm1d, nn.BatchNorm2d: SplitBatchNorm2d}
    for child in module.modules():
        child.__class__ = kinds.get(type(child), type(child))
        if isinstance(child, _SplitNorm):
            child.n_parts = n_parts
    return module
