"""SAU (ICONIP 2024): one network, two branches, for real and synthetic images together (docs/protocol.md, SAU).

Synthetic-unaware: MixUp and CutMix of everything, all images alike. Synthetic-aware: a contrastive
loss in which a synthetic image that lies nearest to another class counts as noise.
"""

import json

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import update_bn

from ..config import SauConfig
from ..data.augment import augment, cutmix, mixup
from ..data.long_tail import StackedImages, batch_reader, load_split
from ..engine import loop
from ..engine.device import compiled, to_device
from ..engine.files import save_tensors
from ..engine.precision import half_precision
from ..engine.seeding import batch_indices, derive_seed, host_draws
from .classifier import load_classifier
from .networks import Backbone, make_backbone, split_norms

__all__ = [
    "SauNet",
    "SauSteps",
    "build_sau",
    "contrastive_loss",
    "is_noise",
    "prototypes",
    "renew_statistics",
    "soft_cross_entropy",
]


class SauNet(nn.Module):
    """A backbone with its linear head, and a projection head of three layers, unit output.

    Args:
        net: gives features (B, D). width, dim: 2048 and 128 on CIFAR (12,402,468 parameters with
            ResNet-32 of 64-128-256 and 100 classes).
    """

    def __init__(self, net: Backbone, width: int = 2048, dim: int = 128):
        super().__init__()
        self.net = net
        self.projector = nn.Sequential(
            nn.Linear(net.n_features, width), nn.BatchNorm1d(width), nn.ReLU(),
            nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, dim),
        )  # fmt: skip
        for module in self.projector:
            if isinstance(module, nn.Linear):  # as the authors begin
                nn.init.kaiming_normal_(module.weight)

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Unit vectors float32 (B, dim) of features (B, D)."""
        return F.normalize(self.projector(features).float())


def soft_cross_entropy(logits, y, other_y, lam: float) -> torch.Tensor:
    """Cross-entropy with the target lam e_y + (1 - lam) e_y'. logits (B, K), y and other_y (B,)."""
    return lam * F.cross_entropy(logits, y) + (1 - lam) * F.cross_entropy(logits, other_y)


@torch.no_grad()
def is_noise(z2, z3, y, synthetic, prototypes2, prototypes3) -> torch.Tensor:
    """bool (B,): a synthetic image whose nearest real image of the batch or class prototype, by cosine,
    is of another class in either view.

    Args:
        z2, z3: unit projections (B, d) of the two views. y: (B,). synthetic: bool (B,).
        prototypes2, prototypes3: (K, d), one per class and view.
    """
    K, noise = len(prototypes2), torch.zeros_like(synthetic)
    known_y = torch.cat([y, torch.arange(K, device=y.device)])
    unknown = torch.cat([synthetic, synthetic.new_zeros(K)])
    for z, p in ((z2, prototypes2), (z3, prototypes3)):
        similarity = z @ torch.cat([z, F.normalize(p)]).T  # (B, B + K)
        nearest = similarity.masked_fill(unknown, -torch.inf).argmax(dim=1)
        noise |= synthetic & (known_y[nearest] != y)
    return noise


def contrastive_loss(
    z2, z3, y, noise, prototypes2, prototypes3, strategy: str = "pos_neg", temperature: float = 0.1
) -> torch.Tensor:
    """Supervised contrastive loss of both views and the class prototypes, all of them anchors.

    Args:
        z2, z3: unit projections (B, d). y: int64 (B,). noise: bool (B,), from is_noise.
        prototypes2, prototypes3: (K, d), means of unit vectors, constant.
        strategy: a noisy image is a class of its own ("pos_neg": its only positive is its other view),
            a negative for the others only ("neg_only"), left out ("drop"), or, as a control, of the
            class that it was made for ("trust").
    """
    K = len(prototypes2)
    own = torch.arange(len(y), device=y.device)
    if strategy != "trust":
        y = torch.where(noise, -1 - own, y)  # a label that no other image has
    items = torch.cat([z2, prototypes2, z3, prototypes3])  # (2S, d)
    labels = torch.cat([y, torch.arange(K, device=y.device)]).repeat(2)
    counted = ~torch.eye(len(items), dtype=torch.bool, device=y.device)
    if strategy == "drop":
        counted &= labels >= 0
    similarity = items @ items.T / temperature
    log_p = similarity - similarity.masked_fill(~counted, -torch.inf).logsumexp(1, keepdim=True)
    positive = (labels[:, None] == labels) & counted
    per_anchor = -(log_p * positive).sum(dim=1) / positive.sum(dim=1).clamp_min(1)
    if strategy == "pos_neg":
        return per_anchor.mean()
    return (per_anchor * (labels >= 0)).sum() / (labels >= 0).sum()  # the prototypes always count


