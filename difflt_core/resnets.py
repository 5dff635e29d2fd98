"""Backbones: CIFAR's ResNet-32 and ImageNet-LT's ResNet-10 and ResNet-50, as features and logits.

Input float32 (B, C, H, W); features (B, D), pooled; forward: logits (B, K).
"""

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["CifarResNet", "ImageNetResNet"]


class _Block(nn.Module):
    """Two 3x3 convolutions; where the shape changes, option A: every second pixel, zero channels."""

    def __init__(self, inside: int, out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.stride, self.pad = stride, (out - inside) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1 or self.pad:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(x + y)


class _Features(nn.Module):
    """A body, global average pooling and a linear head."""

    body: nn.Module
    head: nn.Linear

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x).mean(dim=(2, 3))  # (B, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


class CifarResNet(_Features):
    """ResNet-(6n + 2) for 32x32 images: three stages of n blocks (He et al. 2016, section 4.2).

    Args:
        widths: (16, 32, 64) everywhere, (64, 128, 256) in SAU. n_blocks: 5 for ResNet-32.
    """

    def __init__(
        self, n_classes: int, in_channels: int = 3, widths=(16, 32, 64), n_blocks: int = 5
    ):
        super().__init__()
        layers = [nn.Conv2d(in_channels, widths[0], 3, 1, 1, bias=False)]
        layers += [nn.BatchNorm2d(widths[0]), nn.ReLU()]
        inside = widths[0]
        for stage, width in enumerate(widths):
            for i in range(n_blocks):
                layers.append(_Block(inside, width, 2 if stage and not i else 1))
                inside = width
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(inside, n_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)


class ImageNetResNet(_Features):
    """torchvision's ResNet with 10 (one basic block per stage) or 50 layers (bottlenecks)."""

    def __init__(self, n_classes: int, in_channels: int = 3, depth: int = 50):
        from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

        super().__init__()
        blocks = {10: (BasicBlock, [1, 1, 1, 1]), 50: (Bottleneck, [3, 4, 6, 3])}
        net = ResNet(*blocks[depth])
        if in_channels != 3:
            net.conv1 = nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False)
        names = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
        self.body = nn.Sequential(*(getattr(net, name) for name in names))
        self.head = nn.Linear(net.fc.in_features, n_classes)
