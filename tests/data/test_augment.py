"""Augmentation: every image for itself, from the seed alone, in range."""

import itertools
import re

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from difflt_core.benchmarks.augment import one_by_one
from difflt_core.config import ClassifierConfig, load_config, vary
from difflt_core.data.augment import (
    POLICIES,
    augment,
    cutmix,
    cutout,
    mix,
    random_flip,
    random_shift,
)
from difflt_core.data.policies import _by_steps, _operation, as_bytes
from difflt_core.engine.provenance import ROOT
from difflt_core.engine.seeding import generator, host_draws
from difflt_core.profiles import RECIPES, recipe
from difflt_core.recognition.methods import make_objective


def pictures(n: int = 20, channels: int = 3, size: int = 8) -> torch.Tensor:
    return torch.rand(n, channels, size, size, generator=generator(0, "pictures")) * 2 - 1


def test_shift_moves_each_image_for_itself():
    x = torch.arange(64.0).reshape(1, 1, 8, 8).repeat(50, 1, 1, 1)
    shifted = random_shift(x, 2, generator(0, "test"))
    assert shifted.shape == x.shape
    padded = torch.nn.functional.pad(x[:1], (2, 2, 2, 2), mode="replicate")
    crops = [padded[0, :, i : i + 8, j : j + 8] for i in range(5) for j in range(5)]
    many = random_shift(x[:1].repeat(1000, 1, 1, 1), 2, generator(0, "test"))
    assert torch.equal(torch.unique(many, dim=0), torch.unique(torch.stack(crops), dim=0))
    assert torch.equal(random_shift(x, 0, generator(0)), x)


def test_a_black_border_shows_black_and_an_edge_repeats():
    x = torch.ones(100, 3, 8, 8)
    assert (random_shift(x, 4, generator(0), "edge") == 1).all()
    values = random_shift(x, 4, generator(0), "black").unique()
    assert values.tolist() == [-1.0, 1.0]


def test_flip_mirrors_about_half():
    x = pictures(400)
    same = (random_flip(x, generator(0)) == x).flatten(1).all(dim=1)
    assert 150 < same.sum() < 250
    assert torch.equal(random_flip(x, generator(0))[~same], x[~same].flip(-1))


def test_cutout_is_one_square_cut_off_at_the_border():
    covered = cutout(torch.ones(500, 1, 8, 8), 4, generator(0))[:, 0] == -1
    areas = covered.sum(dim=(1, 2))
    assert areas.max() == 16 and areas.min() >= 4
    for image in covered[:50].numpy():
        rows, columns = np.flatnonzero(image.any(1)), np.flatnonzero(image.any(0))
        assert image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_policy_is_a_function_of_the_seed_and_keeps_shape_and_range(policy, channels):
    recipe = ClassifierConfig(flip=True)
    x = pictures(channels=channels)
    state = torch.get_rng_state()
    one, again = (augment(x, recipe, policy, 4, 0, "what", 3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert one.shape == x.shape and one.min() >= -1 and one.max() <= 1
    assert torch.equal(one, again)
    assert not torch.equal(one, augment(x, recipe, policy, 4, 0, "what", 4))


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "none"])
def test_a_policy_draws_for_each_image(policy):
    x = pictures(1).repeat(30, 1, 1, 1)
    assert len(torch.unique(POLICIES[policy](x, True, 0), dim=0)) > 10


@pytest.mark.parametrize("size", [8, 32])
def test_cutmix_covers_as_much_as_lam_says(size):
    """At centres where the box is whole; an image is cut to whole pixels, not down to them."""
    x, other = torch.zeros(1, 1, size, size), torch.ones(1, 1, size, size)
    nominal, covered = [], []
    for i, lam in enumerate(torch.linspace(0.75, 0.99, 400).tolist()):
        mixed, kept = cutmix(x, other, lam, host_draws(i, "box"))
        assert kept == pytest.approx(1 - float(mixed.mean()))
        row, column = mixed[0, 0].any(1).nonzero(), mixed[0, 0].any(0).nonzero()
        if (
            len(row)
            and row[0] > 0
            and row[-1] < size - 1
            and 0 < column[0]
            and column[-1] < size - 1
        ):
            nominal.append(1 - lam)
            covered.append(1 - kept)
    assert len(covered) > 50 and np.mean(covered) == pytest.approx(np.mean(nominal), rel=0.06)


