"""Noise levels and the denoiser: the two parameterisations against the formulas of their papers."""

import math

import numpy as np
import pytest
import torch

from difflt_core.config import DiffusionConfig
from difflt_core.engine.seeding import generator
from difflt_core.generation.network import Denoiser
from difflt_core.generation.noise import EdmNoise, EpsNoise, make_noise

EDM, EPS = EdmNoise(), EpsNoise()


def test_edm_scalings_are_the_papers():
    sigma, s = torch.tensor([0.05, 0.5, 4.0]), 0.5
    c_skip, c_out, c_in, c_noise = EDM.scalings(sigma)
    for i, v in enumerate(sigma.tolist()):
        assert c_skip[i] == pytest.approx(s**2 / (v**2 + s**2))
        assert c_out[i] == pytest.approx(v * s / math.sqrt(v**2 + s**2))
        assert c_in[i] == pytest.approx(1 / math.sqrt(v**2 + s**2))
        assert c_noise[i] == pytest.approx((math.log(v) + 6) * 100, rel=1e-5)
        assert EDM.weight(sigma)[i] == pytest.approx((v**2 + s**2) / (v * s) ** 2)
    torch.testing.assert_close(EDM.weight(sigma) * c_out**2, torch.ones(3))


def test_edm_draws_its_distribution():
    sigma = EDM.draw(20_000, generator(0))
    assert sigma.log().mean() == pytest.approx(-1.2, abs=0.03)
    assert sigma.log().std() == pytest.approx(1.2, abs=0.03)
    u = EDM.quantile(sigma)
    np.testing.assert_allclose(np.quantile(u, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.01)


def test_eps_has_ddpms_schedule():
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    np.testing.assert_allclose(EPS.sigmas, np.sqrt((1 - alpha_bar) / alpha_bar), rtol=1e-3)
    assert EPS.sigma_min == pytest.approx(0.01, rel=1e-3)
    assert EPS.sigma_max == pytest.approx(157, rel=0.01)
    cosine = EpsNoise(1000, "cosine").sigmas
    assert not torch.equal(cosine, EPS.sigmas)


def test_eps_timesteps_are_exact_on_the_schedule_and_between():
    t = torch.arange(1000)
    assert torch.equal(EPS.timestep(EPS.sigmas), t.float())
    between = EPS.timestep((EPS.sigmas[:-1] * EPS.sigmas[1:]).sqrt())
    torch.testing.assert_close(between, t[:-1] + 0.5, atol=1e-2, rtol=0)
    assert EPS.quantile(EPS.sigmas[[250]]).item() == 0.25


def test_eps_draws_every_timestep_alike():
    t = EPS.timestep(EPS.draw(50_000, generator(1)))
    assert t.min() < 5 and t.max() > 994 and t.mean() == pytest.approx(499.5, abs=4)


class Fake(torch.nn.Module):
    """F(input, c_noise, y) = 0.2 input + 0.01 c_noise + y, and a record of what it was given."""

    def forward(self, x, c_noise, y, return_dict):
        self.seen = x, c_noise, y
        shift = (0.01 * c_noise + y)[:, None, None, None]
        return (0.2 * x + shift,)


def test_the_denoiser_of_eps_is_ddpms_predicted_image():
    """x0_pred = (x_t - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar), and the network sees x_t and t."""
    t, y = torch.tensor([3, 400, 900]), torch.tensor([0, 1, 2])
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[t][:, None, None, None]
    x0, eps = torch.randn(2, 3, 1, 4, 4, generator=generator(2)).double().unbind(0)
    xt = np.sqrt(alpha_bar) * x0.numpy() + np.sqrt(1 - alpha_bar) * eps.numpy()
    unet, sigma = Fake(), EPS.sigmas[t]
    d = Denoiser(unet, EPS)((x0 + sigma[:, None, None, None] * eps).float(), sigma, y)
    seen, c_noise, labels = unet.seen
    np.testing.assert_allclose(seen, xt, atol=2e-4)
    assert torch.equal(c_noise, t.float()) and torch.equal(labels, y)
    predicted = 0.2 * xt + (0.01 * t + y).numpy()[:, None, None, None]
    expected = (xt - np.sqrt(1 - alpha_bar) * predicted) / np.sqrt(alpha_bar)
    np.testing.assert_allclose(d, expected, rtol=2e-3, atol=2e-3)


def test_at_no_noise_edm_returns_the_image_and_in_much_noise_ignores_it():
    x, y = torch.randn(2, 1, 4, 4, generator=generator(3)), torch.zeros(2, dtype=torch.int64)
    near = Denoiser(Fake(), EDM)(x, torch.full((2,), 1e-4), y)
    torch.testing.assert_close(near, x, atol=1e-2, rtol=1e-2)
    c_skip = EDM.scalings(torch.tensor([80.0])).c_skip
    assert float(c_skip) < 1e-4


def test_the_table_of_sigmas_is_ready_before_anything_is_compiled():
    """A compiled step reads it where it is: it copies nothing."""
    noise, sigma = EpsNoise(), torch.tensor([0.1, 1.0, 10.0])
    noise.ready("cpu")
    there = noise._sigmas_on(torch.device("cpu"))
    fast = torch.compile(noise.scalings, backend="eager", fullgraph=True, dynamic=False)
    assert torch.equal(fast(sigma).c_noise, EpsNoise().scalings(sigma).c_noise)
    assert noise._sigmas_on(torch.device("cpu")) is there


def test_the_configuration_chooses_by_name():
    assert make_noise(DiffusionConfig(edm_std=1.0)) == EdmNoise(std=1.0)
    assert make_noise(DiffusionConfig(parameterisation="eps", n_timesteps=50)) == EpsNoise(50)
    with pytest.raises(ValueError, match="'edm' or 'eps'"):
        DiffusionConfig(parameterisation="vp")
