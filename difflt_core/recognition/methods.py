"""The methods that DiffuLT is compared and combined with: the training loss of each around a network."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from ..config import ClassifierConfig
from .losses import (
    COSINE_SCALE,
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
from .networks import split_norms

__all__ = [
    "OBJECTIVES",
    "heads_of",
    "make_objective",
]


def heads_of(recipe: ClassifierConfig) -> dict:
    """What a method asks of the network: arguments of make_backbone."""
    method = OBJECTIVES[recipe.method]
    return {"n_experts": method.n_experts(recipe), "cosine": method.cosine}


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
    cosine = False  # heads of unit class vectors (networks.CosineHead)

    @staticmethod
    def n_experts(recipe: ClassifierConfig) -> int:
        return 1

    def __init__(self, recipe: ClassifierConfig, net: nn.Module, class_counts):
        super().__init__()
        self.recipe, self.net = recipe, net
        self.constant("counts", torch.as_tensor(class_counts))

    def constant(self, name: str, values: torch.Tensor) -> None:
        """A tensor that moves to the device with the network and is in no checkpoint."""
        self.register_buffer(name, values, persistent=False)

    def forward(self, views, y, w, step: int, lam: float = 1.0) -> torch.Tensor:
        logits = self.predict(views[0])
        loss = self.loss_of(logits, y, w, step)
        if lam < 1:
            loss = lam * loss + (1 - lam) * self.loss_of(logits, y.roll(1), w.roll(1), step)
        return loss

    def predict(self, x) -> torch.Tensor:
        """What `loss_of` takes."""
        return self.net(x)

    def loss_of(self, logits, y, w, step: int) -> torch.Tensor:
        """The loss of (B, K) logits (RIDE: (E, B, K))."""
        return weighted_cross_entropy(logits, y, w, self.recipe.normalise_weights)


class _BalancedSoftmax(Objective):
    def loss_of(self, logits, y, w, step: int) -> torch.Tensor:
        return balanced_softmax_loss(logits, y, self.counts, w, self.recipe.normalise_weights)


class _ClassBalanced(Objective):
    def __init__(self, recipe: ClassifierConfig, net: nn.Module, class_counts):
        super().__init__(recipe, net, class_counts)
        self.constant("class_weights", class_balanced_weights(self.counts).float())

    def loss_of(self, logits, y, w, step: int) -> torch.Tensor:
        return super().loss_of(logits, y, w * self.class_weights.to(w)[y], step)


class _Margins(Objective):
    """What LDAM and RIDE share: cosines, margins, and weights of the classes that come late."""

    cosine = True

    def __init__(self, recipe: ClassifierConfig, net: nn.Module, class_counts):
        super().__init__(recipe, net, class_counts)
        self.constant("class_weights", class_balanced_weights(self.counts).float())
        self.constant("margins", ldam_margins(self.counts))

    def drw(self, step: int) -> bool:
        """Whether deferred re-weighting has begun: after 80 % of the steps (epoch 160 of 200)."""
        return step >= 0.8 * self.recipe.n_steps


class _Ldam(_Margins):
    def loss_of(self, logits, y, w, step: int) -> torch.Tensor:
        class_weights = self.class_weights if self.drw(step) else None
        normalise = self.recipe.normalise_weights
        cosines = logits / COSINE_SCALE
        return ldam_loss(
            cosines, y, self.margins, class_weights=class_weights, weights=w, normalise=normalise
        )


class _Ride(_Margins):
    @staticmethod
    def n_experts(recipe: ClassifierConfig) -> int:
        return recipe.n_experts

    def __init__(self, recipe: ClassifierConfig, net: nn.Module, class_counts):
        super().__init__(recipe, net, class_counts)
        self.constant("temperatures", ride_temperatures(self.counts))

    def predict(self, x) -> torch.Tensor:
        return self.net.expert_logits(self.net.features(x))

    def loss_of(self, logits, y, w, step: int) -> torch.Tensor:
        late = self.drw(step)
        return ride_loss(
            logits, y, self.margins, self.recipe.ride_diversity,
            temperatures=self.temperatures if late else None,
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
        self.constant("prior", log_prior(self.counts).float())
        self.settings = (recipe.paco_alpha, 1.0, 1.0, recipe.paco_temperature)

    @torch.no_grad()
    def enqueue(self, z: torch.Tensor, y: torch.Tensor, step: int) -> None:
        """Put the projections of a step in the place of the oldest."""
        at = (step * len(y) + torch.arange(len(y), device=y.device)) % len(self.queue)
        self.queue[at], self.queue_y[at] = z.detach().to(self.queue), y


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
        self.enqueue(k, y, step)
        return loss


class _GPaCo(_Contrastive):
    """Both views go through the same network with gradient, each with batch norms of its own, as the
    authors' two forwards have them; the queue holds the second ones."""

    def __init__(self, recipe: ClassifierConfig, net: nn.Module, class_counts):
        super().__init__(recipe, split_norms(net, 2), class_counts)

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
        self.enqueue(z2, y, step)
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
