"""Sample types ID / AID / OOD in the feature space of phi_0, and which generated samples are kept
(stage 4)."""

import json

import numpy as np

from ..config import FilterConfig
from ..data.long_tail import load_split
from ..engine.files import writable
from ..recognition.classifier import extract_chunks, load_classifier
from ..recognition.geometry import class_geometry, relative_distance

__all__ = [
    "KEEP_RULES",
    "TYPES",
    "build_types",
    "kept_name",
    "sample_types",
]

TYPES = ("ID", "AID", "OOD")
KEEP_RULES = {"all": (0, 1, 2), "id": (0,), "aid": (1,), "ood": (2,), "id+aid": (0, 1)}


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
