"""Losses of the methods that DiffuLT is compared and combined with, as functions.

Symbols: logits (B, K) float, y (B,) int64, class_counts (K,), weights (B,) float: 1 for a real
image, omega for a generated one, None for all ones. Every loss is a weighted mean over the batch,
divided by the sum of weights unless normalise is False (then by B).
"""

import math

import torch
import torch.nn.functional as F

__all__ = [
    "COSINE_SCALE",
    "balanced_softmax_loss",
    "class_balanced_weights",
    "gpaco_loss",
    "ldam_loss",
    "ldam_margins",
    "log_prior",
    "paco_loss",
    "ride_loss",
    "ride_temperatures",
    "weighted_cross_entropy",
    "weighted_mean",
]

COSINE_SCALE = 30.0  # of the logits of LDAM and RIDE, as in their authors' code


def weighted_mean(losses, weights=None, normalise: bool = True) -> torch.Tensor:
    """sum(w * l) / sum(w), or / B when normalise is False. losses: (B,)."""
    if weights is None:
        return losses.mean()
    total = (weights * losses).sum()
    return total / (weights.sum().clamp_min(1e-12) if normalise else len(losses))


def weighted_cross_entropy(logits, y, weights=None, normalise: bool = True) -> torch.Tensor:
    """Cross-entropy with a weight per image (docs/protocol.md, DiffuLT: step 5).

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
    cosines, y, margins, scale: float = COSINE_SCALE,
    class_weights=None, weights=None, normalise=True,
) -> torch.Tensor:  # fmt: skip
    """Cross-entropy of scale * (cos - m_y e_y), weighted by class (DRW) and by image.

    Args:
        cosines: (B, K) of unit features and unit class vectors. margins: (K,), from ldam_margins.
        class_weights: (K,) or None before DRW's second phase.
    """
    own = y[:, None] == torch.arange(cosines.shape[1], device=y.device)
    shifted = cosines - own * margins.to(cosines)[y][:, None]
    if class_weights is not None:
        w = class_weights.to(cosines)[y]
        weights = w if weights is None else w * weights
    return weighted_cross_entropy(scale * shifted, y, weights, normalise)


def paco_loss(
    features, class_logits, contrast, contrast_y, y, prior, own,
    alpha: float = 0.01, beta: float = 1.0, gamma: float = 1.0, temperature: float = 0.05,
    weights=None, normalise=True,
) -> torch.Tensor:  # fmt: skip
    """Parametric contrastive loss (Cui et al., ICCV 2021; docs/protocol.md, PaCo).

    Args:
        features: unit anchors (A, D). class_logits: (A, K), of the pooled backbone feature.
        contrast: unit vectors (M, D) that anchors are compared with. contrast_y: (M,).
        y: labels of the anchors (A,). prior: log prior (K,), added to class_logits in training.
        own: (A,) index of an anchor's own entry in contrast, which is left out; -1 for none.
        weights: (A,), per anchor.
    """
    g = class_logits + prior.to(class_logits)  # (A, K)
    s = features @ contrast.T / temperature  # (A, M)
    counted = own[:, None] != torch.arange(s.shape[1], device=s.device)
    positive = (contrast_y[None, :] == y[:, None]) & counted  # (A, M)
    terms = torch.cat([g, (s + math.log(gamma)).masked_fill(~counted, float("-inf"))], dim=1)
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
    """Generalised PaCo (Cui et al., TPAMI 2023; docs/protocol.md, GPaCo): both views are anchors.

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
    expert_logits, y, margins, diversity: float = -0.45, scale: float = COSINE_SCALE,
    temperatures=None, class_weights=None, weights=None, normalise=True,
) -> torch.Tensor:  # fmt: skip
    """RIDE (Wang et al., ICLR 2021; docs/protocol.md, RIDE): LDAM per expert, and a diversity term.

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
