"""Accuracy overall, by shot group and by class; distances between sets of images; mean and spread.

FID, KID and precision / recall compare features, float (N, D): those of phi_0 (classifiers.extract)
where the Inception network is not at hand. A table must say which, how many images, and against
which reference set.
"""

import warnings

import numpy as np
import torch

from .data import shot_groups

__all__ = [
    "class_accuracy",
    "confusion",
    "fid",
    "group_accuracy",
    "inception_score",
    "kid",
    "mean_spread",
    "precision_recall",
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


def mean_spread(values) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1; nan for one value)."""
    values = np.asarray(list(values), dtype=np.float64)
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else float("nan")


def confusion(predicted, labels, n_classes: int) -> np.ndarray:
    """Share in % of class c's images (row) that are put into each class (column), (K, K)."""
    from sklearn.metrics import confusion_matrix

    with np.errstate(invalid="ignore"):
        counts = confusion_matrix(labels, predicted, labels=np.arange(n_classes))
        return 100 * counts / counts.sum(axis=1, keepdims=True)


def fid(real, fake) -> float:
    """Frechet distance of two feature sets, float (N, D) and (M, D) (Heusel et al. 2017), in float64.

    The trace of the root of S1 S2 comes from symmetric eigenvalues: the same number as scipy's
    sqrtm, several times as fast at D = 2048.

    Raises:
        ValueError: fewer than two rows, or different D.
    """
    real, fake = _pair(real, fake)
    offset = (real.mean(dim=0) - fake.mean(dim=0)).square().sum()
    D = real.shape[1]
    s1, s2 = torch.cov(real.T).reshape(D, D), torch.cov(fake.T).reshape(D, D)
    values, vectors = torch.linalg.eigh(s1)
    root = vectors * values.clamp_min(0).sqrt()  # root @ root.T = s1
    shared = torch.linalg.eigvalsh(root.T @ s2 @ root).clamp_min(0).sqrt().sum()
    return float(offset + s1.trace() + s2.trace() - 2 * shared)


def kid(real, fake, n_subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> float:
    """Mean squared MMD with the cubic kernel over random subsets (Binkowski et al. 2018)."""
    from torchmetrics.image.kid import KernelInceptionDistance

    real, fake = _pair(real, fake)
    as_it_is = torch.nn.Identity()
    as_it_is.num_features = real.shape[1]
    size = min(subset_size, len(real), len(fake))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # torchmetrics warns that features are kept in memory
        torch.manual_seed(seed)
        distance = KernelInceptionDistance(as_it_is, subsets=n_subsets, subset_size=size)
        distance.set_dtype(torch.float64)
        distance.update(real, real=True)
        distance.update(fake, real=False)
        return float(distance.compute()[0])


def inception_score(logits, n_splits: int = 10) -> float:
    """exp of the mean KL between p(y|x) and p(y), averaged over splits. logits: float (N, K)."""
    p = torch.as_tensor(np.asarray(logits, np.float64)).softmax(dim=1)
    scores = [
        (part * (part.log() - part.mean(dim=0).log())).sum(dim=1).mean().exp()
        for part in p.tensor_split(min(n_splits, len(p)))
    ]
    return float(torch.stack(scores).mean())


def precision_recall(real, fake, k: int = 5) -> tuple[float, float]:
    """Improved precision and recall in % (Kynkaanniemi et al. 2019): the share of fake features
    within the k-th-neighbour radius of some real one, and the other way round."""
    return _covered(real, fake, k), _covered(fake, real, k)


def _covered(reference, queries, k: int, rows: int = 1024) -> float:
    reference, queries = (torch.as_tensor(np.asarray(a, np.float64)) for a in (reference, queries))
    if len(reference) <= k:
        raise ValueError(
            f"precision_recall: expected more than k = {k} images, got {len(reference)}"
        )
    radius = torch.cat(  # the first neighbour is the point itself
        [torch.cdist(part, reference).kthvalue(k + 1).values for part in reference.split(rows)]
    )
    inside = [(torch.cdist(part, reference) <= radius).any(dim=1) for part in queries.split(rows)]
    return 100 * float(torch.cat(inside).double().mean())


def _pair(real, fake) -> tuple[torch.Tensor, torch.Tensor]:
    """Both sets as float64 tensors."""
    real, fake = (torch.as_tensor(np.asarray(a, np.float64)) for a in (real, fake))
    if real.shape[1] != fake.shape[1] or min(len(real), len(fake)) < 2:
        raise ValueError(
            "expected two sets of at least two features of equal width, got shapes "
            f"{tuple(real.shape)} and {tuple(fake.shape)}"
        )
    return real, fake
