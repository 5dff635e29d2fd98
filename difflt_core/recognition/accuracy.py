"""Accuracy overall, by shot group and by class; mean and spread."""

import numpy as np

from ..data.long_tail import shot_groups

__all__ = [
    "class_accuracy",
    "confusion",
    "group_accuracy",
]


def group_accuracy(
    predicted, labels, class_counts, many_above: int = 100, few_below: int = 20
) -> dict[str, float]:
    """Top-1 accuracy in %: overall, and the mean of the per-class accuracies of each group (nan for
    an empty group).

    Args:
        predicted, labels: int (N,). class_counts: training images per class (K,), which define the
            groups.
    """
    predicted, labels = np.asarray(predicted), np.asarray(labels)
    per_class = class_accuracy(predicted, labels, len(class_counts))
    result = {"overall": 100 * float((predicted == labels).mean())}
    for name, classes in shot_groups(class_counts, many_above, few_below).items():
        result[name] = float(per_class[classes].mean()) if len(classes) else float("nan")
    return result


def class_accuracy(predicted, labels, n_classes: int) -> np.ndarray:
    """Share in % of each class's images that are recognised, float64 (K,); nan for an empty class."""
    return np.diag(confusion(predicted, labels, n_classes))


def confusion(predicted, labels, n_classes: int) -> np.ndarray:
    """Share in % of class c's images (row) that are put into each class (column), (K, K)."""
    from sklearn.metrics import confusion_matrix

    with np.errstate(invalid="ignore"):
        counts = confusion_matrix(labels, predicted, labels=np.arange(n_classes))
        return 100 * counts / counts.sum(axis=1, keepdims=True)