@torch.no_grad()
def prototypes(model: SauNet, read, labels, n_classes: int, views, batch_size: int = 1024):
    """Mean unit projection of each class's real images, one (K, d) per view, not normalised again.

    Args:
        read: indices (B,) to float images. labels: int64 (N,). views: two functions of (images, first
            index), which draw v2 and v3.
    """
    model.eval()
    sums, counts = [0.0, 0.0], 0.0
    classes = torch.arange(n_classes, device=labels.device)
    for start in range(0, len(labels), batch_size):
        stop = min(start + batch_size, len(labels))
        x = read(np.arange(start, stop))
        member = (labels[start:stop, None] == classes).float()  # (B, K)
        counts = counts + member.sum(dim=0)
        for v, view in enumerate(views):
            z = model.project(model.net.features(view(x, start)))
            with torch.autocast(z.device.type, enabled=False):  # sums need fp32
                sums[v] = sums[v] + member.T @ z
    model.train()
    return [total / counts.clamp_min(1)[:, None] for total in sums]


def build_sau(work, config: dict, inputs: dict, context) -> None:
    """Train SAU. inputs: data, synthetic (images and labels), and pool (balanced data) for the authors'
    second draw. Writes model.safetensors, the backbone, as the other classifiers have it; loss.npy
    float32 (n_steps, 4): L_mix, L_con, noisy and synthetic images of each step."""
    sau, seed = SauSteps(config, inputs, context), config["seed"]
    named = {"work": work, "identity": config, "what": f"SAU, seed {seed}"}
    curve = loop.run(
        sau.step, sau.model, sau.optimizer, sau.recipe,
        **named, setting="sau.batch_size", context=context, n_logged=4, memory=sau,
    )  # fmt: skip
    out = work / "out"
    save_tensors(out / "model.safetensors", sau.model.net.state_dict())
    np.save(out / "loss.npy", curve.cpu().numpy())
    (out / "model.json").write_text(json.dumps(sau.info))


