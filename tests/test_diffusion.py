"""The generator: its network, and one step's loss against a plain evaluation in float64."""

import numpy as np
import pytest
import torch

from difflt_core import vary
from difflt_core.classifiers import load_classifier
from difflt_core.data import load_split
from difflt_core.diffusion import StepLoss, load_diffusion, make_unet, seen_images
from difflt_core.filtering import class_geometry


class FakeUNet:
    """A network simple enough to redo by hand: eps = 0.3 xt + 0.05 (y + 1)."""

    def __init__(self):
        self.calls = []

    def __call__(self, xt, t, y, return_dict):
        self.calls.append((xt.detach().clone(), t.clone(), y.clone()))
        return (0.3 * xt + 0.05 * (y + 1)[:, None, None, None],)


def step_loss(trained, **changes):
    config = vary(trained.config, {f"diffusion.{k}": v for k, v in changes.items()})
    train = load_split(trained.data(), "train")
    inputs = {"data": trained.data(), "extractor": trained.train_extractor()}
    filtering = {"radius": "max", "aid_factor": 2.0}
    return StepLoss(config.diffusion, 0, train, "cpu", inputs, filtering)


@pytest.mark.parametrize("reading", ["own", "other"])
def test_aid_term_by_hand(trained, reading):
    loss = step_loss(
        trained, tau=0.0, alpha=0.5, aid_label=reading, aid_min_alpha_bar=0.1, aid_max_alpha_bar=0.8
    )
    unet = FakeUNet()
    l_ddpm, l_cbdm, l_aid = (float(v) for v in loss(unet, step=3))
    xt, t, y = unet.calls[0]
    B = len(xt) // (2 if reading == "other" else 1)
    assert len(unet.calls) == 1 and l_cbdm == 0 and l_ddpm > 0
    seen = slice(B, None) if reading == "other" else slice(None)
    betas = np.linspace(1e-4, 0.02, 1000, dtype=np.float64)
    alpha_bar = np.cumprod(1 - betas)[t[seen].numpy()]
    labels = y[seen].numpy()
    phi0 = load_classifier(trained.train_extractor()).double()
    centres, radii = class_geometry(phi0.float(), load_split(trained.data(), "train"))
    terms = []
    for image, a, c in zip(xt[seen].double().numpy(), alpha_bar, labels, strict=True):
        if 0.1 < a <= 0.8 and c < 10:
            x0_pred = (image - np.sqrt(1 - a) * (0.3 * image + 0.05 * (c + 1))) / np.sqrt(a)
            f = phi0.double().features(torch.from_numpy(x0_pred)[None]).detach().numpy()[0]
            d = np.linalg.norm(f - centres[c]) / radii[c]
            terms.append(max(0, 1 - d) + max(0, d - 2))
    assert len(terms) > 3
    assert l_aid == pytest.approx(0.5 * np.mean(terms), rel=1e-4)


def test_the_two_forwards_of_cbdm_share_noise_and_timesteps(trained):
    loss = step_loss(trained, tau=0.3, alpha=0.0, label_dropout=0.5)
    unet = FakeUNet()
    _, l_cbdm, l_aid = (float(v) for v in loss(unet, step=0))
    xt, t, y = unet.calls[0]
    B = len(xt) // 2
    assert torch.equal(xt[:B], xt[B:]) and torch.equal(t[:B], t[B:]) and l_aid == 0
    assert (y[:B] == 10).any() and not (y[B:] == 10).any()  # only the own label is dropped
    gap = (0.05 * (y[:B] - y[B:])).double().numpy() ** 2  # every pixel differs by as much
    by_hand = np.mean(0.3 * t[:B].numpy() / 1000 * gap * 1.25 * (y[:B] < 10).numpy())
    assert l_cbdm == pytest.approx(by_hand, rel=1e-4)


def test_a_step_is_a_function_of_seed_and_step(trained):
    loss = step_loss(trained)
    first, again, other = (loss(FakeUNet(), step) for step in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_null_class_has_its_own_embedding():
    unet = make_unet("tiny", n_classes=4, image_size=8, channels=3)
    assert unet.class_embedding.num_embeddings == 5
    x, t = torch.zeros(2, 3, 8, 8), torch.tensor([10, 10])
    with torch.no_grad():
        out = unet(x, t, torch.tensor([0, 4]), return_dict=False)[0]
    assert out.shape == (2, 3, 8, 8) and not torch.allclose(out[0], out[1])


def test_evaluation_twice_gives_the_same(trained):
    unet = load_diffusion(trained.train_diffusion())
    x, t, y = torch.ones(2, 1, 8, 8), torch.tensor([5, 500]), torch.tensor([0, 10])
    with torch.no_grad():
        assert torch.equal(unet(x, t, y).sample, unet(x, t, y).sample)


def test_the_loss_curve_has_three_terms_per_step(trained):
    loss = trained.train_diffusion().array("loss")
    assert loss.shape == (trained.config.diffusion.n_steps, 3) and np.isfinite(loss).all()
    assert (loss[:, 0] > 0).all()


def test_the_generator_sees_a_share_of_the_head():
    labels = [0] * 10 + [1] * 4 + [2] * 2
    seen = seen_images(labels, 0.4, many_above=3).tolist()
    assert seen == [0, 1, 2, 3, 10, 11, 14, 15]  # 4 of 10, 2 of 4, the tail whole
    assert seen_images(labels, 0.0, many_above=3).tolist() == [14, 15]
    assert len(seen_images(labels, 1.0, None)) == 16
