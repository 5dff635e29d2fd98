"""The generator: its network, and one step's loss against a plain evaluation in float64."""

import numpy as np
import pytest
import torch

from difflt_core import Pipeline, vary
from difflt_core.data.long_tail import load_split
from difflt_core.generation.network import load_denoiser, make_unet
from difflt_core.generation.training import StepLoss, plain_part, seen_images
from difflt_core.recognition.classifier import load_classifier
from difflt_core.recognition.geometry import class_geometry

# Losses of twelve steps as commit 5daae1d computed them: of the code before the rooms, which had those of
# 275378a (DDPM's own terms) on the digits of its time.
_BEFORE = {
    "own": [
        (0.9285809, 0.01693336, 0.1938313),
        (0.8505741, 0.009653743, 0.2439186),
        (0.653108, 0.008131276, 0.08858677),
        (0.4906794, 0.008855542, 0.07717952),
        (0.4546157, 0.004917085, 0.043871),
        (0.3170163, 0.005849798, 0.02653586),
        (0.2812121, 0.004979628, 0.04438569),
        (0.328399, 0.003183488, 0.07132826),
        (0.2958856, 0.002744884, 0.04581311),
        (0.3038513, 0.001385511, 0.04112436),
        (0.1979821, 0.001933911, 0.03344617),
        (0.218116, 0.002382338, 0.0482261),
    ],
    "other": [
        (0.9285809, 0.05070446, 0.1651537),
        (0.8473691, 0.02670984, 0.1977342),
        (0.6562323, 0.02314311, 0.07496746),
        (0.491838, 0.02252607, 0.05318286),
        (0.4555779, 0.01293436, 0.04057492),
        (0.3184426, 0.01737351, 0.02230658),
        (0.3064455, 0.01515907, 0.06167976),
        (0.3200599, 0.009019394, 0.05257035),
        (0.2935557, 0.006324308, 0.03461768),
        (0.2998129, 0.004659588, 0.04210689),
        (0.1927253, 0.00712096, 0.03497434),
        (0.2141046, 0.005881256, 0.03568274),
    ],
}


@pytest.mark.parametrize("reading", ["own", "other"])
def test_eps_keeps_the_numbers_it_had(tiny, tmp_path, reading):
    changes = {
        "diffusion.parameterisation": "eps",
        "diffusion.preset": "tiny",
        "diffusion.alpha": 0.1,
        "diffusion.aid_min_alpha_bar": 0.05,
        "diffusion.aid_reading": reading,
    }
    if reading == "other":
        changes |= {"diffusion.tau": 1.0, "diffusion.cbdm_labels": "prior"}
    loss = Pipeline(vary(tiny, changes), tmp_path, "cpu", progress=False).train_diffusion()
    # L_AID looks through a phi_0 that another processor trains with another rounding (2 % between a Xeon
    # and an EPYC); so does each step look at the weights of the one before (14 % after twelve).
    found, before = loss.array("loss"), np.array(_BEFORE[reading])
    np.testing.assert_allclose(found[0, :2], before[0, :2], rtol=1e-5)
    np.testing.assert_allclose(found[0, 2], before[0, 2], rtol=3e-2)
    np.testing.assert_allclose(found, before, rtol=0.15)