def renew_statistics(work, config: dict, inputs: dict, context) -> None:
    """Batch norm's running statistics anew, over an epoch of the images as they are. inputs: data,
    synthetic, and sau, whose files are written again. config: batch_size, precision, seed."""
    trained, device = inputs["sau"], torch.device(context.device)
    read, labels = _all_images(load_split(inputs["data"], "train"), inputs["synthetic"], device)
    net, n = load_classifier(trained, context.device), config["batch_size"]
    seed = derive_seed(config["seed"], "sau", "statistics")
    epoch = range(-(-len(labels) // n))
    half = half_precision(config["precision"], context.device)
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        update_bn((read(batch_indices(len(labels), n, k, seed)) for k in epoch), net)
    out = work / "out"
    save_tensors(out / "model.safetensors", net.state_dict())
    np.save(out / "loss.npy", trained.array("loss"))
    (out / "model.json").write_text(json.dumps(trained.json("model")))


def _all_images(train, synthetic, device):
    """A reader of real images and, after them, synthetic ones, and their labels int64 (N,)."""
    images = StackedImages((train.images, None), (synthetic.array("images"), None))
    labels = np.concatenate([train.labels, np.asarray(synthetic.array("labels"))])
    return batch_reader(images, device), labels


class SauSteps:
    """Network, optimiser and prototypes of one run, and its step."""

    def __init__(self, config: dict, inputs: dict, context):
        self.seed = config["seed"]
        self.recipe = recipe = SauConfig.model_validate(config["sau"])
        self.device = torch.device(context.device)
        self.half = half_precision(recipe.precision, context.device)
        train = load_split(inputs["data"], "train")
        self.K, self.n_real = len(train.class_names), len(train.labels)
        self.read, labels = _all_images(train, inputs["synthetic"], self.device)
        self.y = to_device(labels, self.device)
        self.steps_per_epoch = -(-len(labels) // recipe.batch_size)
        self._choose_references(inputs.get("pool"), train)
        channels = train.images.shape[-1]
        self.info = {"arch": recipe.arch, "n_classes": self.K, "in_channels": channels}
        self.info |= {"width": recipe.width}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.seed, "sau", "init"))
            net = make_backbone(**self.info)
            self.model = SauNet(net, recipe.projector_width, recipe.projector_dim).to(self.device)
        n_forwards = {"both": 4, "unaware": 2, "aware": 2}[recipe.branches]
        split_norms(self.model.net, n_forwards)
        net.features = compiled(net.features, "SAU", self.device)
        split_norms(self.model.projector, 2)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), recipe.lr, 0.9,
            weight_decay=recipe.weight_decay, nesterov=recipe.nesterov,
        )  # fmt: skip
        self.prototypes: list[torch.Tensor] = []

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds beside weights and moments."""
        return {f"prototypes.{v}": p for v, p in zip((2, 3), self.prototypes, strict=False)}

    def restore(self, tensors: dict, _step: int) -> None:
        found = (tensors.get(f"prototypes.{v}") for v in (2, 3))
        self.prototypes = [p.to(self.device) for p in found if p is not None]

    def after_step(self) -> None:
        """Nothing: prototypes change at the beginning of an epoch."""

    def _choose_references(self, pool, train) -> None:
        """The real images that prototypes come from."""
        if self.recipe.prototypes == "trained":
            real = train.images
            self.reference_y = self.y[: self.n_real]
        else:  # as many of each class, drawn again from all there are
            whole, drawn = load_split(pool, "train"), []
            g = np.random.default_rng(derive_seed(self.seed, "sau", "second draw"))
            for c, n in enumerate(train.class_counts):
                drawn.append(g.choice(np.flatnonzero(whole.labels == c), n, replace=False))
            index = np.concatenate(drawn)
            real = whole.images[index]
            self.reference_y = to_device(whole.labels[index], self.device)
        self.read_reference = batch_reader(real, self.device)

    def _view(self, number: int, *purpose):
        """A function of images that draws v2 or v3."""
        recipe = self.recipe
        policy, size = ((recipe.policy, recipe.cutout), (recipe.second_policy, 0))[number - 2]

        def draw(x, *more):
            with torch.autocast(self.device.type, enabled=False):  # images stay in fp32
                return augment(x, recipe, policy, size, self.seed, "sau", *purpose, *more, number)

        return draw

    def step(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """L_mix + L_con, and for the curve (4,): both terms, how many images were noise, synthetic."""
        recipe, net = self.recipe, self.model.net
        aware, unaware = recipe.branches != "unaware", recipe.branches != "aware"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            if aware and k % self.steps_per_epoch == 0:
                self._renew_prototypes(k)
            # the batch, and the views of both branches through one forward
            x, y, synthetic = self._batch(self._indices(k, "order"))
            inputs, targets = self._mixed(x, y, k) if unaware else ([], [])
            inputs += [self._view(v, k)(x) for v in (2, 3)] if aware else []
            features = net.features(torch.cat(inputs)).chunk(len(inputs))
            # L_mix: cross-entropy of the mixed images
            l_mix, l_con, noise = x.new_zeros(()), x.new_zeros(()), torch.zeros_like(synthetic)
            for f, target in zip(features, targets, strict=False):
                l_mix = l_mix + soft_cross_entropy(net.logits(f), *target)
            if not unaware:  # the contrastive branch alone: a linear classifier on frozen features
                l_mix = F.cross_entropy(net.logits(features[0].detach()), y)
            # L_con: which synthetic images are noise, and the contrast of the two views
            if aware:
                if unaware:  # no loss reads these, but the projector's batch norm has seen them
                    with torch.no_grad():
                        self.model.project(torch.cat(features[:-2]))
                z2, z3 = self.model.project(torch.cat(features[-2:])).chunk(2)
                with torch.autocast(x.device.type, enabled=False):  # similarities need fp32
                    noise = is_noise(z2, z3, y, synthetic, *self.prototypes)
                    settings = (recipe.strategy, recipe.temperature)
                    l_con = contrastive_loss(z2, z3, y, noise, *self.prototypes, *settings)
        logged = (l_mix, l_con, noise.sum(), synthetic.sum())
        return l_mix + l_con, torch.stack([value.detach().float() for value in logged])

    def _renew_prototypes(self, k: int) -> None:
        views = [self._view(v, "prototypes", k) for v in (2, 3)]
        real = self.read_reference, self.reference_y
        self.prototypes = prototypes(self.model, *real, self.K, views)

    def _mixed(self, x, y, step: int):
        """MixUp and CutMix of view v1 with v1 of an independent shuffle, and their soft targets."""
        recipe, seed = self.recipe, self.seed
        draws = host_draws(seed, "sau", "mix", step)
        other, other_y, _ = self._batch(self._indices(step, "other order"))
        x, other = (
            augment(a, recipe, "none", 0, seed, "sau", step, name)
            for a, name in ((x, "v1"), (other, "other v1"))
        )
        lam, nominal = draws.beta(recipe.mix_alpha, recipe.mix_alpha, 2).tolist()
        cut, area = cutmix(x, other, nominal, draws)
        share = area if recipe.cutmix_label == "area" else nominal
        return [mixup(x, other, lam), cut], [(y, other_y, lam), (y, other_y, share)]

    def _indices(self, step: int, order: str) -> np.ndarray:
        seed = derive_seed(self.seed, "sau", order)
        return batch_indices(len(self.y), self.recipe.batch_size, step, seed)

    def _batch(self, index: np.ndarray):
        where = to_device(index, self.device)
        return self.read(index), self.y[where], where >= self.n_real
