"""Classifiers: phi_0 (stage 1) and the final one on real + generated images (stage 5), and weighted
cross-entropy."""

import json
import math
from pathlib import Path

import numpy as np
import torch

from ..config import ClassifierConfig
from ..data.augment import augment, mix
from ..data.crops import NO_IMAGES, NO_ROWS, CropSource, centre_crops, n_workers_for
from ..data.long_tail import StackedImages, batch_reader, load_split, to_float
from ..engine import loop
from ..engine.device import compiled, to_device
from ..engine.files import save_tensors
from ..engine.precision import half_precision
from ..engine.seeding import batch_indices, derive_seed
from .methods import heads_of, make_objective
from .networks import Backbone, make_backbone

__all__ = [
    "build_classifier",
    "build_extractor",
    "extract",
    "extract_chunks",
    "image_files",
    "load_classifier",
    "predict",
    "logits_split",
    "train_on",
]


def build_extractor(work, config: dict, inputs: dict, context) -> None:
    """Stage 1: phi_0, plain cross-entropy on the long-tailed data. Pipeline.train_on_real builds its
    classifiers here too, whatever their method."""
    train = load_split(inputs["data"], "train")
    weights = np.ones(len(train.labels), dtype=np.float32)
    source = _source(config, train, NO_IMAGES, NO_ROWS, context)
    K = len(train.class_names)
    train_on(work, config, source, train.labels, weights, K, "phi_0", context)


def build_classifier(work, config: dict, inputs: dict, context) -> None:
    """Stage 5: the final classifier from scratch on real images (weight 1) and generated ones (weight
    omega): those that config["kept"] names in inputs["types"], or all where it is None.

    omega is a weight of the loss alone: with omega = 0 the generated images teach nothing, but they still
    fill most of each batch, and batch norm sees them.
    """
    train, samples = load_split(inputs["data"], "train"), inputs["samples"]
    generated_y = np.asarray(samples.array("labels"))
    kept = np.arange(len(generated_y))
    if config["kept"]:
        kept = np.asarray(inputs["types"].array(config["kept"]))
    labels = np.concatenate([train.labels, generated_y[kept]])
    weights = np.ones(len(labels), dtype=np.float32)
    weights[len(train.labels) :] = config["classifier"]["omega"]
    source = _source(config, train, samples.array("images"), kept, context)
    K = len(train.class_names)
    train_on(work, config, source, labels, weights, K, "classifier", context)


def _source(config: dict, train, generated, kept, context):
    """Real images and then the kept rows of the generated ones: one array, or the real ones' files
    where crops of files are asked for."""
    size = config["classifier"]["crop_size"]
    if not size:
        return StackedImages((train.images, None), (generated, kept))
    files = image_files(train, Path(context.data_dir) / config["path"])
    workers = n_workers_for(context.threads)
    return CropSource(files, generated, kept, size, context.device, workers)


def image_files(split, root: Path) -> list[Path]:
    """The files that a split was read from."""
    if split.files is None:
        raise ValueError(
            "crop_size: expected data that are image files (imagenet_lt or a folder); use 0 here"
        )
    return [root / name for name in split.files]


def train_on(
    work, config: dict, source, labels, weights, n_classes: int, what: str, context
) -> None:
    """Train config["classifier"] and write it to work/out.

    Args:
        source: uint8 images (N, H, W, C), as an array or StackedImages, or a CropSource. labels: int64 (N,).
            weights: float32 (N,), see losses. what: names the run in its draws, its progress bar and
            its errors.
    """
    recipe, seed = ClassifierConfig.model_validate(config["classifier"]), config["seed"]
    device = torch.device(context.device)
    info = _network_facts(recipe, source, n_classes)
    # A generated image counts as much in the prior as it weighs in the loss.
    counts = np.bincount(labels, weights=weights, minlength=n_classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, what, "init"))
        objective = make_objective(recipe, make_backbone(**info), counts).to(device)
    trained = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(
        trained, recipe.lr, 0.9, weight_decay=recipe.weight_decay, nesterov=recipe.nesterov
    )
    net = objective.net
    net.features = compiled(net.features, what, device)
    y, w = to_device(labels, device), to_device(weights, device)
    half, order = half_precision(recipe.precision, device.type), derive_seed(seed, what, "order")
    batches = None

    def indices(k: int) -> np.ndarray:
        return batch_indices(len(labels), recipe.batch_size, k, order)

    def step(k: int) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal batches
        if batches is None:  # from here on, in order: crops of files are read ahead
            steps = range(k, recipe.n_steps)
            batches = _views(
                source, recipe, indices, steps, objective.n_views, (seed, what), device
            )
        # the batch: augmented views, labels, weights
        index, views, lam = to_device(indices(k), device), next(batches), 1.0
        if recipe.mix != "none":
            views[0], lam = mix(views[0], recipe.mix, derive_seed(seed, what, "mix", k))
        # forward and the weighted loss
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss = objective(views, y[index], w[index], k, lam)
        return loss, loss

    named = {"work": work, "identity": config, "what": f"{what}, seed {seed}"}
    part = "extractor" if what == "phi_0" else "classifier"
    curve = loop.run(
        step, objective, optimizer, recipe,
        **named, setting=f"{part}.batch_size", context=context,
    )  # fmt: skip
    out = work / "out"
    save_tensors(out / "model.safetensors", objective.net.state_dict())
    np.save(out / "loss.npy", curve[:, 0].cpu().numpy())
    (out / "model.json").write_text(json.dumps({**info, "crop_size": recipe.crop_size}))


