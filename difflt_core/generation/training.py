"""The generator (stage 2): a class-conditional diffusion model trained with L = L_DDPM +
L_CBDM(tau) + alpha * L_AID."""

import itertools
import json

import numpy as np
import torch

from ..config import DiffusionConfig
from ..data.long_tail import batch_reader, load_split
from ..engine import loop
from ..engine.checkpoint import pack_state
from ..engine.device import compiled, to_device
from ..engine.files import load_tensors, save_tensors
from ..engine.parallel import make_accelerator, n_processes, rank
from ..engine.precision import half_precision
from ..engine.seeding import batch_indices, derive_seed, generator, weighted_indices
from ..recognition.classifier import load_classifier
from ..recognition.geometry import class_geometry
from .augmentation import N_LABELS, draw_changes, warp
from .losses import AID_LOSSES, class_balancing_loss, class_balancing_weight, denoising_loss
from .network import Denoiser, is_small, make_unet, memory_format
from .noise import make_noise

__all__ = ["StepLoss", "build_diffusion", "drop_labels", "plain_part", "seen_images"]

_SAMPLE_STEPS = 6  # noise levels on the way to the images that L_AID's "sample" reading sees
_SAMPLE_EVERY = 4  # one such image for so many of the batch


def plain_part(recipe: DiffusionConfig) -> DiffusionConfig:
    """The first n_plain_steps of a generator, without L_CBDM and L_AID, as a recipe of its own:
    the same for all generators that differ in the second part alone."""
    change = {"tau": 0.0, "alpha": 0.0, "plain_share": 0.0, "schedule": "constant"}
    first = recipe.model_copy(update={**change, "n_steps": recipe.n_plain_steps})
    return first.canonical()


def build_diffusion(work, config: dict, inputs: dict, context) -> None:
    """Stage 2. inputs: data; extractor, for L_AID; plain, where a plain part comes first. Writes the
    EMA weights, the loss curves, how many images of each class were seen, and with
    config["keep_state"] all that is needed to go on.

    On several processes each takes an equal slice of the same global batch; the main one writes.
    """
    recipe, seed = DiffusionConfig.model_validate(config["diffusion"]), config["seed"]
    train = load_split(inputs["data"], "train")
    _check_batch(recipe)
    accelerator = make_accelerator(context.device)
    info = {
        "preset": recipe.preset,
        "n_classes": len(train.class_names),
        "image_size": train.images.shape[1],
        "channels": train.images.shape[-1],
        "augmented": recipe.augment > 0,
    }
    plain = None
    if "plain" in inputs:
        plain = load_tensors(inputs["plain"].path / "state.safetensors")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "unet", "init"))
        denoise, unet, optimizer = _network(info, recipe, accelerator)
        average = _Average(unet, recipe.ema_decay)
        losses = StepLoss(recipe, seed, train, accelerator.device, inputs, config)

        def step(k: int, part: int = 0, n_parts: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
            terms = losses(denoise, k, part, n_parts)  # L_DDPM, L_CBDM, alpha * L_AID
            return terms.sum(), terms

        curve = loop.run(
            step, unet, optimizer, recipe, work=work,
            identity={**info, **recipe.model_dump(mode="json"), "seed": seed},
            what=f"diffusion, seed {seed}", setting="diffusion.batch_size", context=context,
            n_logged=3, memory=average, start=plain, hold_steps=recipe.n_plain_steps,
            clip_norm=recipe.clip_norm, ceiling=2.0, accelerator=accelerator, divisible=True,
        )  # fmt: skip
    if rank() == 0:
        out = work / "out"
        if config.get("keep_state"):
            state = pack_state(unet, optimizer, {"curve": curve, **average.state()})
            save_tensors(out / "state.safetensors", state)
        average.copy_to(unet)  # buffers, which no step changes, are those of the network
        save_tensors(out / "model.safetensors", unet.state_dict())
        np.save(out / "loss.npy", curve.cpu().numpy())
        np.save(out / "seen.npy", losses.counts)
        (out / "model.json").write_text(json.dumps(info))


def _network(info: dict, recipe: DiffusionConfig, accelerator):
    """The denoiser as the loss calls it, its UNet, and the optimiser."""
    device = accelerator.device
    layout = memory_format(recipe.preset, device)
    unet = make_unet(**info).to(device, memory_format=layout)
    half = half_precision(recipe.precision, device.type)
    denoiser = Denoiser(unet, make_noise(recipe), half, layout)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=recipe.lr, weight_decay=0.0, fused=True)
    if n_processes() > 1 and not is_small(recipe.preset):  # else StepLoss compiles all of it
        denoiser.forward = compiled(denoiser.forward, "diffusion", device)
    denoise, optimizer = accelerator.prepare(denoiser, optimizer)
    return denoise, unet, optimizer


