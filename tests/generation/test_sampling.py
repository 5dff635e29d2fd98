"""Generation: which images are wanted, and that an image depends on (model, seed, class, number)
alone."""

import numpy as np
import pytest
import torch

from difflt_core import vary
from difflt_core.config import SamplingConfig
from difflt_core.engine.scheduler import Planner
from difflt_core.generation import sampling
from difflt_core.generation.network import load_denoiser
from difflt_core.generation.noise import EdmNoise, EpsNoise
from difflt_core.generation.sampling import build_samples, generate, make_sampler, wanted_labels
from difflt_core.profiles import PROFILES


def test_every_class_is_filled_up():
    assert wanted_labels([4, 3, 1]).tolist() == [1, 2, 2, 2]
    assert wanted_labels([4, 3, 1], fill_to=5).tolist() == [0, 1, 1, 2, 2, 2, 2]
    assert wanted_labels([4, 3, 1], fill_to=2).tolist() == [2]
    assert len(wanted_labels([4, 4])) == 0


def test_cifar100_needs_39153_images():
    from difflt_core.data.long_tail import class_sizes

    assert len(wanted_labels(class_sizes(100, 500, 100))) == 39153


NOISES = {"edm": EdmNoise(), "eps": EpsNoise()}


def denoiser_of(p):
    return load_denoiser(p.train_diffusion(), p.config.diffusion)


def mixture_denoiser(means, sd):
    """The exact denoiser E[x0 | x] of an even mixture of Gaussians N(mean, sd^2), per pixel."""
    means = torch.tensor(means, dtype=torch.float64)

    def denoise(x, sigma):
        x, total = x.double()[..., None], sd**2 + float(sigma) ** 2
        share = torch.softmax(-((x - means) ** 2) / (2 * total), dim=-1)
        posterior = (sd**2 * x + float(sigma) ** 2 * means) / total
        return (share * posterior).sum(dim=-1).float()

    return denoise


def drawn(name, noise, n_steps, denoise, low=None, high=None):
    """20,000 pixels by a sampler, from a denoiser (x, sigma) -> x0."""
    sampler = make_sampler(name, noise, n_steps, low, high)
    g = torch.Generator().manual_seed(0)
    shape = (50, 1, 20, 20) if sampler.random else (5000, 1, 2, 2)  # a generator per image is slow
    x = torch.randn(shape, generator=g) * float(sampler.sigmas[0])
    x = x * (1 + 1 / float(sampler.sigmas[0]) ** 2) ** 0.5 if sampler.vp else x
    generators = [torch.Generator().manual_seed(i) for i in range(len(x))]
    for i, sigma in enumerate(sampler.sigmas):
        x = sampler.step(denoise(x, sigma), i, x, generators)
    return x


def used_by_profiles():
    """(sampler, parameterisation, steps, sigma range) of every profile."""
    from difflt_core import load_config

    found = set()
    for name in PROFILES:
        if name != "smoke":  # whose five steps are not meant to be right
            c = load_config(name)
            s, kind = c.sampling, c.diffusion.parameterisation
            found.add((s.sampler, kind, s.n_steps, s.sigma_min, s.sigma_max))
    return sorted(found, key=str)


@pytest.mark.parametrize("sampler, kind, n_steps, low, high", used_by_profiles())
def test_samples_of_an_exact_denoiser_have_its_mean_and_spread(sampler, kind, n_steps, low, high):
    """Of one narrow Gaussian and of a mixture like an image's light and dark: within 5 %."""
    for means, sd in (([0.2], 0.1), ([-0.8, 0.6], 0.1), ([0.0], 0.5)):
        x = drawn(sampler, NOISES[kind], n_steps, mixture_denoiser(means, sd), low, high)
        mean, spread = np.mean(means), np.sqrt(sd**2 + np.var(means))
        assert float(x.mean()) == pytest.approx(mean, abs=0.05 * max(spread, abs(mean)))
        assert float(x.std()) == pytest.approx(spread, rel=0.05)


