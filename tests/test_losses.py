"""Each loss against an independent float64 formula: values and gradients."""

import numpy as np
import pytest
import torch

from difflt_core.config import DiffusionConfig
from difflt_core.diffusion import aid_loss, cbdm_loss, drop_labels, make_schedule, predict_x0
from difflt_core.methods import weighted_cross_entropy
from difflt_core.seeding import generator


def test_cbdm_value_and_gradients():
    rng = np.random.default_rng(0)
    h, g = rng.normal(size=(2, 5, 1, 3, 3))
    t, tau, T = np.array([0, 1, 500, 998, 999]), 0.7, 1000
    ht, gt = (torch.tensor(a, requires_grad=True) for a in (h, g))
    loss = cbdm_loss(ht, gt, torch.tensor(t), tau, T)
    loss.backward()
    w = (tau * t / T).reshape(5, 1, 1, 1)
    delta, n = h - g, h.size
    assert loss.item() == pytest.approx((w * delta**2).mean() * 1.25, rel=1e-12)
    # Stop-gradients: h moves by the first term alone, h' by a quarter of it (PEERS.md section 3).
    np.testing.assert_allclose(ht.grad, 2 * w * delta / n, rtol=1e-12)
    np.testing.assert_allclose(gt.grad, -0.25 * 2 * w * delta / n, rtol=1e-12)


def test_cbdm_leaves_out_dropped_labels():
    h, g = torch.randn(2, 4, 1, 2, 2, dtype=torch.float64, generator=generator(0)).unbind(0)
    t = torch.full((4,), 500)
    active = torch.tensor([True, False, True, False])
    kept = cbdm_loss(h[active], g[active], t[active], 1.0, 1000)
    assert cbdm_loss(h, g, t, 1.0, 1000, active).item() == pytest.approx(kept.item() / 2)


def test_aid_hinge_value_and_gradient():
    d = torch.tensor([0.25, 1.0, 1.5, 2.0, 3.5], dtype=torch.float64, requires_grad=True)
    loss = aid_loss(d)
    loss.backward()
    assert loss.item() == pytest.approx((0.75 + 1.5) / 5)
    np.testing.assert_allclose(d.grad[[0, 2, 4]], [-0.2, 0.0, 0.2])


def test_aid_of_no_sample_is_zero_and_differentiable():
    d = torch.zeros(0, requires_grad=True)
    loss = aid_loss(d)
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize("normalise", [True, False])
def test_weighted_cross_entropy(normalise):
    rng = np.random.default_rng(1)
    logits, y, w = (
        rng.normal(size=(6, 4)),
        np.array([0, 1, 2, 3, 0, 1]),
        np.array([1, 0.3, 1, 0.3, 0.3, 1]),
    )
    loss = weighted_cross_entropy(torch.tensor(logits), torch.tensor(y), torch.tensor(w), normalise)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = (-log_p[np.arange(6), y] * w).sum() / (w.sum() if normalise else 6)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_x0_of_the_true_noise_is_the_image():
    schedule = make_schedule(DiffusionConfig())
    x0, eps = torch.randn(2, 7, 1, 4, 4, generator=generator(2)).unbind(0)
    t = torch.tensor([0, 10, 100, 250, 400, 600, 900])
    xt = schedule.add_noise(x0, eps, t)
    torch.testing.assert_close(
        predict_x0(xt, eps, schedule.alphas_cumprod[t]), x0, atol=1e-3, rtol=1e-3
    )


def test_linear_schedule_is_the_papers():
    alpha_bar = make_schedule(DiffusionConfig()).alphas_cumprod
    expected = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    np.testing.assert_allclose(alpha_bar.double(), expected, rtol=1e-4)
    assert (alpha_bar > 0.5).sum() == (expected > 0.5).sum()


def test_label_dropout_is_per_sample():
    y = torch.zeros(20000, dtype=torch.int64)
    dropped = drop_labels(y, 0.1, 10, generator(3)) == 10
    assert 0.09 < dropped.float().mean() < 0.11
    assert not torch.equal(drop_labels(y, 0.1, 10, generator(4)) == 10, dropped)