class _Average:
    """The exponential moving average of a network's weights, as a part of a run's state."""

    def __init__(self, unet: torch.nn.Module, decay: float):
        from diffusers.training_utils import EMAModel

        self.parameters = list(unet.parameters())
        self.ema = EMAModel(self.parameters, decay=decay, foreach=True)

    def state(self) -> dict[str, torch.Tensor]:
        return {f"ema.{i}": p for i, p in enumerate(self.ema.shadow_params)}

    def restore(self, tensors: dict, step: int) -> None:
        for i, shadow in enumerate(self.ema.shadow_params):
            shadow.copy_(tensors[f"ema.{i}"])  # a file holds no strides: those of the weight
        self.ema.optimization_step = step

    def after_step(self) -> None:
        self.ema.step(self.parameters)

    def copy_to(self, unet: torch.nn.Module) -> None:
        self.ema.copy_to(unet.parameters())


def _check_batch(recipe: DiffusionConfig) -> None:
    B, n = recipe.batch_size, n_processes()
    if B % n:
        raise ValueError(
            f"diffusion.batch_size: expected a multiple of {n}, the number of processes, got {B}"
        )


class StepLoss:
    """The three terms of one step, float (3,): L_DDPM, L_CBDM, alpha * L_AID.

    Everything random but dropout is drawn for the global batch, and a process, or a part of a batch
    that does not fit into memory, works on its slice of it: so the mean over them is the loss of the
    global batch whatever their number.

    L_AID looks at a predicted clean image and the distance of its features to a class centre of
    phi_0. Which image and which class the paper takes is not known to us; aid_reading chooses:

    - "own": D(x, sigma, y) of a training image under its own label y. With radius "max" every real
      image has d <= 1, so this punishes right denoising, and the cheap way out is to fool phi_0.
    - "other": D(x, sigma, y') under another label y', judged as y': no image is the right answer,
      so the term shapes what the label does instead of fighting the reconstruction.
    - "difference": D_null + 2 (D_y - D_null), D_null held fixed: only what the label adds to the
      unconditional prediction is moved, in the direction of guidance.
    - "sample": an image drawn from pure noise for y' by the network itself in a few steps, without
      gradient but for the last: what generation will show, and no reconstruction at all. It stops
      at the noise of aid_min_alpha_bar; aid_max_alpha_bar does not count.
    """

    def __init__(self, recipe: DiffusionConfig, seed: int, train, device, inputs, config):
        self.recipe, self.seed, self.device = recipe, seed, device
        self.noise = make_noise(recipe)
        self.read = batch_reader(train.images, device)
        self.seen = seen_images(train.labels, recipe.head_share, config.get("many_above"))
        self.N = len(self.seen)
        labels = np.array(train.labels)
        self.y, self.K = to_device(labels, device), len(train.class_names)
        self.shape = (train.images.shape[-1], *train.images.shape[1:3])
        seen_y = labels[self.seen]
        self.seen_y = to_device(seen_y, device)
        self.counts = np.bincount(seen_y, minlength=self.K)
        self.classes = to_device(np.flatnonzero(self.counts), device)  # of which it sees an image
        self.draw_weights = np.cumsum(self.counts[seen_y] ** -float(recipe.class_balance))
        self.levels = to_device(self._levels(), device)  # of aid_reading "sample"
        # one graph of network, phi_0 and losses; on several processes the gradients' exchange is inside
        whole = n_processes() == 1 and not is_small(recipe.preset)
        self.terms = compiled(self._terms, "diffusion", device) if whole else self._terms
        if recipe.alpha > 0:
            self.phi0 = load_classifier(inputs["extractor"], device).requires_grad_(False)
            geometry = class_geometry(self.phi0, train, config["radius"])
            self.centres, self.radii = (torch.from_numpy(a).float().to(device) for a in geometry)
            self.aid_factor = config["aid_factor"]

    def __call__(self, denoise, step: int, part: int = 0, n_parts: int = 1) -> torch.Tensor:
        """part, n_parts: of a process's share of the batch."""
        recipe, K = self.recipe, self.K
        B, part = recipe.batch_size, rank() * n_parts + part
        size = B // (n_processes() * n_parts)
        mine = slice(part * size, (part + 1) * size)
        late = step >= recipe.n_plain_steps
        tau, alpha = (recipe.tau, recipe.alpha) if late else (0.0, 0.0)

        # the batch: images, labels, noise; every draw is a function of (seed, step)
        g = generator(self.seed, "unet", "noise", step, device=self.device)
        torch.manual_seed(derive_seed(self.seed, "unet", "dropout", step, part))
        index = self._indices(step)
        eps = torch.randn(B, *self.shape, generator=g, device=self.device)[mine]
        sigma = self.noise.draw(B, g)
        y = self.y[to_device(index, self.device)]
        y = drop_labels(y, recipe.label_dropout, K, g)  # (B,)
        y_other = self._other_labels(B, g)
        flipped = torch.rand(B, generator=g, device=self.device) < (0.5 if recipe.flip else 0.0)
        x0 = self.read(index[mine])  # (size, C, H, W)
        if recipe.flip:
            x0 = torch.where(flipped[mine, None, None, None], x0.flip(-1), x0)
        changes = torch.zeros(B, N_LABELS, device=self.device)
        if recipe.augment:
            changes, maps = draw_changes(B, recipe.augment, g, self.device)
            x0 = warp(x0, changes[mine], maps[mine])

        # the noisy image, and all that the network is asked about it
        sigma_m, y_m, other_m, changes_m = sigma[mine], y[mine], y_other[mine], changes[mine]
        x = x0 + sigma_m[:, None, None, None] * eps
        asked, judged = {"own": (x, sigma_m, y_m, changes_m)}, None
        if tau > 0 or (alpha > 0 and recipe.aid_reading == "other"):
            asked["other"] = (x, sigma_m, other_m, changes_m)
        if alpha > 0 and recipe.aid_reading == "difference":
            asked["null"] = (x, sigma_m, torch.full_like(y_m, K), changes_m)
        if alpha > 0 and recipe.aid_reading == "sample":
            asked["sample"] = self._own_samples(denoise, g, y_other, mine)
        if alpha > 0:
            judged = self._judged(sigma, y, y_other, changes, mine, n_parts)

        # one forward, and the three terms
        return self.terms(denoise, asked, x0, judged, tau, alpha)

    def _terms(self, denoise, asked: dict, x0, judged, tau: float, alpha: float) -> torch.Tensor:
        """asked: (x, sigma, y, changes) by name. judged: of _judged, where alpha > 0."""
        _, sigma, y, _ = asked["own"]
        d = _ask(denoise, asked)
        l_ddpm = denoising_loss(d["own"], x0, self.noise.weight(sigma))
        l_cbdm, l_aid = l_ddpm.new_zeros(()), l_ddpm.new_zeros(())
        if tau > 0:
            w = class_balancing_weight(self.noise, sigma, tau, self.recipe.cbdm_weight)
            l_cbdm = class_balancing_loss(d["own"], d["other"], w * (y < self.K))
        if alpha > 0:
            l_aid = alpha * self._aid(d, *judged)
        return torch.stack([l_ddpm, l_cbdm, l_aid])

    def _indices(self, step: int) -> np.ndarray:
        """Training images of a step's global batch, int64 (B,): shuffled epochs, or draws by class."""
        B, purpose = self.recipe.batch_size, derive_seed(self.seed, "unet", "order")
        if self.recipe.class_balance > 0:
            return self.seen[weighted_indices(self.draw_weights, B, step, purpose)]
        return self.seen[batch_indices(self.N, B, step, purpose)]

    def _other_labels(self, n: int, g: torch.Generator) -> torch.Tensor:
        """y' of L_CBDM and of L_AID's readings, int64 (n,): classes of which the generator sees an image."""
        if self.recipe.cbdm_labels == "uniform":
            drawn = torch.randint(0, len(self.classes), (n,), generator=g, device=self.device)
            return self.classes[drawn]
        drawn = torch.randint(0, self.N, (n,), generator=g, device=self.device)
        return self.seen_y[drawn]

    def _levels(self) -> torch.Tensor:
        """Noise levels float (n,) on the way from noise to an image: Karras et al. 2022, down to the
        noise above which L_AID does not look."""
        stop = (1 / max(self.recipe.aid_min_alpha_bar, 1e-4) - 1) ** 0.5
        start = min(self.noise.sigma_max, 20.0)
        ramp = torch.linspace(start ** (1 / 7), max(stop, 0.05) ** (1 / 7), _SAMPLE_STEPS)
        return ramp**7

    @torch.no_grad()
    def _own_samples(self, denoise, g, y_other, mine: slice):
        """Images on their way from noise to every fourth label y', and where they stand:
        (x, sigma, y', changes)."""
        B, sigmas = self.recipe.batch_size, self.levels
        noise = torch.randn(B, *self.shape, generator=g, device=self.device)
        rows = _sampled(mine)
        y, x = y_other[rows], noise[rows] * sigmas[0]
        denoise.eval()
        for sigma, lower in itertools.pairwise(sigmas):
            slope = (x - denoise(x, sigma.expand(len(y)), y)) / sigma  # an Euler step
            x = x + (lower - sigma) * slope
        denoise.train()
        return x, sigmas[-1].expand(len(y)), y, x.new_zeros(len(y), N_LABELS)

    def _judged(self, sigma, y, y_other, changes, mine: slice, n_parts: int) -> tuple:
        """What L_AID judges of the images it looks at: their labels (n,), their weights (n,), 0 for
        predictions in too much noise, of changed images and for the null class, and what the sum
        is divided by.

        Args:
            sigma, y, y_other, changes: of the global batch.
        """
        recipe = self.recipe
        # a part's sum over its share of the count: the mean of the parts is the global one
        parts = n_processes() * n_parts
        if recipe.aid_reading == "sample":
            total = len(range(0, len(y), _SAMPLE_EVERY))
            labels = y_other[_sampled(mine)]
            return labels, torch.ones_like(labels, dtype=sigma.dtype), total / parts
        of_batch = y_other if recipe.aid_reading == "other" else y
        alpha_bar = 1 / (1 + sigma.square())
        heard = alpha_bar > recipe.aid_min_alpha_bar
        heard &= (alpha_bar <= recipe.aid_max_alpha_bar) & (of_batch < self.K)
        heard &= (changes == 0).all(dim=1)  # phi_0 does not know the others
        labels = of_batch[mine].clamp_max(self.K - 1)
        return labels, heard[mine].float(), heard.sum() / parts

    def _aid(self, d: dict, labels, weight, share) -> torch.Tensor:
        """L_AID of the clean images that the reading looks at. d: the network's answers."""
        reading = self.recipe.aid_reading
        x0_pred = d[{"sample": "sample", "other": "other"}.get(reading, "own")]
        if reading == "difference":
            null = d["null"].detach()
            x0_pred = null + 2 * (x0_pred - null)
        formula = AID_LOSSES[self.recipe.aid_formula]
        return formula(self._distance(x0_pred, labels), self.aid_factor, weight, share)

    def _distance(self, x0_pred, y) -> torch.Tensor:
        """d = ||phi_0(x0_pred) - mu_y|| / d_y, float (B,)."""
        return (self.phi0.features(x0_pred) - self.centres[y]).norm(dim=1) / self.radii[y]