@pytest.mark.parametrize(
    "sampler, kind, n_steps",
    [
        ("dpm++ 2m", "edm", 18),
        ("dpm++ 2m", "eps", 20),
        ("dpm++ 2m sde", "edm", 50),
        ("heun", "edm", 30),
        ("heun", "eps", 30),
        ("euler", "edm", 100),
        ("ddim", "eps", 500),
        ("ddpm", "eps", 1000),
    ],
)
def test_every_sampler_reaches_the_exact_distribution(sampler, kind, n_steps):
    for means, sd in (([0.2], 0.1), ([-0.8, 0.6], 0.1)):
        x = drawn(sampler, NOISES[kind], n_steps, mixture_denoiser(means, sd), 0.01, 80.0)
        assert float(x.mean()) == pytest.approx(np.mean(means), abs=0.05)
        spread = np.sqrt(sd**2 + np.var(means))
        assert float(x.std()) == pytest.approx(spread, rel=0.05)


def test_the_sigmas_are_those_of_karras():
    sampler = make_sampler("dpm++ 2m", EdmNoise(), 15, 0.01, 20.0)
    i = np.arange(15) / 14
    by_hand = (20 ** (1 / 7) + i * (0.01 ** (1 / 7) - 20 ** (1 / 7))) ** 7
    for name in ("dpm++ 2m", "dpm++ 2m sde", "euler"):
        sampler = make_sampler(name, EdmNoise(), 15, 0.01, 20.0)
        np.testing.assert_allclose(sampler.sigmas, by_hand, rtol=1e-4)
    heun = make_sampler("heun", EdmNoise(), 15, 0.01, 20.0)
    np.testing.assert_allclose(heun.sigmas[::2], by_hand, rtol=1e-4)
    assert len(heun.sigmas) == 29 and float(make_sampler("ddim", EpsNoise(), 4).sigmas[0]) > 150


def test_a_range_that_was_not_trained_is_refused():
    with pytest.raises(ValueError, match=r"expected 0.01\d* <= sigma_min < sigma_max <= 157"):
        make_sampler("dpm++ 2m", EpsNoise(), 5, 0.001, 80.0)
    with pytest.raises(ValueError, match="got 5 and 2"):
        make_sampler("dpm++ 2m", EdmNoise(), 5, 5.0, 2.0)


def test_noise_outside_the_training_is_refused_before_it(trained):
    p = trained.vary({"sampling.sigma_max": 200.0, "diffusion.n_steps": 10_000})
    with pytest.raises(ValueError, match="sigma_max <= 80, got 0.002 and 200"):
        p.generate()
    cosine = {"diffusion.parameterisation": "eps", "diffusion.beta_schedule": "cosine"}
    with pytest.raises(ValueError, match="sigma_max: diffusers' heun expects at most 157"):
        trained.vary({**cosine, "sampling.sampler": "heun"}).generate()


def test_a_size_that_the_network_cannot_draw_is_refused_before_phi_0(trained, monkeypatch):
    monkeypatch.setattr(Planner, "run", lambda *_: pytest.fail("trained"))
    p = trained.vary({"diffusion.preset": "small16", "data.image_size": 10})
    with pytest.raises(ValueError, match="an image size that divides by 4, got 10"):
        p.build([{}], stages=("train_extractor", "train_classifier"))


def test_guidance_needs_an_interval():
    with pytest.raises(
        ValueError, match="guidance_to: expected more than guidance_from = 2, got 1"
    ):
        SamplingConfig(guidance_from=2, guidance_to=1)


def test_what_diffusers_drops_is_an_error():
    from diffusers import DDIMScheduler

    from difflt_core.generation.sampling import _resolved

    with pytest.raises(RuntimeError, match="expected the settings .*trailing.* resolved .*leading"):
        _resolved(DDIMScheduler(), {"timestep_spacing": "trailing"})


