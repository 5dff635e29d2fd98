"""Each loss against an independent float64 formula: values and gradients."""

import numpy as np
import pytest
import torch

from difflt_core.engine.seeding import generator
from difflt_core.generation.losses import (
    aid_loss,
    class_balancing_loss,
    class_balancing_weight,
    denoising_loss,
    squared_aid_loss,
)
from difflt_core.generation.noise import EdmNoise, EpsNoise
from difflt_core.generation.training import drop_labels
from difflt_core.recognition.losses import weighted_cross_entropy


def test_the_denoising_loss_is_the_squared_error_of_eps():
    rng = np.random.default_rng(3)
    x0, eps, eps_pred = rng.normal(size=(3, 4, 1, 2, 2))
    sigma = np.array([0.02, 0.3, 1.0, 50.0])
    x = x0 + sigma.reshape(4, 1, 1, 1) * eps
    d = torch.tensor(x - sigma.reshape(4, 1, 1, 1) * eps_pred)
    weight = EpsNoise().weight(torch.tensor(sigma))
    loss = denoising_loss(d, torch.tensor(x0), weight).item()
    assert loss == pytest.approx(np.mean((eps - eps_pred) ** 2), rel=1e-9)


def test_class_balancing_value_and_gradients():
    rng = np.random.default_rng(0)
    h, g = rng.normal(size=(2, 5, 1, 3, 3))
    w = rng.uniform(size=5)
    ht, gt = (torch.tensor(a, requires_grad=True) for a in (h, g))
    loss = class_balancing_loss(ht, gt, torch.tensor(w))
    loss.backward()
    w, delta, n = w.reshape(5, 1, 1, 1), h - g, h.size
    assert loss.item() == pytest.approx((w * delta**2).mean() * 1.25, rel=1e-12)
    # Stop-gradients: h moves by the first term alone, h' by a quarter of it (docs/protocol.md, CBDM).
    np.testing.assert_allclose(ht.grad, 2 * w * delta / n, rtol=1e-12)
    np.testing.assert_allclose(gt.grad, -0.25 * 2 * w * delta / n, rtol=1e-12)


def test_class_balancing_is_cbdms_formula_in_eps():
    """tau (t / T) |eps - eps'|^2, from denoised images."""
    noise, tau, t = EpsNoise(), 0.7, torch.tensor([1, 500, 999])
    sigma = noise.sigmas[t].double()
    e, e_other = torch.randn(2, 3, 1, 2, 2, dtype=torch.float64, generator=generator(5)).unbind(0)
    d, d_other = (-sigma[:, None, None, None] * v for v in (e, e_other))  # x cancels out
    by_hand = 1.25 * (tau * t[:, None, None, None] / 1000 * (e - e_other).square()).mean()
    for kind in ("lambda", "eps"):
        weight = class_balancing_weight(noise, sigma, tau, kind)
        loss = class_balancing_loss(d, d_other, weight)
        assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_class_balancing_weights_of_edm():
    sigma = torch.tensor([0.05, 0.30119, 3.0])  # the second is the median, exp(-1.2)
    noise = EdmNoise()
    natural = class_balancing_weight(noise, sigma, 2.0, "lambda")
    torch.testing.assert_close(natural, 2 * noise.quantile(sigma) * noise.weight(sigma))
    assert noise.quantile(sigma)[1] == pytest.approx(0.5, abs=1e-4)
    eps = class_balancing_weight(noise, sigma, 2.0, "eps")
    torch.testing.assert_close(eps, 2 * noise.quantile(sigma) / sigma**2)


def test_class_balancing_leaves_out_dropped_labels():
    h, g = torch.randn(2, 4, 1, 2, 2, dtype=torch.float64, generator=generator(0)).unbind(0)
    active = torch.tensor([True, False, True, False])
    kept = class_balancing_loss(h[active], g[active], torch.ones(2))
    assert class_balancing_loss(h, g, active.double()).item() == pytest.approx(kept.item() / 2)


def test_aid_hinge_value_and_gradient():
    d = torch.tensor([0.25, 1.0, 1.5, 2.0, 3.5], dtype=torch.float64, requires_grad=True)
    loss = aid_loss(d)
    loss.backward()
    assert loss.item() == pytest.approx((0.75 + 1.5) / 5)
    np.testing.assert_allclose(d.grad[[0, 2, 4]], [-0.2, 0.0, 0.2])


def test_the_squared_aid_loss_is_the_formula():
    d = torch.tensor([0.25, 1.0, 1.5, 2.0, 3.5], dtype=torch.float64)
    assert squared_aid_loss(d).item() == pytest.approx((0.75**2 + 1.5**2) / 5)
    assert squared_aid_loss(d, 3.0, weight=(d > 3).double()).item() == pytest.approx(0.25)


def test_aid_counts_what_is_weighted_and_divides_by_what_is_asked():
    d, weight = torch.tensor([0.0, 5.0, 3.0]), torch.tensor([1.0, 0.0, 1.0])
    assert aid_loss(d, weight=weight).item() == pytest.approx((1 + 1) / 2)
    assert aid_loss(d, weight=weight, total=8).item() == pytest.approx(2 / 8)
    assert aid_loss(d, weight=torch.zeros(3), total=torch.tensor(0.0)).item() == 0


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


def test_label_dropout_is_per_sample():
    y = torch.zeros(20000, dtype=torch.int64)
    dropped = drop_labels(y, 0.1, 10, generator(3)) == 10
    assert 0.09 < dropped.float().mean() < 0.11
    assert not torch.equal(drop_labels(y, 0.1, 10, generator(4)) == 10, dropped)
