"""Sample types ID / AID / OOD in the feature space of phi_0, and which generated samples are kept
(stage 4)."""

import json
from collections.abc import Callable

import numpy as np

from .classifiers import extract_chunks, load_classifier
from .config import FilterConfig
from .data import load_split
from .store import writable

__all__ = [
    "KEEP_RULES",
    "TYPES",
    "build_types",
    "class_geometry",
    "kept_name",
    "relative_distance",
    "sample_types",
]

TYPES = ("ID", "AID", "OOD")
KEEP_RULES = {"all": (0, 1, 2), "id": (0,), "aid": (1,), "ood": (2,), "id+aid": (0, 1)}


def class_geometry(model, train, radius: str = "max") -> tuple[np.ndarray, np.ndarray]:
    """Class centres float64 (K, D) and radii float64 (K,) of the real training images under phi_0.

    Args:
        radius: "max": d_c = largest distance of the class's images to their centre, as in the
            paper. "shrunk": for small classes drawn towards the median radius, because a maximum
            over few images is too small.
    """

    def chunks():
        for part, features, _ in extract_chunks(model, train.images):
            yield features, train.labels[part]

    return _geometry(chunks, train.class_counts, radius)


def geometry(
    features, labels, n_classes: int, radius: str = "max"
) -> tuple[np.ndarray, np.ndarray]:
    """As class_geometry, from features (N, D) and labels (N,). A radius of 0 or undefined becomes
    the median of the rest.

    Raises:
        ValueError: a class without an image has no centre.
    """
    counts = np.bincount(labels, minlength=n_classes)
    return _geometry(lambda: [(np.asarray(features), np.asarray(labels))], counts, radius)


def _geometry(chunks: Callable, counts: np.ndarray, radius: str) -> tuple[np.ndarray, np.ndarray]:
    """chunks: gives (features, labels) in parts, twice: for the centres and for the radii."""
    if (counts == 0).any():
        raise ValueError(
            f"classes {np.flatnonzero(counts == 0).tolist()} have no image: no centre can be computed"
        )
    total, radii = None, np.zeros(len(counts))
    for features, labels in chunks():
        if total is None:  # float64 sums of float32 are exact, so copies of an image have radius 0
            total = np.zeros((len(counts), features.shape[1]))
        np.add.at(total, labels, features)
    centres = total / counts[:, None]
    for features, labels in chunks():
        distance = np.linalg.norm(features - centres[labels], axis=1)
        np.maximum.at(radii, labels, distance)
    good = radii > 0
    if not good.any():
        raise ValueError(
            "every class radius is 0 (copies of one image per class): sample types are undefined"
        )
    radii[~good] = np.median(radii[good])
    if radius == "shrunk":
        weight = counts / (counts + np.median(counts))
        radii = weight * radii + (1 - weight) * np.maximum(radii, np.median(radii))
    return centres, radii


def relative_distance(features, labels, centres, radii) -> np.ndarray:
    """d = ||f - mu_y|| / d_y, float64 (N,)."""
    return (
        np.linalg.norm(np.asarray(features, np.float64) - centres[labels], axis=1) / radii[labels]
    )


def sample_types(d, aid_factor: float = 2.0) -> np.ndarray:
    """0 = ID (d <= 1), 1 = AID (1 < d <= aid_factor), 2 = OOD; int8 (N,). A d that is not a number
    is OOD."""
    d = np.asarray(d)
    return np.where(d <= 1, 0, np.where(d <= aid_factor, 1, 2)).astype(np.int8)


def kept_name(rule: str) -> str:
    """Name of the array with the indices that a rule keeps."""
    return f"kept_{rule.replace('+', '_and_')}"


def build_types(work, config: dict, inputs: dict, context) -> None:
    """Stage 4. inputs: data, extractor, samples. Writes d, type, phi_0's predictions and the kept
    indices of each rule."""
    recipe = FilterConfig.model_validate(config["filtering"])
    model = load_classifier(inputs["extractor"], context.device)
    train = load_split(inputs["data"], "train")
    centres, radii = class_geometry(model, train, recipe.radius)
    labels = np.asarray(inputs["samples"].array("labels"))
    out, images = work / "out", inputs["samples"].array("images")
    d, predicted = np.empty(len(labels)), np.empty(len(labels), np.int64)
    features = writable(out / "features.npy", np.float32, (len(labels), model.n_features))
    for part, found, logits in extract_chunks(model, images):
        features[part], predicted[part] = found, logits.argmax(axis=1)
        d[part] = relative_distance(found, labels[part], centres, radii)
    types = sample_types(d, recipe.aid_factor)
    arrays = {
        "d": d,
        "type": types,
        "predicted": predicted,
        "centres": centres,
        "radii": radii,
    }
    arrays |= {
        kept_name(rule): np.flatnonzero(np.isin(types, wanted))
        for rule, wanted in KEEP_RULES.items()
    }
    for name, array in arrays.items():
        np.save(out / f"{name}.npy", array)
    (out / "info.json").write_text(json.dumps({"counts": np.bincount(types, minlength=3).tolist()}))
