"""Losses of the compared methods against plain float64 loops and the hand-checked numbers of
docs/protocol.md."""

import copy

import numpy as np
import pytest
import torch

from difflt_core.config import ClassifierConfig
from difflt_core.data.long_tail import class_sizes
from difflt_core.recognition.losses import (
    balanced_softmax_loss,
    class_balanced_weights,
    gpaco_loss,
    ldam_loss,
    ldam_margins,
    log_prior,
    paco_loss,
    ride_loss,
    ride_temperatures,
    weighted_cross_entropy,
)
from difflt_core.recognition.methods import heads_of, make_objective
from difflt_core.recognition.networks import make_backbone

C10, C100 = class_sizes(10, 5000, 100), class_sizes(100, 500, 100)
C10_200, C100_200 = class_sizes(10, 5000, 200), class_sizes(100, 500, 200)


@pytest.mark.parametrize(
    "counts, head, tail",
    [
        (C10, 0.0506114, 3.9927238),
        (C100, 0.0448757, 4.3783126),
        (C10_200, 0.0281705, 4.4391900),
        (C100_200, 0.0237207, 5.7849240),
    ],
)
def test_class_balanced_weights(counts, head, tail):
    w = class_balanced_weights(counts)
    assert (w[0].item(), w[-1].item()) == pytest.approx((head, tail), abs=6e-8)
    assert w.sum().item() == pytest.approx(len(counts))
    assert class_balanced_weights(counts, beta=0).tolist() == [1] * len(counts)


@pytest.mark.parametrize(
    "counts, head",
    [(C10, 0.1581139), (C100, 0.1581139), (C10_200, 0.1329574), (C100_200, 0.1257433)],
)
def test_ldam_margins(counts, head):
    m = ldam_margins(counts)
    assert (m[0].item(), m[-1].item()) == pytest.approx((head, 0.5), abs=6e-8)


@pytest.mark.parametrize(
    "counts, head, tail", [(C10, -0.9087423, -5.5139125), (C100, -3.0770357, -7.6822059)]
)
def test_log_prior(counts, head, tail):
    p = log_prior(counts)
    assert (p[0].item(), p[-1].item()) == pytest.approx((head, tail), abs=6e-8)


@pytest.mark.parametrize(
    "counts, tail, mean", [(C100, 0.8067108, 0.8471141), (C10, 0.8267498, 0.8684209)]
)
def test_ride_temperatures(counts, tail, mean):
    T = ride_temperatures(counts)
    assert (T[0].item(), T[-1].item()) == pytest.approx((1, tail), abs=6e-8)
    assert T.mean().item() == pytest.approx(mean, abs=6e-8)


RNG = np.random.default_rng(0)
B, K, D, Q = 6, 4, 5, 7
COUNTS = [100, 30, 9, 3]
Y = np.array([0, 0, 1, 3, 2, 0])
W = np.array([1, 0.3, 1, 0.3, 0.3, 1.0])


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def tensors(*arrays):
    return [torch.from_numpy(np.asarray(a)) for a in arrays]


@pytest.mark.parametrize("normalise", [True, False])
def test_balanced_softmax(normalise):
    logits = RNG.normal(size=(B, K))
    by_hand = [-np.log(softmax(f + np.log(COUNTS))[c]) for f, c in zip(logits, Y, strict=True)]
    divisor = W.sum() if normalise else B
    f, y, w = tensors(logits, Y, W)
    loss = balanced_softmax_loss(f, y, COUNTS, w, normalise)
    assert loss.item() == pytest.approx(np.dot(W, by_hand) / divisor, rel=1e-12)
    assert balanced_softmax_loss(f, y, COUNTS).item() == pytest.approx(np.mean(by_hand), rel=1e-12)


def test_ldam_with_drw_and_omega():
    cos = np.tanh(RNG.normal(size=(B, K)))
    m = 0.5 * np.array(COUNTS) ** -0.25 / (3**-0.25)
    class_w = RNG.uniform(0.1, 3, size=K)
    by_hand = []
    for z, c in zip(cos, Y, strict=True):
        z = z.copy()
        z[c] -= m[c]
        by_hand.append(-np.log(softmax(30 * z)[c]))
    f, y, w, cw = tensors(cos, Y, W, class_w)
    both = W * class_w[Y]
    loss = ldam_loss(f, y, ldam_margins(COUNTS), 30.0, cw, w)
    assert loss.item() == pytest.approx(np.dot(both, by_hand) / both.sum(), rel=1e-12)
    assert ldam_loss(f, y, ldam_margins(COUNTS)).item() == pytest.approx(
        np.mean(by_hand), rel=1e-12
    )