TORCHVISIONS = {
    "autoaugment": v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10, fill=128),
    "randaugment": v2.RandAugment(num_ops=2, magnitude=10, fill=128),
}


@pytest.mark.parametrize(
    "policy, level, n_levels", [("autoaugment", 7, 10), ("randaugment", 10, 31)]
)
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 13, 21), (3, 2, 5)])
def test_a_batch_is_changed_as_torchvision_changes_each(policy, level, n_levels, shape):
    """Every operation of the policies in both directions, and none, in two steps."""
    transform, draws = TORCHVISIONS[policy], host_draws(0, "order")
    how = {"interpolation": transform.interpolation, "fill": transform._fill}
    each = list(itertools.product(transform._AUGMENTATION_SPACE, (level,), (False, True)))
    each += [(name, 2, sign) for name, _, sign in each] + [None] * 3
    steps = [[each[i] for i in draws.permutation(len(each))] for _ in range(2)]
    x = torch.rand(len(each), *shape, generator=generator(0, "pictures")) * 2 - 1
    together = _by_steps(x, transform, steps, n_levels)
    for i, image in enumerate(as_bytes(x)):
        for drawn in (step[i] for step in steps):
            if drawn is not None:
                operation = _operation(transform, drawn, n_levels, shape[1:])
                image = transform._apply_image_or_video_transform(image, *operation, **how)
        assert torch.equal(together[i], image.float() / 127.5 - 1), [step[i] for step in steps]


@pytest.mark.parametrize("policy", ["autoaugment", "randaugment"])
def test_a_policy_draws_as_torchvision_does(policy):
    """The share of images that stay as they are, and the mean change, are those of one at a time."""
    transform = TORCHVISIONS[policy]
    x = as_bytes(pictures(1200, 3, 16)).float() / 127.5 - 1
    ours, theirs = POLICIES[policy](x, False, 0), one_by_one(x, transform, 1)
    for of in (
        lambda y: (y == x).flatten(1).all(1).float(),
        lambda y: (y - x).abs().flatten(1).mean(1),
    ):
        a, b = of(ours), of(theirs)
        tolerance = 4 * float((a.var() + b.var()).sqrt()) / len(x) ** 0.5
        assert float(a.mean()) == pytest.approx(float(b.mean()), abs=tolerance)


def test_rides_rotation_is_torchvisions():
    from difflt_core.data.augment import _rotate

    x = pictures(12, 3, 16)
    angles = host_draws(7).uniform(-15, 15, len(x))
    assert np.abs(angles).max() > 5
    for found, image, angle in zip(_rotate(x, False, 7), x, angles, strict=True):
        theirs = v2.functional.rotate(image + 1, float(angle)) - 1
        differing = (found - theirs).abs().amax(0) > 1e-5  # where two pixels are as near
        assert differing.float().mean() < 0.02


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_lam_is_the_share_of_the_images_own_label(kind):
    x = torch.eye(6)[:, :, None, None].expand(6, 6, 8, 8).contiguous()  # channel i only in image i
    mixed, lam = mix(x, kind, seed=5)
    assert 0 < lam < 1
    share = mixed.mean(dim=(2, 3))
    expected = lam * torch.eye(6) + (1 - lam) * torch.eye(6).roll(1, 0)
    torch.testing.assert_close(share, expected, atol=1e-6, rtol=0)
    one, lam = mix(x[:1], kind, seed=5)
    assert torch.equal(one, x[:1]) and lam == 1


@pytest.mark.parametrize("method", ["ce", "cb", "bsce", "ldam", "ride"])
def test_a_mixed_loss_is_the_mean_of_the_two_losses(method):
    recipe, counts = ClassifierConfig(method=method), [30, 20, 10]
    logits, w = pictures(6, 3, 1)[:, :, 0, 0], torch.tensor([1, 1, 0.3, 1, 0.3, 1])
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    objective = make_objective(recipe, torch.nn.Identity(), counts)
    objective.predict = lambda x: torch.stack([x, 2 * x]) if method == "ride" else x
    pure = [float(objective([logits], *labels, 0)) for labels in ((y, w), (y.roll(1), w.roll(1)))]
    mixed = float(objective([logits], y, w, 0, 0.7))
    assert mixed == pytest.approx(0.7 * pure[0] + 0.3 * pure[1], rel=1e-6)


