"""The three terms of the generator's loss: L_DDPM + L_CBDM(tau) + alpha * L_AID (docs/protocol.md, DiffuLT).

All are written for the denoiser's clean image D(x, sigma, y), so they serve both parameterisations.
"""

import torch

__all__ = [
    "AID_LOSSES",
    "aid_loss",
    "class_balancing_loss",
    "class_balancing_weight",
    "denoising_loss",
    "squared_aid_loss",
]


def denoising_loss(d, x0, weight) -> torch.Tensor:
    """L_DDPM: mean of weight(sigma) (D - x0)^2.

    Args:
        d, x0: float (B, C, H, W). weight: float (B,), of noise.weight; 1 / sigma^2 makes it the
            squared error of eps (Ho et al. 2020), lambda that of EDM (Karras et al. 2022).
    """
    return (weight[:, None, None, None] * (d - x0).square()).mean()


def class_balancing_loss(d, d_other, weight) -> torch.Tensor:
    """L_CBDM = L_r + L_c / 4 (Qin et al., CVPR 2023): predict alike under another class's label.

    The paper has tau (t / T) |eps_theta(x_t, y) - eps_theta(x_t, y')|^2. With eps = (x - D) / sigma
    the difference of two eps is that of two D over sigma, so the same loss is
    tau u / sigma^2 |D - D'|^2, where u = t / T is the share of noise levels below sigma.
    L_r moves D towards D', L_c D' towards D; each holds the other fixed.

    Args:
        d: D(x, sigma, y) under the true label, float (B, C, H, W).
        d_other: D(x, sigma, y') at the same x and sigma.
        weight: float (B,), of class_balancing_weight; 0 where y was dropped for guidance.
    """
    w = weight[:, None, None, None]
    l_r = (w * (d - d_other.detach()).square()).mean()
    l_c = (w * (d.detach() - d_other).square()).mean()
    return l_r + 0.25 * l_c


def class_balancing_weight(noise, sigma, tau: float, kind: str = "eps") -> torch.Tensor:
    """tau u(sigma) times the loss's own weight, float (B,).

    Args:
        noise: EdmNoise or EpsNoise; u is its quantile. tau: >= 0.
        kind: "eps": 1 / sigma^2, CBDM's formula to the letter. "lambda": the denoising term's own
            weight, so that the two keep their ratio at every noise level; with EDM that is
            (sigma^2 + s^2) / s^2 times as much, most where there is much noise. For the eps
            parameterisation they are one.
    """
    own = noise.weight(sigma) if kind == "lambda" else sigma.square().reciprocal()
    return tau * noise.quantile(sigma) * own


def aid_loss(d, aid_factor: float = 2.0, weight=None, total=None) -> torch.Tensor:
    """L_AID = mean(relu(1 - d) + relu(d - aid_factor)): zero for AID images, growing into ID and OOD.

    Our reading: the aim is known, the paper's formula is not known to us.

    Args:
        d: float (M,), distance of a predicted clean image to its class centre, in class radii.
        weight: float (M,), 1 for an image that counts, 0 for one that does not; None: all count.
        total: what the sum is divided by; None: the sum of the weights. No image that counts
            gives 0.
    """
    return _mean(torch.relu(1 - d) + torch.relu(d - aid_factor), weight, total)


def squared_aid_loss(d, aid_factor: float = 2.0, weight=None, total=None) -> torch.Tensor:
    """Another reading: mean(relu(1 - d)^2 + relu(d - aid_factor)^2), arguments as of aid_loss. Little
    is asked of what is nearly AID, and much of what is far out."""
    squares = torch.relu(1 - d).square() + torch.relu(d - aid_factor).square()
    return _mean(squares, weight, total)


def _mean(x, weight, total) -> torch.Tensor:
    weight = torch.ones_like(x) if weight is None else weight
    total = weight.sum().clamp_min(1) if total is None else total
    return (weight * x).sum() / torch.as_tensor(total).clamp_min(1e-6)


# L_AID by the name of its formula. A generator's code version follows its own alone, and one without
# L_AID none: a dict literal.
AID_LOSSES = {"hinge": aid_loss, "squared": squared_aid_loss}