def paco_by_hand(anchors, y, logits, contrast, contrast_y, own, alpha, beta, gamma, T):
    prior = np.log(np.array(COUNTS) / sum(COUNTS))
    losses = []
    for i in range(len(y)):
        g = logits[i] + prior
        members = [a for a in range(len(contrast)) if a != own[i]]
        s = {a: anchors[i] @ contrast[a] / T for a in members}
        log_z = np.log(np.exp(g).sum() + gamma * sum(np.exp(v) for v in s.values()))
        positive = [a for a in members if contrast_y[a] == y[i]]
        total = beta * (g[y[i]] - log_z) + alpha * sum(s[a] - log_z for a in positive)
        losses.append(-total / (beta + alpha * len(positive)))
    return losses


def test_paco():
    q, k, queue = (unit(RNG.normal(size=(n, D))) for n in (B, B, Q))
    logits, queue_y = RNG.normal(size=(B, K)), RNG.integers(0, K, Q)
    contrast, contrast_y = np.concatenate([q, k, queue]), np.concatenate([Y, Y, queue_y])
    own = np.arange(B)
    by_hand = paco_by_hand(q, Y, logits, contrast, contrast_y, own, 0.05, 0.9, 0.7, 0.2)
    arguments = tensors(q, logits, contrast, contrast_y, Y)
    arguments += [log_prior(COUNTS), torch.arange(B), 0.05, 0.9, 0.7, 0.2]
    assert paco_loss(*arguments).item() == pytest.approx(np.mean(by_hand), rel=1e-12)
    weighted = paco_loss(*arguments, torch.from_numpy(W)).item()
    assert weighted == pytest.approx(np.dot(W, by_hand) / W.sum(), rel=1e-12)


