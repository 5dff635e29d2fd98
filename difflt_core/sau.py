"""SAU (ICONIP 2024): one network, two branches, for real and synthetic images together (PEERS.md 4).

Synthetic-unaware: MixUp and CutMix of everything, all images alike. Synthetic-aware: a contrastive
loss in which a synthetic image that lies nearest to another class counts as noise.
"""

import json
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .augment import augment
from .backbones import Backbone, make_backbone
from .config import SauConfig
from .data import Rows, batch_reader, load_split
from .progress import bar, half_precision
from .seeding import derive_seed, generator
from .store import save_tensors
from .training import (
    CHECK_EVERY,
    batch_indices,
    check_loss,
    load_checkpoint,
    save_checkpoint,
    set_lr,
)

__all__ = [
    "SauNet",
    "Trainer",
    "build_sau",
    "contrastive_loss",
    "cutmix",
    "is_noise",
    "mixup",
    "prototypes",
    "soft_cross_entropy",
    "split_norms",
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

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Unit vectors float32 (B, dim) of features (B, D)."""
        return F.normalize(self.projector(features).float())


class _SplitNorm:
    """Batch norm over each of n equal parts of the batch in turn, as n forwards would have it."""

    n_parts = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.n_parts == 1:
            return super().forward(x)
        return torch.cat([super(_SplitNorm, self).forward(part) for part in x.chunk(self.n_parts)])


class SplitBatchNorm1d(_SplitNorm, nn.BatchNorm1d):
    pass


class SplitBatchNorm2d(_SplitNorm, nn.BatchNorm2d):
    pass


def split_norms(module: nn.Module, n_parts: int) -> nn.Module:
    """Let one forward of a batch of n parts give what n forwards give, running statistics included.
    In place; the names of the weights stay."""
    kinds = {nn.BatchNorm1d: SplitBatchNorm1d, nn.BatchNorm2d: SplitBatchNorm2d}
    for child in module.modules():
        child.__class__ = kinds.get(type(child), type(child))
        if isinstance(child, _SplitNorm):
            child.n_parts = n_parts
    return module


def mixup(x, other, lam: float) -> torch.Tensor:
    """lam x + (1 - lam) other, both (B, C, H, W)."""
    return lam * x + (1 - lam) * other


def cutmix(x, other, lam: float, g: torch.Generator) -> tuple[torch.Tensor, float]:
    """A box of other in x: sides sqrt(1 - lam) of the image's, uniform centre, cut off at the border.

    Returns:
        The images, and the share of the area that x keeps (lam itself is the nominal share).
    """
    H, W = x.shape[-2:]
    side = math.sqrt(1 - lam)
    cy, cx = (int(torch.randint(n, (), generator=g)) for n in (H, W))
    h, w = int(H * side), int(W * side)
    rows = slice(max(0, cy - h // 2), min(H, cy - h // 2 + h))
    cols = slice(max(0, cx - w // 2), min(W, cx - w // 2 + w))
    mixed = x.clone()
    mixed[..., rows, cols] = other[..., rows, cols]
    area = (rows.stop - rows.start) * (cols.stop - cols.start)
    return mixed, 1 - area / (H * W)


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
    noise = torch.zeros_like(synthetic)
    if not synthetic.any():
        return noise
    known_y = torch.cat([y[~synthetic], torch.arange(len(prototypes2), device=y.device)])
    for z, p in ((z2, prototypes2), (z3, prototypes3)):
        known = torch.cat([z[~synthetic], F.normalize(p)])
        nearest = known_y[(z[synthetic] @ known.T).argmax(dim=1)]
        noise[synthetic] |= nearest != y[synthetic]
    return noise


def contrastive_loss(
    z2, z3, y, noise, prototypes2, prototypes3, strategy: str = "pos_neg", temperature: float = 0.1
) -> torch.Tensor:
    """Supervised contrastive loss of both views and the class prototypes, all of them anchors.

    Args:
        z2, z3: unit projections (B, d). y: int64 (B,). noise: bool (B,), from is_noise.
        prototypes2, prototypes3: (K, d), means of unit vectors, constant.
        strategy: a noisy image is a class of its own ("pos_neg": its only positive is its other view),
            a negative for the others only ("neg_only"), or left out ("drop").
    """
    K = len(prototypes2)
    if strategy == "drop":
        z2, z3, y, noise = z2[~noise], z3[~noise], y[~noise], noise[~noise]
    own = torch.arange(len(y), device=y.device)
    y = torch.where(noise, -1 - own, y)  # a label that no other image has
    items = torch.cat([z2, prototypes2, z3, prototypes3])  # (2S, d)
    labels = torch.cat([y, torch.arange(K, device=y.device)]).repeat(2)
    counted = ~torch.eye(len(items), dtype=torch.bool, device=y.device)
    similarity = items @ items.T / temperature
    log_p = similarity - similarity.masked_fill(~counted, -torch.inf).logsumexp(1, keepdim=True)
    positive = (labels[:, None] == labels) & counted
    per_anchor = -(log_p * positive).sum(dim=1) / positive.sum(dim=1).clamp_min(1)
    if strategy == "neg_only":
        per_anchor = per_anchor[labels >= 0]
    return per_anchor.mean()


@torch.no_grad()
def prototypes(model: SauNet, read, labels, n_classes: int, views, batch_size: int = 1024):
    """Mean unit projection of each class's real images, one (K, d) per view, not normalised again.

    Args:
        read: indices (B,) to float images. labels: int64 (N,). views: two functions of (images, first
            index), which draw v2 and v3.
    """
    model.eval()
    sums = [0.0, 0.0]
    for start in range(0, len(labels), batch_size):
        index = torch.arange(start, min(start + batch_size, len(labels)))
        x, y = read(index), labels[index.to(labels.device)]
        one_hot = F.one_hot(y, n_classes).float()
        for v, view in enumerate(views):
            sums[v] = sums[v] + one_hot.T @ model.project(model.net.features(view(x, start)))
    model.train()
    counts = torch.bincount(labels, minlength=n_classes).clamp_min(1)[:, None]
    return [total / counts for total in sums]


def build_sau(work, config: dict, inputs: dict, context) -> None:
    """Train SAU. inputs: data, synthetic (images and labels), and pool (balanced data) for the authors'
    second draw. Writes model.safetensors, the backbone, as the other classifiers have it; loss.npy
    float32 (n_steps, 4): L_mix, L_con, noisy and synthetic images of each step."""
    trainer = Trainer(work, config, inputs, context)
    n_steps, seed = trainer.recipe.n_steps, config["seed"]
    with bar(n_steps, f"SAU, seed {seed}", initial=trainer.first, context=context) as progress:
        for step in range(trainer.first, n_steps):
            trainer.train_step(step)
            progress.update()
    trainer.finish()


class Trainer:
    """Network, optimiser, prototypes and loss curve of one run."""

    def __init__(self, work, config: dict, inputs: dict, context):
        self.work, self.config, self.seed = work, config, config["seed"]
        self.recipe = recipe = SauConfig.model_validate(config["sau"])
        self.device = torch.device(context.device)
        self.half = half_precision(recipe.precision, context.device)
        train = load_split(inputs["data"], "train")
        synthetic = inputs["synthetic"]
        self.K, self.n_real = len(train.class_names), len(train.labels)
        images = Rows((train.images, None), (synthetic.array("images"), None))
        labels = np.concatenate([train.labels, np.asarray(synthetic.array("labels"))])
        self.read, self.y = batch_reader(images, self.device), torch.tensor(labels).to(self.device)
        self.steps_per_epoch = -(-len(labels) // recipe.batch_size)
        self._choose_references(inputs.get("pool"), train)
        self.info = {"arch": recipe.arch, "n_classes": self.K, "in_channels": images.shape[-1]}
        self.info |= {"width": recipe.width}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.seed, "sau", "init"))
            net = make_backbone(**self.info)
            self.model = SauNet(net, recipe.projector_width, recipe.projector_dim).to(self.device)
        n_forwards = {"both": 4, "unaware": 2, "aware": 2}[recipe.branches]
        split_norms(self.model.net, n_forwards)
        split_norms(self.model.projector, 2)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), recipe.lr, 0.9,
            weight_decay=recipe.weight_decay, nesterov=recipe.nesterov,
        )  # fmt: skip
        self.first, extra = load_checkpoint(work, self.model, self.optimizer, config)
        self.curve = extra.get("curve", torch.zeros(recipe.n_steps, 4)).to(self.device)
        self.prototypes = [extra[f"prototypes.{v}"].to(self.device) for v in (2, 3) if extra]
        self.checked = self.first
        self.model.train()

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
            real, self.reference_y = whole.images[index], torch.tensor(whole.labels[index])
            self.reference_y = self.reference_y.to(self.device)
        self.read_reference = batch_reader(real, self.device)

    def _view(self, number: int, *purpose):
        """A function of images that draws v2 or v3."""
        recipe = self.recipe
        policy, size = ((recipe.policy, recipe.cutout), (recipe.second_policy, 0))[number - 2]
        return lambda x, *more: augment(
            x, recipe, policy, size, self.seed, "sau", *purpose, *more, number
        )

    def train_step(self, step: int) -> None:
        recipe, aware = self.recipe, self.recipe.branches != "unaware"
        set_lr(self.optimizer, recipe, step)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            if aware and step % self.steps_per_epoch == 0:
                views = [self._view(v, "prototypes", step) for v in (2, 3)]
                real = self.read_reference, self.reference_y
                self.prototypes = prototypes(self.model, *real, self.K, views)
            terms, counts = self._losses(step)
        self.optimizer.zero_grad(set_to_none=True)
        sum(terms).backward()
        self.optimizer.step()
        self.curve[step] = torch.stack([t.detach().float() for t in (*terms, *counts)])
        self._keep(step + 1)

    def _losses(self, step: int):
        """L_mix and L_con, and how many images were noise and synthetic."""
        recipe = self.recipe
        index = self._indices(step, "order")
        x, y, synthetic = self._batch(index)
        inputs, zero = [], x.new_zeros(())
        if recipe.branches != "aware":
            mixed, targets = self._mixed(x, y, step)
            inputs += mixed
        if recipe.branches != "unaware":
            inputs += [self._view(v, step)(x) for v in (2, 3)]
        features = self.model.net.features(torch.cat(inputs)).chunk(len(inputs))
        l_mix, l_con, noise = zero, zero, torch.zeros_like(synthetic)
        if recipe.branches != "aware":
            for f, target in zip(features, targets, strict=False):
                l_mix = l_mix + soft_cross_entropy(self.model.net.logits(f), *target)
        else:  # the contrastive branch alone has no classifier: a linear one on frozen features
            l_mix = F.cross_entropy(self.model.net.logits(features[0].detach()), y)
        if recipe.branches != "unaware":
            z2, z3 = self.model.project(torch.cat(features[-2:])).chunk(2)
            with torch.autocast(x.device.type, enabled=False):  # similarities need fp32
                noise = is_noise(z2, z3, y, synthetic, *self.prototypes)
                l_con = contrastive_loss(
                    z2, z3, y, noise, *self.prototypes, recipe.strategy, recipe.temperature
                )
        return (l_mix, l_con), (noise.sum(), synthetic.sum())

    def _mixed(self, x, y, step: int):
        """MixUp and CutMix of view v1 with v1 of an independent shuffle, and their soft targets."""
        recipe, seed = self.recipe, self.seed
        g = generator(seed, "sau", "mix", step)
        other, other_y, _ = self._batch(self._indices(step, "other order"))
        x, other = (
            augment(a, recipe, "none", 0, seed, "sau", step, name)
            for a, name in ((x, "v1"), (other, "other v1"))
        )
        lam, nominal = torch.rand(2, generator=g).tolist()
        cut, area = cutmix(x, other, nominal, g)
        share = area if recipe.cutmix_label == "area" else nominal
        return [mixup(x, other, lam), cut], [(y, other_y, lam), (y, other_y, share)]

    def _indices(self, step: int, order: str) -> torch.Tensor:
        seed = derive_seed(self.seed, "sau", order)
        return batch_indices(len(self.y), self.recipe.batch_size, step, seed)

    def _batch(self, index: torch.Tensor):
        y = self.y[index.to(self.device)]
        return self.read(index), y, (index >= self.n_real).to(self.device)

    def _keep(self, done: int) -> None:
        """Look at the losses now and then, and write a checkpoint."""
        recipe = self.recipe
        if done % CHECK_EVERY == 0 or done == recipe.n_steps:
            check_loss(self.curve[self.checked : done, :2], self.checked, "SAU", float("inf"))
            self.checked = done
        if done % recipe.checkpoint_every == 0 and done < recipe.n_steps:
            extra = {f"prototypes.{v}": p for v, p in zip((2, 3), self.prototypes, strict=False)}
            extra["curve"] = self.curve
            save_checkpoint(self.work, done, self.model, self.optimizer, extra, self.config)

    def finish(self) -> None:
        out = self.work / "out"
        save_tensors(out / "model.safetensors", self.model.net.state_dict())
        np.save(out / "loss.npy", self.curve.cpu().numpy())
        (out / "model.json").write_text(json.dumps(self.info))
