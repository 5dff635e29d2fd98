"""Where a class lies in the feature space of phi_0: centres, radii, and distances relative to them."""

from collections.abc import Callable

import numpy as np

from .classifier import extract_chunks

__all__ = ["class_geometry", "geometry", "relative_distance"]


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