def test_mixing_is_refused_for_contrastive_methods():
    with pytest.raises(ValueError, match="mix: paco contrasts whole images"):
        vary(load_config("smoke"), {"classifier.mix": "mixup", "classifier.method": "paco"})


# As the authors' repositories have it; the commits: docs/protocol.md, Sources.
_PACO = {
    "lr": 0.05,
    "weight_decay": 5e-4,
    "nesterov": False,
    "batch_size": 128,
    "epochs": 400,
    "warmup_epochs": 10,
    "schedule": "step10",
    "policy": "autoaugment",
    "second_policy": "contrastive",
    "cutout": 16,
    "paco_alpha": 0.01,
    "paco_temperature": 0.05,
    "queue_size": 1024,
}
_LDAM = {
    "lr": 0.1,
    "weight_decay": 2e-4,
    "nesterov": False,
    "batch_size": 128,
    "epochs": 200,
    "warmup_epochs": 5,
    "schedule": "step",
    "policy": "none",
    "second_policy": "none",
    "cutout": 0,
}
_SAU = {
    "lr": 0.01,
    "weight_decay": 5e-3,
    "nesterov": False,
    "batch_size": 128,
    "epochs": 200,
    "warmup_steps": 0,
    "schedule": "cosine",
    "policy": "autoaugment",
    "second_policy": "contrastive",
    "cutout": 16,
}
_AUTHORS = {
    "ldam": _LDAM,
    "ride": _LDAM | {"weight_decay": 5e-4, "nesterov": True, "policy": "rotate"},
    "bsce": {
        "lr": 0.1,
        "weight_decay": 5e-4,
        "nesterov": False,
        "batch_size": 512,
        "n_steps": 13_000,
        "warmup_steps": 800,
        "schedule": "cosine",
        "policy": "autoaugment",
        "second_policy": "none",
        "cutout": 16,
    },
    "paco": _PACO,
    "gpaco": _PACO | {"lr": 0.1, "second_policy": "contrastive_blur02"},
    "sau": _SAU,
}
_ROWS = {
    "ldam": "LDAM",
    "ride": "RIDE",
    "bsce": "BALMS",
    "paco": "PaCo",
    "gpaco": "GPaCo",
    "sau": "SAU",
}


@pytest.mark.parametrize("profile", ["cifar100", "folder"])
@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_is_its_authors(name, profile):
    """Whatever the profile has: network, rates, length, views."""
    found = vary(load_config(profile), recipe(name)).classifier.model_dump()
    expected = {"method": name, "arch": "resnet32", "flip": True, "shift": 4, "border": "black"}
    expected |= _AUTHORS[name]
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize("profile", ["cifar10", "cifar100"])
def test_saus_recipe_is_its_authors(profile):
    found = load_config(profile).sau.model_dump()
    assert {key: found[key] for key in _SAU} == _SAU


@pytest.mark.parametrize("name", _AUTHORS)
def test_the_protocol_has_each_recipe(name):
    """The table of docs/protocol.md, Training recipes."""
    text = (ROOT / "docs" / "protocol.md").read_text("utf-8")
    table = text.split("Training recipes\n")[1]
    row = re.search(rf"^\| {_ROWS[name]} \| (.*?) \| (.*?) \|", table, re.M)
    (lr, decay, nesterov), (batch, length) = (cell.split(", ") for cell in row.groups())
    theirs = _AUTHORS[name]
    assert (float(lr), float(decay)) == (theirs["lr"], theirs["weight_decay"])
    assert (nesterov == "yes", int(batch)) == (theirs["nesterov"], theirs["batch_size"])
    n, unit = length.split()
    assert int(n.replace(",", "")) == theirs["epochs" if unit == "epochs" else "n_steps"]


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_fits_the_configuration(name):
    found = vary(load_config("cifar100"), recipe(name)).classifier.in_steps(10_847)
    assert found.method == name
    if name == "paco":  # 400 epochs of 85 steps, ten of them warm-up
        assert (found.n_steps, found.warmup_steps) == (34_000, 850)
    if name == "bsce":
        assert (found.n_steps, found.warmup_steps) == (13_000, 800)


def test_an_unknown_recipe_is_named():
    with pytest.raises(ValueError, match="recipe: expected one of .*got 'pako'"):
        recipe("pako")
