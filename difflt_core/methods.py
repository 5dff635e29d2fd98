"""Losses of the methods that DiffuLT is compared and combined with (PEERS.md section 2).

Symbols: logits (B, K) float, y (B,) int64, class_counts (K,), weights (B,) float: 1 for a real
image, omega for a generated one, None for all ones. Every loss is a weighted mean over the batch,
divided by the sum of weights unless normalise is False (then by B).
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from .config import ClassifierConfig

__all__ = [
    "OBJECTIVES",
    "balanced_softmax_loss",
    "class_balanced_weights",
    "gpaco_loss",
    "heads_of",
    "ldam_loss",
    "ldam_margins",
    "log_prior",
    "make_objective",
    "paco_loss",
    "ride_loss",
    "ride_temperatures",
    "weighted_cross_entropy",
    "weighted_mean",
]


def weighted_mean(losses, weights=None, normalise: bool = True) -> torch.Tensor:
    """sum(w * l) / sum(w), or / B when normalise is False. losses: (B,)."""
    if weights is None:
        return losses.mean()
    total = (weights * losses).sum()
    return total / (weights.sum().clamp_min(1e-12) if normalise else len(losses))


def weighted_cross_entropy(logits, y, weights=None, normalise: bool = True) -> torch.Tensor:
    """Cross-entropy with a weight per image (PAPER.md section 1, step 5).

    Args:
        logits: float (B, K). y: int64 (B,). weights: float (B,), 1 for real images and omega for
            generated ones.
        normalise: divide by the sum of weights (as torch's weighted mean does), else by B.
    """
    return weighted_mean(F.cross_entropy(logits, y, reduction="none"), weights, normalise)


def class_balanced_weights(class_counts, beta: float = 0.9999) -> torch.Tensor:
    """float64 (K,): (1 - beta) / (1 - beta^n_c), rescaled to sum to K (Cui et al., CVPR 2019).

    Args:
        beta: 0 gives ones, as DRW has it before its second phase.
    """
    n = torch.as_tensor(class_counts, dtype=torch.float64)
    w = (1 - beta) / (1 - beta**n)
    return w * len(n) / w.sum()


def log_prior(class_counts) -> torch.Tensor:
    """log(n_c / N), float64 (K,)."""
    n = torch.as_tensor(class_counts, dtype=torch.float64)
    return (n / n.sum()).log()


def balanced_softmax_loss(logits, y, class_counts, weights=None, normalise=True) -> torch.Tensor:
    """BSCE: cross-entropy of logits + log n_c (Ren et al., NeurIPS 2020). Testing uses logits alone."""
    prior = log_prior(class_counts).to(logits)
    return weighted_cross_entropy(logits + prior, y, weights, normalise)


def ldam_margins(class_counts, largest: float = 0.5) -> torch.Tensor:
    """float64 (K,): proportional to n_c^(-1/4), `largest` for the rarest class (Cao et al., 2019)."""
    m = torch.as_tensor(class_counts, dtype=torch.float64) ** -0.25
    return largest * m / m.max()


def ldam_loss(
    cosines, y, margins, scale: float = 30.0, class_weights=None, weights=None, normalise=True
) -> torch.Tensor:
    """Cross-entropy of scale * (cos - m_y e_y), weighted by class (DRW) and by image.

    Args:
        cosines: (B, K) of unit features and unit class vectors. margins: (K,), from ldam_margins.
        class_weights: (K,) or None before DRW's second phase.
    """
    shifted = cosines - F.one_hot(y, cosines.shape[1]) * margins.to(cosines)[y][:, None]
    if class_weights is not None:
        w = class_weights.to(cosines)[y]
        weights = w if weights is None else w * weights
    return weighted_cross_entropy(scale * shifted, y, weights, normalise)


def paco_loss(
    features, class_logits, contrast, contrast_y, y, prior, own,
    alpha: float = 0.01, beta: float = 1.0, gamma: float = 1.0, temperature: float = 0.05,
    weights=None, normalise=True,
) -> torch.Tensor:  # fmt: skip
    """Parametric contrastive loss (Cui et al., ICCV 2021; PEERS.md 2.4).

    Args:
        features: unit anchors (A, D). class_logits: (A, K), of the pooled backbone feature.
        contrast: unit vectors (M, D) that anchors are compared with. contrast_y: (M,).
        y: labels of the anchors (A,). prior: log prior (K,), added to class_logits in training.
        own: (A,) index of an anchor's own entry in contrast, which is left out; -1 for none.
        weights: (A,), per anchor.
    """
    g = class_logits + prior.to(class_logits)  # (A, K)
    s = features @ contrast.T / temperature  # (A, M)
    counted = torch.ones_like(s, dtype=torch.bool)
    rows = torch.arange(len(y), device=y.device)[own >= 0]
    counted[rows, own[own >= 0]] = False
    positive = (contrast_y[None, :] == y[:, None]) & counted  # (A, M)
    log_gamma = torch.log(torch.tensor(gamma, dtype=s.dtype, device=s.device))
    terms = torch.cat([g, (s + log_gamma).masked_fill(~counted, float("-inf"))], dim=1)
    log_z = torch.logsumexp(terms, dim=1)  # (A,)
    centre = g.gather(1, y[:, None])[:, 0] - log_z
    pairs = ((s - log_z[:, None]) * positive).sum(dim=1)
    losses = -(beta * centre + alpha * pairs) / (beta + alpha * positive.sum(dim=1).to(s))
    return weighted_mean(losses, weights, normalise)


def gpaco_loss(
    view1, view2, logits1, logits2, queue, queue_y, y, prior,
    alpha: float = 0.01, beta: float = 1.0, gamma: float = 1.0, temperature: float = 0.05,
    weights=None, normalise=True,
) -> torch.Tensor:  # fmt: skip
    """Generalised PaCo (Cui et al., TPAMI 2023; PEERS.md 2.5): both views are anchors, with gradient.

    Args:
        view1, view2: unit projections (B, D) of the two views. logits1, logits2: (B, K).
        queue: detached unit vectors (Q, D) of earlier steps. queue_y: (Q,).
    """
    anchors, both_y = torch.cat([view1, view2]), torch.cat([y, y])
    return paco_loss(
        anchors, torch.cat([logits1, logits2]), torch.cat([anchors, queue]),
        torch.cat([both_y, queue_y]), both_y, prior, torch.arange(len(both_y), device=y.device),
        alpha, beta, gamma, temperature,
        None if weights is None else torch.cat([weights, weights]), normalise,
    )  # fmt: skip


def ride_temperatures(class_counts, rho: float = 0.05) -> torch.Tensor:
    """Per-class temperature of RIDE's diversity term after the DRW epoch, float64 (K,), 1 at most."""
    n = torch.as_tensor(class_counts, dtype=torch.float64)
    u = len(n) * n / n.sum() * rho + 1 - rho
    return u / u.max()


def ride_loss(
    expert_logits, y, margins, diversity: float = -0.45, scale: float = 30.0,
    temperatures=None, class_weights=None, weights=None, normalise=True,
) -> torch.Tensor:  # fmt: skip
    """RIDE (Wang et al., ICLR 2021; PEERS.md 2.6): LDAM per expert, and a term that drives them apart.

    Args:
        expert_logits: (E, B, K), scale * cosine of each expert; their mean is the prediction.
        diversity: factor of KL(mean || expert); negative pushes experts apart.
        temperatures: (K,) after the DRW epoch, None (1) before. class_weights: likewise.
    """
    mean = expert_logits.mean(dim=0)
    T = mean.new_ones(()) if temperatures is None else temperatures.to(mean)
    target = F.softmax(mean.detach() / T, dim=1)
    total = mean.new_zeros(())
    for f in expert_logits:
        total = total + ldam_loss(f / scale, y, margins, scale, class_weights, weights, normalise)
        kl = F.kl_div(F.log_softmax(f / T, dim=1), target, reduction="none").sum(dim=1)
        total = total + diversity * T.mean() ** 2 * weighted_mean(kl, weights, normalise)
    return total


def heads_of(recipe: ClassifierConfig) -> dict:
    """What a method asks of the network: arguments of make_backbone."""
    return {
        "n_experts": recipe.n_experts if recipe.method == "ride" else 1,
        "cosine": recipe.method in ("ldam", "ride"),
    }


def make_objective(recipe: ClassifierConfig, net: nn.Module, class_counts) -> "Objective":
    """The training loss of recipe.method around a network."""
    return OBJECTIVES[recipe.method](recipe, net, class_counts)


class Objective(nn.Module):
    """Plain cross-entropy, and what the others change.

    Called with views (each float (B, C, H, W)), y, weights (B,), the 0-based step and lam of MixUp or
    CutMix (1: not mixed; else image i - 1 has the share 1 - lam of image i); returns a scalar. net is
    what is tested.
    """

    n_views = 1

    def __init__(self, recipe: ClassifierConfig, net: nn.Module, class_counts):
        super().__init__()
        self.recipe, self.net, self.counts = recipe, net, torch.as_tensor(class_counts)

    def forward(self, views, y, w, step: int, lam: float = 1.0) -> torch.Tensor:
        logits = self.predict(views[0])
        loss = self.of(logits, y, w, step)
        if lam < 1:
            loss = lam * loss + (1 - lam) * self.of(logits, y.roll(1), w.roll(1), step)
        return loss

    def predict(self, x) -> torch.Tensor:
        """What `of` takes."""
        return self.net(x)

    def of(self, logits, y, w, step: int) -> torch.Tensor:
        """The loss of (B, K) logits (RIDE: (E, B, K))."""
        return weighted_cross_entropy(logits, y, w, self.recipe.normalise_weights)


class _BalancedSoftmax(Objective):
    def of(self, logits, y, w, step: int) -> torch.Tensor:
        return balanced_softmax_loss(logits, y, self.counts, w, self.recipe.normalise_weights)


class _ClassBalanced(Objective):
    def __init__(self, recipe: ClassifierConfig, net: nn.Module, class_counts):
        super().__init__(recipe, net, class_counts)
        self.class_weights = class_balanced_weights(self.counts).float()

    def of(self, logits, y, w, step: int) -> torch.Tensor:
        return super().of(logits, y, w * self.class_weights.to(w)[y], step)


class _Margins(Objective):
    """What LDAM and RIDE share: margins, and weights of the classes that come late."""

    def __init__(self, recipe: ClassifierConfig, net: nn.Module, class_counts):
        super().__init__(recipe, net, class_counts)
        self.class_weights = class_balanced_weights(self.counts).float()
        self.margins = ldam_margins(self.counts)

    def drw(self, step: int) -> bool:
        """Whether deferred re-weighting has begun: after 80 % of the steps (epoch 160 of 200)."""
        return step >= 0.8 * self.recipe.n_steps


class _Ldam(_Margins):
    def of(self, logits, y, w, step: int) -> torch.Tensor:
        class_weights = self.class_weights if self.drw(step) else None
        normalise = self.recipe.normalise_weights
        return ldam_loss(logits / 30.0, y, self.margins, 30.0, class_weights, w, normalise)


class _Ride(_Margins):
    def predict(self, x) -> torch.Tensor:
        return self.net.expert_logits(self.net.features(x))

    def of(self, logits, y, w, step: int) -> torch.Tensor:
        late = self.drw(step)
        return ride_loss(
            logits, y, self.margins, self.recipe.ride_diversity,
            temperatures=ride_temperatures(self.counts) if late else None,
            class_weights=self.class_weights if late else None,
            weights=w, normalise=self.recipe.normalise_weights,
        )  # fmt: skip


class _Contrastive(Objective):
    """What PaCo and GPaCo share: a projector and a queue of earlier projections."""

    n_views = 2

    def __init__(self, recipe: ClassifierConfig, net: nn.Module, class_counts):
        super().__init__(recipe, net, class_counts)
        D, size = net.n_features, recipe.queue_size
        self.projector = self.make_projector(D)
        self.register_buffer("queue", F.normalize(torch.randn(size, 32)))
        self.register_buffer("queue_y", torch.randint(0, len(self.counts), (size,)))
        self.register_buffer("queue_at", torch.zeros((), dtype=torch.int64))
        self.prior = log_prior(self.counts).float()
        self.settings = (recipe.paco_alpha, 1.0, 1.0, recipe.paco_temperature)

    @torch.no_grad()
    def enqueue(self, z: torch.Tensor, y: torch.Tensor) -> None:
        at = (int(self.queue_at) + torch.arange(len(y), device=y.device)) % len(self.queue)
        self.queue[at], self.queue_y[at] = z.detach().to(self.queue), y
        self.queue_at.fill_((int(self.queue_at) + len(y)) % len(self.queue))


class _PaCo(_Contrastive):
    """A momentum encoder gives the keys; the queue holds the keys of earlier steps."""

    @staticmethod
    def make_projector(D: int) -> nn.Module:
        return nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.ReLU(), nn.Linear(D, 32))

    def __init__(self, recipe: ClassifierConfig, net: nn.Module, class_counts):
        super().__init__(recipe, net, class_counts)
        both = nn.ModuleList([net, self.projector])
        self.keys = copy.deepcopy(both).requires_grad_(False)

    def forward(self, views, y, w, step: int, lam: float = 1.0) -> torch.Tensor:
        f = self.net.features(views[0])
        q = F.normalize(self.projector(f).float())
        with torch.no_grad():
            mine = [*self.net.parameters(), *self.projector.parameters()]
            torch._foreach_lerp_(list(self.keys.parameters()), mine, 1 - 0.999)
            net, projector = self.keys
            k = F.normalize(projector(net.features(views[1])).float())
        contrast, contrast_y = torch.cat([q, k, self.queue]), torch.cat([y, y, self.queue_y])
        own = torch.arange(len(y), device=y.device)
        logits = self.net.logits(f)
        with torch.autocast(q.device.type, enabled=False):  # similarities need fp32
            loss = paco_loss(
                q, logits, contrast, contrast_y, y, self.prior, own,
                *self.settings, w, self.recipe.normalise_weights,
            )  # fmt: skip
        self.enqueue(k, y)
        return loss


