"""The contrastive view: each image as torchvision's own operations give it, one at a time."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from difflt_core.config import load_config
from difflt_core.data.augment import augment
from difflt_core.data.contrastive import BLUR, GREY, JITTER, draw_views, look
from difflt_core.engine.seeding import derive_seed, host_draws


def pictures(n: int, channels: int, size: int) -> torch.Tensor:
    """Smooth random images in 0..1: a hue is not defined by noise."""
    x = torch.rand(n, channels, 4, 4, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(x, size=(size, size), mode="bilinear")


def by_torchvision(image, draw, i):
    """One image, by the functions of torchvision."""
    size = image.shape[-1]
    image = TF.resized_crop(image, *draw.box[i].tolist(), [size, size], antialias=True)
    image = TF.horizontal_flip(image) if draw.mirrored[i] else image
    changes = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    for which in draw.order[i].tolist() if draw.jittered[i] else ():
        image = changes[which](image, float(draw.factors[i, which]))
    if draw.grey[i]:
        image = TF.rgb_to_grayscale(image, num_output_channels=image.shape[0])
    if draw.blurred[i]:
        k = max(3, size // 10 * 2 + 1)
        image = TF.gaussian_blur(image, [k, k], [float(draw.sigma[i])] * 2)
    return image


@pytest.mark.parametrize("channels, size", [(3, 32), (3, 16), (1, 8)])
@pytest.mark.parametrize("flip", [True, False])
def test_every_image_is_what_torchvision_makes_of_it(channels, size, flip):
    x = pictures(60, channels, size)
    draw = draw_views(60, size, flip, np.random.default_rng(3))
    found = look(x, draw)
    for i, image in enumerate(x):
        torch.testing.assert_close(found[i], by_torchvision(image, draw, i), atol=2e-3, rtol=0)


def test_draws_are_as_often_as_torchvisions():
    n, size = 20_000, 32
    draw = draw_views(n, size, True, np.random.default_rng(0))
    for coin, share in ((draw.mirrored, 0.5), (draw.jittered, JITTER), (draw.grey, GREY)):
        assert float(coin.mean()) == pytest.approx(share, abs=0.02)
    assert float(draw.blurred.mean()) == pytest.approx(BLUR, abs=0.02)
    assert sorted(np.unique(draw.order, axis=0).tolist())[0] == [0, 1, 2, 3]
    assert len(np.unique(draw.order, axis=0)) == 24
    crop, image = v2.RandomResizedCrop(size, scale=(0.2, 1.0)), torch.zeros(1, size, size)
    torch.manual_seed(0)
    theirs = [crop.make_params([image]) for _ in range(4000)]
    for k, name in enumerate(("top", "left", "height", "width")):
        mean = sum(p[name] for p in theirs) / len(theirs)
        assert float(draw.box[:, k].mean()) == pytest.approx(mean, abs=0.4), name
    top, left, h, w = draw.box.T
    assert (top >= 0).all() and (top + h <= size).all() and (left + w <= size).all()
    assert not draw_views(100, 8, False, np.random.default_rng(0)).mirrored.any()
    rarely = draw_views(n, size, True, np.random.default_rng(0), 0.2)
    assert float(rarely.blurred.mean()) == pytest.approx(0.2, abs=0.02)
    assert (rarely.grey == draw.grey).all() and (rarely.blurred <= draw.blurred).all()


@pytest.mark.parametrize("policy, blur", [("contrastive", BLUR), ("contrastive_blur02", 0.2)])
def test_a_contrastive_view_is_not_cropped_before(policy, blur):
    x, recipe = 2 * pictures(40, 3, 16) - 1, load_config("cifar100").sau
    found = augment(x, recipe, policy, 0, 7, "test")
    draw = draw_views(40, 16, True, host_draws(derive_seed(7, "test", policy)), blur)
    torch.testing.assert_close(found, look((x + 1) / 2, draw).clamp(0, 1) * 2 - 1)
