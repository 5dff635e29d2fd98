"""Backbones: parameter counts, shapes, experts, and the shortcut that has no parameters."""

import pytest
import torch

from difflt_core.recognition.networks import (
    BACKBONES,
    CifarResNet,
    ImageNetResNet,
    SmallCNN,
    _Block,
    make_backbone,
)


def n_parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_parameter_counts():
    """docs/protocol.md, Networks: 470,004 with 100 classes, 7,409,316 in SAU's widths, 783,856 for RIDE-3."""
    assert n_parameters(CifarResNet(100)) == 470_004
    assert n_parameters(CifarResNet(10)) == 464_154
    assert n_parameters(CifarResNet(100, cosine=True)) == 469_904
    assert n_parameters(CifarResNet(100, widths=(64, 128, 256))) == 7_409_316
    assert n_parameters(ImageNetResNet(1000, depth=50)) == 25_557_032
    assert n_parameters(ImageNetResNet(1000, depth=10)) == 5_418_792


@pytest.mark.parametrize(
    "n_experts, count", [(2, 530_512), (3, 783_856), (4, 1_037_200), (6, 1_543_888)]
)
def test_rides_experts_have_its_parameters(n_experts, count):
    assert (
        n_parameters(make_backbone("resnet32", 100, 3, n_experts=n_experts, cosine=True)) == count
    )


@pytest.mark.parametrize(
    "model, size, width",
    [
        (SmallCNN(7, 3), 8, 64),
        (SmallCNN(7, 3, n_experts=3, cosine=True), 8, 192),
        (CifarResNet(7), 32, 64),
        (ImageNetResNet(7, depth=10), 64, 512),
        (ImageNetResNet(7, depth=50), 64, 2048),
        (ImageNetResNet(7, depth=10, n_experts=3, cosine=True), 64, 3 * 384),
        (ImageNetResNet(7, depth=50, n_experts=2, cosine=True), 64, 2 * 1536),
    ],
)
def test_features_and_logits(model, size, width):
    x = torch.randn(2, 3, size, size)
    model.eval()
    with torch.no_grad():
        f = model.features(x)
        assert f.shape == (2, width) and model.n_features == width
        assert torch.equal(model(x), model.logits(f)) and model(x).shape == (2, 7)
        assert torch.allclose(model.expert_logits(f).mean(dim=0), model(x))


def test_a_network_that_is_no_backbone_is_named(monkeypatch):
    monkeypatch.setitem(BACKBONES, "resnet32", lambda *_: torch.nn.Linear(3, 7))
    with pytest.raises(TypeError, match="arch resnet32: expected a networks.Backbone.* got Linear"):
        make_backbone("resnet32", 7, 3)


def test_cosine_logits_lie_within_the_scale():
    model = SmallCNN(5, 1, cosine=True).eval()
    with torch.no_grad():
        assert model(100 * torch.randn(4, 1, 8, 8)).abs().max() <= 30 + 1e-4


def test_option_a_pads_both_sides():
    block = _Block(2, 4, stride=2).eval()
    torch.nn.init.zeros_(block.bn2.weight)  # only the shortcut is left
    x = torch.rand(1, 2, 4, 4)
    y = block(x)
    assert y.shape == (1, 4, 2, 2) and torch.equal(y[:, 1:3], x[:, :, ::2, ::2])
    assert not y[:, 0].any() and not y[:, 3].any()


@pytest.mark.parametrize("cosine", [False, True])
def test_logits_are_full_precision_within_bf16(cosine):
    model = SmallCNN(5, 1, cosine=cosine).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        f = model.features(torch.randn(4, 1, 8, 8))
        assert f.dtype == torch.bfloat16 and model.logits(f).dtype == torch.float32