class _GPaCo(_Contrastive):
    """Both views go through the same network with gradient; the queue holds the second ones."""

    @staticmethod
    def make_projector(D: int) -> nn.Module:
        layers = [nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D), nn.ReLU(), nn.Linear(D, 32)]
        return nn.Sequential(*layers)

    def forward(self, views, y, w, step: int, lam: float = 1.0) -> torch.Tensor:
        f = self.net.features(torch.cat(views))
        z1, z2 = F.normalize(self.projector(f).float()).chunk(2)
        logits1, logits2 = self.net.logits(f).chunk(2)
        with torch.autocast(z1.device.type, enabled=False):  # similarities need fp32
            loss = gpaco_loss(
                z1, z2, logits1, logits2, self.queue.clone(), self.queue_y.clone(), y, self.prior,
                *self.settings, w, self.recipe.normalise_weights,
            )  # fmt: skip
        self.enqueue(z2, y)
        return loss


# A stage's code version follows the entry of its own method alone, so that an edit of one loss keeps
# what was trained with another: a dict literal, and no method in the body of another.
OBJECTIVES = {
    "ce": Objective,
    "cb": _ClassBalanced,
    "bsce": _BalancedSoftmax,
    "ldam": _Ldam,
    "paco": _PaCo,
    "gpaco": _GPaCo,
    "ride": _Ride,
}
