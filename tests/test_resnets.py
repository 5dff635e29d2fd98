"""Backbones: parameter counts, shapes, and the shortcut that has no parameters."""

import pytest
import torch

from difflt_core.resnets import CifarResNet, ImageNetResNet, _Block


def n_parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_parameter_counts():
    """PEERS.md 1.4: 470,004 with 100 classes; 7,409,316 in SAU's widths."""
    assert n_parameters(CifarResNet(100)) == 470_004
    assert n_parameters(CifarResNet(10)) == 464_154
    assert n_parameters(CifarResNet(100, widths=(64, 128, 256))) == 7_409_316
    assert n_parameters(ImageNetResNet(1000, depth=50)) == 25_557_032
    assert n_parameters(ImageNetResNet(1000, depth=10)) == 5_418_792


@pytest.mark.parametrize(
    "model, size, width",
    [
        (CifarResNet(7), 32, 64),
        (ImageNetResNet(7, depth=10), 64, 512),
        (ImageNetResNet(7, depth=50), 64, 2048),
    ],
)
def test_features_and_logits(model, size, width):
    x = torch.randn(2, 3, size, size)
    model.eval()
    with torch.no_grad():
        assert model.features(x).shape == (2, width)
        assert torch.equal(model(x), model.head(model.features(x))) and model(x).shape == (2, 7)


def test_option_a_pads_both_sides():
    block = _Block(2, 4, stride=2).eval()
    torch.nn.init.zeros_(block.bn2.weight)  # only the shortcut is left
    x = torch.rand(1, 2, 4, 4)
    y = block(x)
    assert y.shape == (1, 4, 2, 2) and torch.equal(y[:, 1:3], x[:, :, ::2, ::2])
    assert not y[:, 0].any() and not y[:, 3].any()