def test_ancestral_samplers_are_of_eps_alone(tiny):
    with pytest.raises(
        ValueError, match="walks DDPM's timesteps; use it with parameterisation eps"
    ):
        vary(tiny, {"sampling.sampler": "ddim"})
    eps = {"sampling.sampler": "ddim", "diffusion.parameterisation": "eps", "sampling.n_steps": 4}
    eps = vary(tiny, eps)
    for n_steps in (1001, 300):
        with pytest.raises(ValueError, match="n_sampling_steps: ddim expects a divisor of 1000"):
            vary(eps, {"sampling.n_steps": n_steps})


@pytest.mark.parametrize(
    "sampler, kind",
    [(s, "edm") for s in ("dpm++ 2m", "dpm++ 2m sde", "euler", "heun")]
    + [(s, "eps") for s in ("dpm++ 2m", "ddim", "ddpm")],
)
def test_batch_size_and_order_change_no_image(trained, sampler, kind):
    p = trained.vary({"diffusion.parameterisation": kind})
    denoiser = denoiser_of(p)
    config = SamplingConfig(sampler=sampler, n_steps=4)
    labels, indices = np.array([0, 3, 3, 9, 9]), np.array([0, 0, 1, 0, 7])
    together = generate(denoiser, config, labels, indices, seed=5).astype(int)
    order = [4, 2, 0, 1, 3]
    alone = np.concatenate(
        [generate(denoiser, config, labels[[i]], indices[[i]], seed=5) for i in order]
    ).astype(int)
    assert (
        np.abs(together[order] - alone).max() <= 1
    )  # rounding of another batch shape, one grey level
    assert together.shape == (5, 8, 8, 1) and np.abs(together[1] - together[2]).max() > 10


class Labelled(torch.nn.Module):
    """A denoiser that shows the label as a grey: D = y / 20, the null class 10 included."""

    def __init__(self):
        super().__init__()
        self.p, self.noise, self.null, self.calls = (
            torch.nn.Parameter(torch.zeros(1)),
            EdmNoise(),
            10,
            0,
        )
        config = {"in_channels": 1, "sample_size": 2}
        self.unet = type("Unet", (), {"config": type("Config", (), config)})

    def forward(self, x, sigma, y):
        self.calls += len(x)
        return torch.zeros_like(x) + (y / 20)[:, None, None, None]


def grey(config, weak=None):
    denoiser = Labelled()
    image = generate(denoiser, config, np.array([4]), np.array([0]), 0, weak)
    return (image.astype(float).mean() / 127.5 - 1), denoiser.calls


def test_guidance_leads_away_from_the_null_class():
    plain, n_plain = grey(SamplingConfig(n_steps=5, guidance=1))
    guided, n_guided = grey(SamplingConfig(n_steps=5, guidance=2))
    assert (n_plain, n_guided) == (5, 10)
    assert plain == pytest.approx(0.2, abs=0.01)  # 4 / 20
    assert guided == pytest.approx(0.5 + 2 * (0.2 - 0.5), abs=0.01)


def test_guidance_in_an_interval_saves_calls():
    sampler = make_sampler("dpm++ 2m", EdmNoise(), 8)
    inside = int(((sampler.sigmas > 0.1) & (sampler.sigmas <= 5)).sum())
    config = SamplingConfig(n_steps=8, guidance=2, guidance_from=0.1, guidance_to=5)
    image, calls = grey(config)
    assert 0 < inside < 8 and calls == 8 + inside
    assert image == pytest.approx(0.2, abs=0.01)  # the last steps are not guided


def test_autoguidance_leads_away_from_the_earlier_network():
    class Weak(Labelled):
        def forward(self, x, sigma, y):
            return super().forward(x, sigma, y) + 0.1

    image, calls = grey(SamplingConfig(n_steps=5, guidance=2), Weak())
    assert image == pytest.approx(0.3 + 2 * (0.2 - 0.3), abs=0.01) and calls == 5