class FakeDenoiser:
    """A denoiser simple enough to redo by hand: D = 0.3 x + 0.05 (y + 1)."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, sigma, y, changes=None):
        self.calls.append((x.detach().clone(), sigma.clone(), y.clone()))
        self.changes = changes
        return 0.3 * x + 0.05 * (y + 1)[:, None, None, None]

    def eval(self):
        pass

    train = eval


def step_loss(trained, seed=0, **changes):
    config = vary(trained.config, {f"diffusion.{k}": v for k, v in changes.items()})
    train = load_split(trained.data(), "train")
    inputs = {"data": trained.data(), "extractor": trained.train_extractor()}
    more = {"radius": "max", "aid_factor": 2.0, "many_above": 30}
    return StepLoss(config.diffusion, seed, train, "cpu", inputs, more)


def hinge_by_hand(trained, images, labels) -> list[float]:
    phi0 = load_classifier(trained.train_extractor())
    centres, radii = class_geometry(phi0, load_split(trained.data(), "train"))
    phi0 = phi0.double()
    terms = []
    for image, c in zip(images, labels, strict=True):
        f = phi0.features(torch.as_tensor(image)[None].double()).detach().numpy()[0]
        d = np.linalg.norm(f - centres[c]) / radii[c]
        terms.append(max(0, 1 - d) + max(0, d - 2))
    return terms


def test_flip_shows_about_half_of_the_images_mirrored(trained):
    found = {}
    for flip in (False, True):
        fake = FakeDenoiser()
        step_loss(trained, flip=flip, tau=0.0, alpha=0.0, batch_size=64)(fake, 3)
        (found[flip], *_), *_ = fake.calls
    apart = (found[True] - found[False]).flatten(1).abs().amax(dim=1) > 1e-6
    assert 16 < apart.sum() < 48  # digits are not their own mirror images
    plain = step_loss(trained, flip=False, tau=0.0, alpha=0.0, batch_size=64)
    x0 = plain.read(plain._indices(3))
    mirrored = found[False] - x0 + x0.flip(-1)
    torch.testing.assert_close(found[True][apart], mirrored[apart])


@pytest.mark.parametrize("kind", ["edm", "eps"])
@pytest.mark.parametrize("reading", ["own", "other", "difference"])
def test_aid_term_by_hand(trained, reading, kind):
    loss = step_loss(
        trained, tau=0.0, alpha=0.5, aid_reading=reading, parameterisation=kind,
        aid_min_alpha_bar=0.1, aid_max_alpha_bar=0.8,
    )  # fmt: skip
    denoise = FakeDenoiser()
    l_ddpm, l_cbdm, l_aid = (float(v) for v in loss(denoise, step=3))
    x, sigma, y = denoise.calls[0]
    B = trained.config.diffusion.batch_size
    assert len(denoise.calls) == 1 and l_cbdm == 0 and l_ddpm > 0
    assert len(x) == (B if reading == "own" else 2 * B)
    labels = (y[B:] if reading == "other" else y[:B]).numpy()
    alpha_bar = 1 / (1 + sigma[:B].double().numpy() ** 2)
    used = (alpha_bar > 0.1) & (alpha_bar <= 0.8) & (labels < 10)
    shift = labels + 1
    if reading == "difference":  # D_null + 2 (D_y - D_null)
        shift = 11 + 2 * (shift - 11)
    images = 0.3 * x[:B].double().numpy() + 0.05 * shift[:, None, None, None]
    terms = hinge_by_hand(trained, images[used], labels[used])
    assert len(terms) > 3
    assert l_aid == pytest.approx(0.5 * np.mean(terms), rel=1e-4)


def test_the_sample_reading_sees_what_the_network_draws(trained):
    loss = step_loss(trained, tau=0.0, alpha=0.5, aid_reading="sample", aid_min_alpha_bar=0.5)
    denoise = FakeDenoiser()
    *_, l_aid = (float(v) for v in loss(denoise, step=3))
    B = trained.config.diffusion.batch_size
    x, sigma, y = (part[B:] for part in denoise.calls[-1])
    assert len(denoise.calls) == 6 and len(x) == B // 4  # five steps without gradient, then one
    assert sigma[0] == pytest.approx(1.0) and (y < 10).all()  # alpha_bar 0.5 is sigma 1
    assert (
        denoise.calls[0][1][0] == pytest.approx(20, rel=1e-4) and len(denoise.calls[0][0]) == B // 4
    )
    images = 0.3 * x.numpy() + 0.05 * (y + 1).numpy()[:, None, None, None]
    assert l_aid == pytest.approx(
        0.5 * np.mean(hinge_by_hand(trained, images, y.numpy())), rel=1e-4
    )


def test_the_network_is_told_of_every_change_and_l_aid_hears_no_changed_image(trained):
    settings = {"tau": 0.3, "alpha": 0.5, "aid_min_alpha_bar": 0.1, "batch_size": 64}
    loss, told, free = step_loss(trained, **settings, augment=0.15), FakeDenoiser(), FakeDenoiser()
    *_, l_aid = (float(v) for v in loss(told, step=3))
    step_loss(trained, **settings)(free, step=3)
    changes, B = told.changes[:64], 64
    assert torch.equal(changes, told.changes[B:]) and not free.changes.any()
    same = (changes == 0).all(dim=1)
    assert 16 < same.sum() < 48
    x, sigma, y = (part[:B] for part in told.calls[0])
    # the noise and the labels are those of images as they are
    assert torch.equal(x[same], free.calls[0][0][:B][same])
    assert not torch.allclose(x[~same], free.calls[0][0][:B][~same])
    used = (1 / (1 + sigma**2) > 0.1) & (y < 10) & same
    images = (0.3 * x + 0.05 * (y + 1)[:, None, None, None])[used].numpy()
    by_hand = hinge_by_hand(trained, images, y[used].numpy())
    assert l_aid == pytest.approx(0.5 * np.mean(by_hand), rel=1e-4)


@pytest.mark.parametrize("kind", ["edm", "eps"])
def test_the_two_forwards_of_class_balancing_share_noise(trained, kind):
    loss = step_loss(
        trained, tau=0.3, alpha=0.0, label_dropout=0.5, parameterisation=kind, cbdm_weight="lambda"
    )
    denoise = FakeDenoiser()
    _, l_cbdm, l_aid = (float(v) for v in loss(denoise, step=0))
    x, sigma, y = denoise.calls[0]
    B = len(x) // 2
    assert torch.equal(x[:B], x[B:]) and torch.equal(sigma[:B], sigma[B:]) and l_aid == 0
    assert (y[:B] == 10).any() and not (y[B:] == 10).any()  # only the own label is dropped
    gap = (0.05 * (y[:B] - y[B:])).double() ** 2  # every pixel differs by as much
    weight = loss.noise.quantile(sigma[:B]) * loss.noise.weight(sigma[:B])
    by_hand = (0.3 * weight * gap * 1.25 * (y[:B] < 10)).mean()
    assert l_cbdm == pytest.approx(float(by_hand), rel=1e-4)


def test_the_plain_part_has_no_other_terms(trained):
    changes = {"tau": 0.3, "alpha": 0.5, "plain_share": 0.5, "schedule": "trapezoid"}
    loss = step_loss(trained, **changes, aid_min_alpha_bar=0.05)
    half = trained.config.diffusion.n_steps // 2
    before, after = loss(FakeDenoiser(), half - 1), loss(FakeDenoiser(), half)
    assert before[0] > 0 and before[1:].tolist() == [0, 0] and (after > 0).all()


def test_variants_share_the_plain_part(trained):
    shared = {"diffusion.plain_share": 0.5, "diffusion.schedule": "trapezoid"}
    p = trained.vary({**shared, "diffusion.alpha": 0.0})
    assert p.train_plain().key == p.vary({"diffusion.tau": 2.0}).train_plain().key
    n_plain = p.config.diffusion.n_plain_steps
    loss, plain = (a.array("loss") for a in (p.train_diffusion(), p.train_plain()))
    assert np.array_equal(loss[:n_plain], plain) and (loss[n_plain:, 1] > 0).all()


@pytest.mark.parametrize("augment", [0.0, 0.15])
def test_a_run_cut_in_two_is_one_run_bit_for_bit(trained, augment):
    plain = {"diffusion.schedule": "constant", "diffusion.tau": 0.0, "diffusion.alpha": 0.0}
    plain["diffusion.augment"] = augment
    whole, cut = (trained.vary({**plain, "diffusion.plain_share": s}) for s in (0.0, 0.5))
    assert cut.config.diffusion.n_plain_steps == whole.config.diffusion.n_steps // 2
    for name in ("loss.npy", "model.safetensors"):
        first, second = (p.train_diffusion().path / name for p in (whole, cut))
        assert first.read_bytes() == second.read_bytes()


def test_a_second_part_does_not_change_the_first():
    from difflt_core.config import DiffusionConfig

    recipe = DiffusionConfig(n_steps=100, plain_share=0.7, schedule="trapezoid", tau=1, alpha=0.1)
    other = recipe.model_copy(update={"tau": 2.0, "alpha": 0.0, "aid_reading": "other"})
    plain = plain_part(recipe)
    assert plain == plain_part(other) and plain.n_steps == 70
    assert (plain.tau, plain.alpha, plain.schedule) == (0, 0, "constant")
    assert plain != plain_part(recipe.model_copy(update={"lr": 1e-3}))
    with pytest.raises(ValueError, match="needs trapezoid or constant"):
        DiffusionConfig(plain_share=0.5)


def test_settings_that_nothing_uses_tell_no_generators_apart(trained):
    def key(**changes):
        return trained.vary({f"diffusion.{k}": v for k, v in changes.items()}).train_diffusion().key

    assert key(alpha=0.0, tau=0.1) == key(alpha=0.0, tau=0.1, aid_reading="other")
    assert key(alpha=0.0, tau=0.1) == key(alpha=0.0, tau=0.1, aid_formula="squared")
    assert key(alpha=0.1) != key(alpha=0.1, aid_formula="squared")
    unused = {"cbdm_weight": "lambda", "aid_min_alpha_bar": 0.3}
    assert key(alpha=0.0, tau=0.0) == key(alpha=0.0, tau=0.0, **unused)
    assert key(alpha=0.0, tau=0.1) != key(alpha=0.0, tau=0.1, cbdm_weight="lambda")


def test_class_balance_draws_rare_classes_more_often(trained):
    def shares(balance):
        loss = step_loss(trained, class_balance=balance, alpha=0.0)
        drawn = torch.cat([loss.y[loss._indices(step)] for step in range(200)])
        return np.bincount(drawn, minlength=10) / len(drawn)

    counts = load_split(trained.data(), "train").class_counts
    for balance in (0.0, 0.5, 1.0):
        expected = counts ** (1 - balance) / (counts ** (1 - balance)).sum()
        np.testing.assert_allclose(shares(balance), expected, atol=0.02)


def test_a_step_is_a_function_of_seed_and_step(trained):
    loss = step_loss(trained)
    first, again, other = (loss(FakeDenoiser(), step) for step in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first, step_loss(trained, seed=1)(FakeDenoiser(), 5))


def test_the_null_class_has_its_own_embedding():
    unet = make_unet("tiny", n_classes=4, image_size=8, channels=3)
    assert unet.class_embedding.num_embeddings == 5
    x, t = torch.zeros(2, 3, 8, 8), torch.tensor([10, 10])
    with torch.no_grad():
        out = unet(x, t, torch.tensor([0, 4]), return_dict=False)[0]
    assert out.shape == (2, 3, 8, 8) and not torch.allclose(out[0], out[1])


def test_evaluation_twice_gives_the_same(trained):
    denoise = load_denoiser(trained.train_diffusion(), trained.config.diffusion)
    x, sigma = torch.ones(2, 1, 8, 8), torch.tensor([0.1, 5.0])
    with torch.no_grad():
        first, second = (denoise(x, sigma, torch.tensor([0, denoise.null])) for _ in range(2))
    assert torch.equal(first, second) and first.shape == x.shape


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
    with pytest.raises(ValueError, match=r"head_share: .* got 0 where each class has more than 1 "):
        seen_images(labels, 0.0, many_above=1)


def test_the_generator_trains_on_that_share(trained):
    labels = load_split(trained.data(), "train").labels
    seen = seen_images(labels, 0.4, many_above=30)
    assert 0 < len(seen) < len(labels)
    loss = step_loss(trained, head_share=0.4, alpha=0.0)
    per_epoch = -(-len(seen) // trained.config.diffusion.batch_size)
    drawn = np.concatenate([loss._indices(step) for step in range(per_epoch)])
    assert sorted(drawn[: len(seen)]) == sorted(seen)


def test_a_class_that_the_generator_never_saw_is_in_no_loss_and_is_not_drawn(trained):
    """At head_share 0 L_CBDM would pull such a label to other classes, and its images would be of them."""
    n = load_split(trained.data(), "train").class_counts
    p, others = trained.vary({"diffusion.head_share": 0.0}), n <= 30
    assert p.config.data.many_above == 30 and 0 < others.sum() < len(n) - 1
    assert p.train_diffusion().array("seen").tolist() == np.where(others, n, 0).tolist()
    loss = step_loss(p, head_share=0.0, alpha=0.0)
    g = torch.Generator().manual_seed(0)
    assert loss._other_labels(500, g).unique().tolist() == np.flatnonzero(others).tolist()
    drawn = np.bincount(p.generate().array("labels"), minlength=len(n))
    assert drawn.tolist() == np.where(others, n.max() - n, 0).tolist()


def test_the_generator_is_the_average_of_its_weights(trained):
    shared = {"diffusion.plain_share": 0.5, "diffusion.schedule": "trapezoid"}
    for decay, same in ((0.0, True), (0.998, False)):
        plain = trained.vary({**shared, "diffusion.ema_decay": decay}).train_plain()
        average, last = plain.tensors("model"), plain.tensors("state")
        equal = [torch.equal(average[name], last[f"model.{name}"]) for name in average]
        assert all(equal) if same else not any(equal[:5])