def _sampled(mine: slice) -> slice:
    """Which rows of a slice of the global batch the "sample" reading draws an image for."""
    return slice(-(-mine.start // _SAMPLE_EVERY) * _SAMPLE_EVERY, mine.stop, _SAMPLE_EVERY)


def _ask(denoise, asked: dict) -> dict:
    """D of every (x, sigma, y, changes) in one forward, by name."""
    joined = (torch.cat(parts) for parts in zip(*asked.values(), strict=True))
    sizes = [len(part[2]) for part in asked.values()]
    return dict(zip(asked, denoise(*joined).split(sizes), strict=True))


def drop_labels(y, rate: float, n_classes: int, g: torch.Generator) -> torch.Tensor:
    """Replace each label by the null class n_classes with probability rate, one coin per sample."""
    dropped = torch.rand(len(y), generator=g, device=g.device) < rate
    return torch.where(dropped, torch.full_like(y, n_classes), y)


def seen_images(labels, head_share: float, many_above: int | None) -> np.ndarray:
    """Indices int64 of the training images that the generator sees: of each class with more than
    many_above images only the first head_share (docs/protocol.md, DiffuLT: table 4).

    Raises:
        ValueError: it would see none.
    """
    labels = np.asarray(labels)
    counts = np.bincount(labels)
    rank_in_class = np.empty(len(labels), dtype=np.int64)
    for c in range(len(counts)):
        rank_in_class[labels == c] = np.arange(counts[c])
    head = counts[labels] > (many_above or counts.max())
    seen = np.flatnonzero(~head | (rank_in_class < head_share * counts[labels]))
    if not len(seen):
        raise ValueError(
            f"diffusion.head_share: expected a share that leaves the generator an image, got {head_share:g} where "
            f"each class has more than {many_above} images (data.many_above); raise either"
        )
    return seen