def _network_facts(recipe: ClassifierConfig, source, n_classes: int) -> dict:
    """Arguments of make_backbone."""
    channels = 3 if isinstance(source, CropSource) else source.shape[-1]
    info = {"arch": recipe.arch, "n_classes": n_classes, "in_channels": channels}
    return info | {"width": recipe.width, **heads_of(recipe)}


def _views(source, recipe: ClassifierConfig, indices, steps: range, n_views: int, purpose, device):
    """Augmented views of each step in turn: lists of n_views tensors float (B, C, H, W)."""
    seed, what = purpose
    if isinstance(source, CropSource):
        yield from source.batches(indices, steps, derive_seed(seed, what), n_views)
        return
    read = batch_reader(source, device)
    for step in steps:
        x = read(indices(step))
        views = [augment(x, recipe, recipe.policy, recipe.cutout, seed, what, step, 0)]
        if n_views == 2:
            views.append(augment(x, recipe, recipe.second_policy, 0, seed, what, step, 1))
        yield views


def load_classifier(artifact, device: str = "cpu") -> Backbone:
    """A trained classifier in evaluation mode."""
    info = artifact.json("model")
    info.pop("crop_size", None)  # how it reads images, not what it is
    model = make_backbone(**info)
    model.load_state_dict(artifact.tensors("model"))
    return model.to(device).eval()


@torch.no_grad()
def extract_chunks(model: Backbone, images: np.ndarray, batch_size: int | None = None):
    """As extract, a batch at a time: (slice of rows, features, logits)."""
    batch_size = batch_size or min(1024, max(16, 2**20 // math.prod(images.shape[1:3])))
    device = next(model.parameters()).device
    for start in range(0, len(images), batch_size):
        part = slice(start, min(start + batch_size, len(images)))
        f = model.features(to_float(to_device(images[part], device)))
        yield part, f.cpu().numpy(), model.logits(f).cpu().numpy()


def extract(
    model: Backbone, images: np.ndarray, batch_size: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """features float32 (N, D) and logits float32 (N, K) of uint8 images (N, H, W, C), in evaluation
    mode. batch_size: None is 1,024 small images, and fewer large ones."""
    features = np.empty((len(images), model.n_features), np.float32)
    logits = np.empty((len(images), model.n_classes), np.float32)
    for part, *found in extract_chunks(model, images, batch_size):
        features[part], logits[part] = found
    return features, logits


def predict(model: Backbone, images: np.ndarray) -> np.ndarray:
    """Predicted classes int64 (N,)."""
    predicted = np.empty(len(images), np.int64)
    for part, _, logits in extract_chunks(model, images):
        predicted[part] = logits.argmax(axis=1)
    return predicted


@torch.no_grad()
def logits_split(artifact, split, root: Path, context) -> np.ndarray:
    """Logits float32 (N, K) of a trained classifier on a LongTail, read as the classifier reads images:
    from the arrays, or the centre of each file below root."""
    model = load_classifier(artifact, context.device_here)
    size = artifact.json("model").get("crop_size", 0)
    if not size:
        return extract(model, split.images)[1]
    workers = n_workers_for(context.threads)
    batches = centre_crops(image_files(split, root), size, context.device_here, workers)
    return np.concatenate([model(x).cpu().numpy() for x in batches])
