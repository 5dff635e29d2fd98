"""Accuracy overall and by shot group; mean and spread over seeds."""

import numpy as np

from .data import shot_groups

__all__ = ["group_accuracy", "mean_spread"]


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
    right = predicted == labels
    per_class = np.array(
        [
            right[labels == c].mean() if (labels == c).any() else np.nan
            for c in range(len(class_counts))
        ]
    )
    result = {"overall": 100 * float(right.mean())}
    for name, classes in shot_groups(class_counts, many_above, few_below).items():
        result[name] = 100 * float(per_class[classes].mean()) if len(classes) else float("nan")
    return result


def mean_spread(values) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1; nan for one value)."""
    values = np.asarray(list(values), dtype=np.float64)
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else float("nan")