def test_autoguidance_takes_the_plain_part(trained):
    with pytest.raises(
        ValueError, match="guide: earlier takes the network at the end of the plain"
    ):
        trained.vary({"sampling.guide": "earlier"})
    p = trained.vary({"diffusion.plain_share": 0.5, "diffusion.schedule": "trapezoid"})
    q = p.vary({"sampling.guide": "earlier"})
    a, b = (v.generate().array("images").astype(int) for v in (p, q))
    assert a.shape == b.shape and np.abs(a - b).max() > 1


def test_quality_is_measured_on_a_balanced_draw_of_its_own(trained):
    p = trained.vary({"metrics.n_per_class": 3})
    measured, filled = p.quality_samples(), p.generate()
    labels = np.asarray(measured.array("labels"))
    assert np.bincount(labels).tolist() == [3] * 10
    mine, others = (
        a.array("images")[np.asarray(a.array("labels")) == 9] for a in (measured, filled)
    )
    assert not any((image == other).all() for image in mine for other in others)


class _Killed(Exception):
    pass


def test_generation_continues_after_a_kill(trained, tmp_path, monkeypatch):
    config = {
        "sampling": trained.config.sampling.model_dump() | {"batch_size": 50},
        "diffusion": trained.config.diffusion.model_dump(),
        "seed": 0,
    }
    inputs = {"data": trained.data(), "diffusion": trained.train_diffusion()}
    drawn = []

    def dying(*args):
        if len(drawn) == 3:
            raise _Killed
        drawn.append(args[3])
        return generate(*args)

    (tmp_path / "out").mkdir()
    monkeypatch.setattr("difflt_core.generation.sampling.generate", dying)
    with pytest.raises(_Killed):
        build_samples(tmp_path, config, inputs, trained.store.context)
    monkeypatch.setattr(
        "difflt_core.generation.sampling.generate", lambda *a: drawn.append(a[3]) or generate(*a)
    )
    build_samples(tmp_path, config, inputs, trained.store.context)
    whole = trained.generate().array("images")
    assert sum(map(len, drawn)) == len(whole)  # nothing was drawn twice
    assert (
        np.abs(np.load(tmp_path / "out" / "images.npy").astype(int) - whole.astype(int)).max() <= 1
    )


def test_another_seed_gives_other_images(trained):
    denoiser, config = denoiser_of(trained), SamplingConfig(n_steps=3)
    labels, indices = np.array([0, 9]), np.array([0, 0])
    first, again, other = (generate(denoiser, config, labels, indices, s) for s in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_images_that_do_not_fit_at_once_are_drawn_in_parts(trained, monkeypatch):
    changes = {"sampling.n_steps": 2, "sampling.fill_to": 45, "sampling.batch_size": 16}
    whole, sizes = trained.vary(changes).generate().array("images").astype(int), []

    def little_memory(denoiser, config, labels, *rest):
        if len(labels) > 5:
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
        sizes.append(len(labels))
        return generate(denoiser, config, labels, *rest)

    monkeypatch.setattr(sampling, "generate", little_memory)
    again = trained.vary({**changes, "sampling.batch_size": 17})  # another key
    with pytest.warns(UserWarning, match="going on with 4"):
        parts = again.generate().array("images").astype(int)
    assert np.abs(parts - whole).max() <= 1 and max(sizes) == 4
    monkeypatch.setattr(sampling, "generate", lambda *_: little_memory(None, None, range(6)))
    with (
        pytest.warns(UserWarning),
        pytest.raises(MemoryError, match="sampling.batch_size: a batch"),
    ):
        trained.vary({**changes, "sampling.batch_size": 18}).generate()


def test_a_thousand_images_with_batches_of_7_and_of_256(trained):
    """The noise is the same exactly; another batch shape may round one grey level differently."""
    few, many = (
        trained.vary({"sampling.batch_size": b, "sampling.n_steps": 2, "sampling.fill_to": 125})
        for b in (7, 256)
    )
    a, b = (p.generate().array("images").astype(int) for p in (few, many))
    assert len(a) > 1000 and np.abs(a - b).max() <= 1
