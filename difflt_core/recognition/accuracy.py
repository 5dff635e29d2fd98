"""Accuracy overall, by shot group and by class, and calibration."""

import numpy as np

from ..data.long_tail import shot_groups

__all__ = [
    "calibration",
    "class_accuracy",
    "confusion",
    "group_accuracy",
]


def group_accuracy(
    predicted, labels, class_counts, many_above: int = 100, few_below: int = 20
) -> dict[str, float]:
    """Top-1 accuracy in %: overall, and the mean of the per-class accuracies of each group, over its
    classes that have test images (nan where there is none).

    Args:
        predicted, labels: int (N,). class_counts: training images per class (K,), which define the
            groups.
    """
    predicted, labels = np.asarray(predicted), np.asarray(labels)
    per_class = class_accuracy(predicted, labels, len(class_counts))
    result = {"overall": 100 * float((predicted == labels).mean())}
    for name, classes in shot_groups(class_counts, many_above, few_below).items():
        tested = per_class[classes][~np.isnan(per_class[classes])]
        result[name] = float(tested.mean()) if len(tested) else float("nan")
    return result


def class_accuracy(predicted, labels, n_classes: int) -> np.ndarray:
    """Share in % of each class's images that are recognised, float64 (K,); nan for an empty class."""
    return np.diag(confusion(predicted, labels, n_classes))


def calibration(probabilities, labels, n_bins: int = 10) -> tuple[dict[str, np.ndarray], float]:
    """How far a classifier's probabilities can be believed (Guo et al. 2017): bins of equal width by the
    probability of the predicted class.

    Args:
        probabilities: float (N, K), rows that sum to 1. labels: int (N,).

    Returns:
        by bin, (n_bins,): images (number), confidence (mean probability of the predicted class) and
        accuracy, both in %, nan for an empty bin; and the expected calibration error in points, the mean
        of |accuracy - confidence| weighted by images.
    """
    probabilities, labels = np.asarray(probabilities, np.float64), np.asarray(labels)
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    bins = np.minimum((confidence * n_bins).astype(int), n_bins - 1)
    images = np.bincount(bins, minlength=n_bins)
    with np.errstate(invalid="ignore"):
        mean, share = (
            100 * np.bincount(bins, weights=w, minlength=n_bins) / images
            for w in (confidence, right)
        )
    error = float(np.nansum(images * np.abs(share - mean)) / max(1, len(labels)))
    return {"images": images, "confidence": mean, "accuracy": share}, error


def confusion(predicted, labels, n_classes: int) -> np.ndarray:
    """Share in % of class c's images (row) that are put into each class (column), (K, K)."""
    from sklearn.metrics import confusion_matrix

    with np.errstate(invalid="ignore"):
        counts = confusion_matrix(labels, predicted, labels=np.arange(n_classes))
        return 100 * counts / counts.sum(axis=1, keepdims=True)
