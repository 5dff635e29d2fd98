"""Changes of training images that the network is told of: against their definition, and what is asked."""

import math

import pytest
import torch

from difflt_core.generation.augmentation import N_LABELS, draw_changes, warp
from difflt_core.generation.network import Denoiser, make_unet
from difflt_core.generation.noise import make_noise

LAST = torch.tensor([[0.0, 0.0, 1.0]])  # of a map of places in three coordinates


def drawn(n: int, probability: float):
    return draw_changes(n, probability, torch.Generator().manual_seed(0), "cpu")


def forward_by_hand(label) -> torch.Tensor:
    """The map (3, 3) of an image's places that a label tells."""
    mirrored, scale, cos_1, sin, stretch_x, stretch_y, right, down = label.double().tolist()
    turn = torch.tensor([[cos_1 + 1, -sin], [sin, cos_1 + 1]])
    upside = torch.diag(torch.tensor([1.0, -1.0 if mirrored else 1.0]))
    size, axis = math.hypot(stretch_x, stretch_y), math.atan2(stretch_y, stretch_x) / 2
    along = torch.tensor([math.cos(axis), math.sin(axis)])
    across = torch.tensor([-math.sin(axis), math.cos(axis)])
    stretch = 2 ** (0.2 * size) * torch.outer(along, along)
    stretch = stretch + 2 ** (-0.2 * size) * torch.outer(across, across)
    linear = 2 ** (0.2 * scale) * stretch @ turn @ upside
    places = torch.cat([linear, torch.tensor([[0.25 * right], [0.25 * down]])], dim=1)
    return torch.cat([places, LAST])


def test_maps_undo_what_the_labels_tell():
    labels, maps = drawn(200, 0.5)
    assert labels.shape == (200, N_LABELS) and maps.shape == (200, 2, 3)
    for label, back in zip(labels, maps, strict=True):
        both = torch.cat([back, LAST]) @ forward_by_hand(label)
        torch.testing.assert_close(both, torch.eye(3), atol=1e-5, rtol=0)


def test_each_change_comes_with_its_probability():
    labels, _ = drawn(20_000, 0.15)
    seen = labels.abs() > 0
    shares = [seen[:, column].float().mean().item() for column in (0, 1, 3, 4, 6)]
    assert shares == pytest.approx([0.075, *(4 * [0.15])], abs=0.01)  # half of the mirrored stay
    unchanged = (labels == 0).all(dim=1).float().mean().item()
    assert unchanged == pytest.approx(0.925 * 0.85**4, abs=0.01)
    assert not drawn(50, 0.0)[0].any()


def test_an_unchanged_image_keeps_every_bit_and_the_others_do_not():
    x = torch.rand(300, 3, 16, 16) * 2 - 1
    labels, maps = drawn(300, 0.15)
    changed, same = warp(x, labels, maps), (labels == 0).all(dim=1)
    assert torch.equal(changed[same], x[same]) and 100 < same.sum() < 200
    assert ((changed[~same] - x[~same]).abs().amax(dim=(1, 2, 3)) > 0).all()
    assert changed.abs().max() <= 1


def test_a_shift_goes_right_and_down_by_pixels_and_upside_down_is_exact():
    x = torch.rand(2, 1, 16, 16)
    labels = torch.zeros(2, N_LABELS)
    labels[0, 6], labels[0, 7], labels[1, 0] = 1.0, 0.5, 1.0  # 2 pixels of 16, 1 pixel; a mirror
    maps = torch.stack([torch.linalg.inv(forward_by_hand(label))[:2] for label in labels])
    moved = warp(x, labels, maps)
    torch.testing.assert_close(moved[0, 0, 1:, 2:], x[0, 0, :-1, :-2])
    border = x[0, 0, :-1, :2].flip(-1)  # its mirror image
    torch.testing.assert_close(moved[0, 0, 1:, :2], border)
    torch.testing.assert_close(moved[1], x[1].flip(-2))


@pytest.mark.parametrize("preset, size", [("nano", 8), ("small32", 32)])
def test_what_is_generated_is_asked_for_as_unchanged(tiny, preset, size):
    torch.manual_seed(0)
    told = Denoiser(make_unet(preset, 4, size, 3, augmented=True), make_noise(tiny.diffusion))
    plain = Denoiser(make_unet(preset, 4, size, 3), make_noise(tiny.diffusion))
    x, sigma, y = torch.randn(2, 3, size, size), torch.ones(2), torch.tensor([0, 4])
    changes = torch.zeros(2, N_LABELS)
    with torch.no_grad():
        asked, as_is = told(x, sigma, y), told(x, sigma, y, changes)
        measured = told.unet(x, torch.zeros(2), y, return_dict=False)[0]  # by what knows no changes
        assert torch.equal(
            measured, told.unet(x, torch.zeros(2), (y, changes), return_dict=False)[0]
        )
        changes[:, 1] = 1.0
        assert torch.equal(asked, as_is) and not torch.allclose(told(x, sigma, y, changes), asked)
        assert torch.equal(plain(x, sigma, y, changes), plain(x, sigma, y))  # knows no changes
    names = {name.replace(".of_class", "") for name in told.state_dict() if "of_change" not in name}
    assert told.null == plain.null == 4 and names == set(plain.state_dict())