def test_gpaco_normalises_each_view_for_itself():
    """As the authors' two forwards do, running statistics included."""
    torch.manual_seed(0)
    net = make_backbone("small_cnn", K, 1, 8)
    plain = copy.deepcopy(net).train()
    recipe = ClassifierConfig(method="gpaco", queue_size=Q, batch_size=6)
    objective = make_objective(recipe, net, COUNTS).train()
    views, y = [torch.randn(6, 1, 8, 8), 3 * torch.randn(6, 1, 8, 8)], torch.arange(6) % K
    objective(views, y, torch.ones(6), 0)
    for view in views:
        plain.features(view)
    for (name, a), b in zip(net.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_gpaco_uses_both_views_as_anchors():
    a, b, queue = (unit(RNG.normal(size=(n, D))) for n in (B, B, Q))
    la, lb, queue_y = RNG.normal(size=(B, K)), RNG.normal(size=(B, K)), RNG.integers(0, K, Q)
    anchors, y2 = np.concatenate([a, b]), np.concatenate([Y, Y])
    by_hand = paco_by_hand(
        anchors, y2, np.concatenate([la, lb]), np.concatenate([anchors, queue]),
        np.concatenate([y2, queue_y]), np.arange(2 * B), 0.05, 0.9, 0.7, 0.2,
    )  # fmt: skip
    va, vb, *rest = tensors(a, b, la, lb, queue, queue_y, Y)
    va.requires_grad_(), vb.requires_grad_()
    arguments = (va, vb, *rest, log_prior(COUNTS), 0.05, 0.9, 0.7, 0.2)
    loss = gpaco_loss(*arguments)
    loss.backward()
    assert loss.item() == pytest.approx(np.mean(by_hand), rel=1e-12)
    both = np.concatenate([W, W])  # an image weighs as much in either view
    weighted = gpaco_loss(*arguments, torch.from_numpy(W)).item()
    assert weighted == pytest.approx(np.dot(both, by_hand) / both.sum(), rel=1e-12)
    assert va.grad.abs().sum() > 0 and vb.grad.abs().sum() > 0


@pytest.mark.parametrize("after_drw", [False, True])
def test_ride(after_drw):
    E, diversity = 3, -0.45
    f = RNG.normal(size=(E, B, K)) * 5
    T = np.ones(K)
    class_w = np.ones(K)
    if after_drw:
        u = K * np.array(COUNTS) / sum(COUNTS) * 0.05 + 0.95
        T, class_w = u / u.max(), class_balanced_weights(COUNTS).numpy()
    m = 0.5 * np.array(COUNTS) ** -0.25 / (3**-0.25)
    total = 0
    for k in range(E):
        ce, kl = [], []
        for i, c in enumerate(Y):
            z = f[k, i].copy()
            z[c] -= 30 * m[c]
            ce.append(-np.log(softmax(z)[c]))
            p, q = softmax(f[:, i].mean(0) / T), softmax(f[k, i] / T)
            kl.append((p * np.log(p / q)).sum())
        total += np.dot(class_w[Y], ce) / class_w[Y].sum()
        total += diversity * T.mean() ** 2 * np.mean(kl)
    options = {}
    if after_drw:
        options = {
            "temperatures": ride_temperatures(COUNTS),
            "class_weights": torch.from_numpy(class_w),
        }
    logits, y = tensors(f, Y)
    loss = ride_loss(logits, y, ldam_margins(COUNTS), diversity, **options)
    assert loss.item() == pytest.approx(total, rel=1e-10)


@pytest.mark.parametrize("step", [7, 8])  # of 10: deferred re-weighting begins at 8
def test_each_method_asks_for_its_own_loss(step):
    late, (y, w) = step >= 8, (torch.from_numpy(Y), torch.from_numpy(W))
    logits, of_experts = torch.randn(B, K).double(), torch.randn(3, B, K).double()
    of_class, margins = class_balanced_weights(COUNTS), ldam_margins(COUNTS)
    in_ride = {"temperatures": ride_temperatures(COUNTS), "class_weights": of_class}

    def by_hand(method, logits, y, w):
        return {
            "ce": lambda: weighted_cross_entropy(logits, y, w),
            "cb": lambda: weighted_cross_entropy(logits, y, w * of_class[y]),
            "bsce": lambda: balanced_softmax_loss(logits, y, COUNTS, w),
            "ldam": lambda: ldam_loss(logits / 30, y, margins, 30.0, of_class if late else None, w),
            "ride": lambda: ride_loss(
                logits, y, margins, -0.45, weights=w, **(in_ride if late else {})
            ),
        }[method]()

    for method in ("ce", "cb", "bsce", "ldam", "ride"):
        recipe = ClassifierConfig(method=method, n_steps=10)
        net = make_backbone("small_cnn", K, 1, 4, **heads_of(recipe))
        objective, f = make_objective(recipe, net, COUNTS), logits
        if method == "ride":
            f = of_experts
        objective.predict = lambda _, f=f: f
        plain, mixed = (objective([None], y, w, step, lam) for lam in (1.0, 0.7))
        wanted = by_hand(method, f, y, w)
        torch.testing.assert_close(plain, wanted, rtol=1e-6, atol=0, msg=method)
        other = by_hand(method, f, y.roll(1), w.roll(1))
        torch.testing.assert_close(mixed, 0.7 * wanted + 0.3 * other, rtol=1e-6, atol=0, msg=method)


def test_pacos_keys_follow_slowly_and_the_queue_takes_them():
    torch.manual_seed(0)
    net = make_backbone("small_cnn", K, 1, 4)
    recipe = ClassifierConfig(method="paco", queue_size=8, batch_size=B)
    objective = make_objective(recipe, net, COUNTS).train()
    before, queue = [p.clone() for p in objective.keys.parameters()], objective.queue.clone()
    mine = [*net.parameters(), *objective.projector.parameters()]
    with torch.no_grad():
        for p in mine:
            p += 1
    y = torch.from_numpy(Y)
    objective([torch.randn(B, 1, 8, 8) for _ in range(2)], y, torch.ones(B), step=1)
    for key, old, p in zip(objective.keys.parameters(), before, mine, strict=True):
        torch.testing.assert_close(key, old + 0.001 * (p - old))
    rows = [6, 7, 0, 1, 2, 3]  # the second batch of six in a queue of eight
    assert objective.queue_y[rows].tolist() == Y.tolist()
    changed = (objective.queue != queue).any(dim=1)
    assert changed.nonzero().flatten().tolist() == sorted(rows)
