"""How good generated images are: FID, KID, precision and recall, over all images and by class; in
which features, against which images, whose words stand in every table; and whether they are copies.

The distances compare features, float (N, D): those of phi_0, or of the Inception network. They see
no labels. On images that fill a long tail they would reward wrong ones (real digits of frequent
classes, called rare, make the set more balanced), so they are measured on a separate draw, with
equally many images of each class.
"""

import hashlib
import io
import urllib.error
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from ..data.long_tail import LongTail, load_split
from ..recognition.classifier import extract, load_classifier
from .memorisation import Memorisation, memorisation

__all__ = [
    "INCEPTION",
    "Quality",
    "balanced_rows",
    "check_inception",
    "class_fid",
    "fid",
    "held_out",
    "inception_features",
    "kid",
    "load_inception",
    "precision_recall",
    "rows_alike",
]

PRC_IMAGES = 10_000  # of either set, for precision and recall
NEIGHBOURS = 5  # of a feature, whose distance is the radius there
# The network of the original FID code, converted by torch-fidelity; its name ends in 8 digits of its
# sha256.
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"


class Quality:
    """Scores in the feature space and against the reference set of a pipeline's config.metrics.

    What is scored, `drawn`, is a variant of the pipeline, whose quality_samples() are taken; or the
    artifact of such a draw; or images uint8 (N, H, W, C) with labels int64 (N,). All classes have
    equally many images, else ValueError.

    Args:
        pipeline: gives phi_0 (of its first seed: one space for all repeats) and the reference, but for
            variants of another draw of the long tail, which have their own.
    """

    def __init__(self, pipeline):
        self.config, self.context = pipeline.config.metrics, pipeline.store.context
        self.pipeline = pipeline.vary({"seed": pipeline.config.seeds[0]})
        self._drawn: dict[str, tuple[LongTail, np.ndarray]] = {}  # by the key of a draw's data

    def scores(self, drawn, labels=None) -> dict[str, float]:
        """FID, KID, and improved precision and recall in %."""
        fake, real = self.features(self._balanced(drawn, labels)[0]), self._reference_of(drawn)[1]
        precision, recall = precision_recall(real, fake, device=self.context.device_here)
        return {
            "FID": fid(real, fake),
            "KID": kid(real, fake),
            "precision": precision,
            "recall": recall,
        }

    def check(self) -> None:
        """Raise now what would come up after the training: no balanced reference, too few images of it or
        to be generated, no Inception network."""
        if self.config.reference == "balanced train":
            self.pipeline.balanced("fid_reference = balanced train")
        n_drawn = self._K * self.config.n_per_class
        sizes = {"fid_reference": len(self.reference.labels), "metrics.n_per_class": n_drawn}
        for setting, n in sizes.items():
            if n <= NEIGHBOURS:
                raise ValueError(
                    f"{setting}: FID, precision and recall expect more than {NEIGHBOURS} images, got {n}; "
                    "take more data, or leave this notebook out"
                )
        if self.config.features == "inception":
            _ = self._inception

    def class_fid(self, drawn, labels=None) -> np.ndarray:
        """FID of each class's images against the reference images of that class, float64 (K,); nan
        where there are too few of either (see class_fid)."""
        images, labels = self._balanced(drawn, labels)
        reference, real = self._reference_of(drawn)
        return class_fid(real, reference.labels, self.features(images), labels, self._K)

    def memorisation(self, variant) -> Memorisation:
        """Whether the quality_samples() of a variant repeat its training images (or their mirror
        images, where it was trained on them too): their nearest distances, beside those of held-out
        images with labels as balanced."""
        drawn, others = self.compared(variant)
        train, flip = load_split(variant.data(), "train").images, variant.config.diffusion.flip
        return memorisation(drawn, others, train, self.context.device_here, mirrored=flip)

    def compared(self, variant) -> tuple[np.ndarray, np.ndarray]:
        """The images uint8 (N, H, W, C) and (M, H, W, C) that memorisation compares: of quality_samples()
        and held out, of the classes that both have; test images of a class without validation images."""
        images, labels = self._balanced(variant)
        val, test = (load_split(variant.data(), name) for name in ("val", "test"))
        alone = ~np.isin(test.labels, val.labels)
        others = np.concatenate([val.images, test.images[alone]])
        made, kept = rows_alike(labels, np.concatenate([val.labels, test.labels[alone]]))
        return images[made], others[kept]

    def features(self, images: np.ndarray) -> np.ndarray:
        """float32 (N, D) of uint8 images (N, H, W, C)."""
        if self.config.features == "inception":
            return inception_features(self._inception, images)
        return extract(self._phi0, images)[0]

    @cached_property
    def real(self) -> np.ndarray:
        """Features of the reference images."""
        return self.features(self.reference.images)

    @cached_property
    def reference(self) -> LongTail:
        """The images that generated ones are compared with."""
        return self._look_up(self.pipeline)

    def _look_up(self, pipeline) -> LongTail:
        kind, data = self.config.reference, pipeline.data()
        if kind == "balanced train":
            data = pipeline.balanced("fid_reference = balanced train").data()
        return held_out(data) if kind == "held-out" else load_split(data, "train")

    def _reference_of(self, drawn) -> tuple[LongTail, np.ndarray]:
        """The reference, and its features, of what is drawn: what one draw of the long tail leaves out
        another one trains on."""
        key = drawn.data().key if hasattr(drawn, "quality_samples") else self.pipeline.data().key
        if key == self.pipeline.data().key:
            return self.reference, self.real
        if key not in self._drawn:
            reference = self._look_up(drawn)
            self._drawn[key] = reference, self.features(reference.images)
        return self._drawn[key]

    def words(self, n_generated: int | None = None) -> str:
        """For the caption of a table: the features, how many generated images against how many of
        what, and where the reference is not balanced.

        Args:
            n_generated: N; None is what quality_samples() draws, K * config.metrics.n_per_class.
        """
        n_generated = self._K * self.config.n_per_class if n_generated is None else n_generated
        space = {"phi_0": "features of the first seed's phi_0", "inception": "Inception features"}
        counts, kind = self.reference.class_counts, self.config.reference
        where = self.reference.split if kind == "held-out" else kind
        text = f"{space[self.config.features]}, {n_generated} generated images with balanced labels"
        text += f" against {counts.sum()} of {where}"
        if max(n_generated, counts.sum()) > PRC_IMAGES:
            text += f" (precision and recall: {PRC_IMAGES} of either at most, drawn at random)"
        if counts.min() == counts.max():
            return text
        return f"{text}, which are not balanced ({counts.min()} to {counts.max()} of a class)"

    def _balanced(self, drawn, labels=None) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 (N, H, W, C) and labels int64 (N,) of what is to be scored, checked."""
        if hasattr(drawn, "quality_samples"):
            drawn = drawn.quality_samples()
        if labels is None and isinstance(drawn, np.ndarray):
            raise ValueError("quality: expected images with their labels, got images alone")
        if labels is None:
            drawn, labels = drawn.array("images"), drawn.array("labels")
        labels = np.asarray(labels)
        if len(labels) != len(drawn):
            raise ValueError(
                f"quality: expected a label for each image, got {len(labels)} for {len(drawn)}"
            )
        counts = np.bincount(labels, minlength=self._K)
        if counts.min() != counts.max():
            raise ValueError(
                "quality: expected as many images of each class, got "
                f"{counts.min()} to {counts.max()}; score quality_samples(), not the fill set"
            )
        return drawn, labels

    @property
    def _K(self) -> int:
        return len(self.reference.class_names)

    @cached_property
    def _phi0(self):
        return load_classifier(self.pipeline.train_extractor(), self.context.device_here)

    @cached_property
    def _inception(self):
        path = Path(self.context.data_dir) / INCEPTION
        return load_inception(path, self.context.device_here, self.context.download)


def held_out(data) -> LongTail:
    """The real images of a data artifact that nothing was trained on: the validation part, or the
    test part where there is none."""
    validation = load_split(data, "val")
    return validation if len(validation.labels) else load_split(data, "test")


def balanced_rows(labels) -> np.ndarray:
    """Rows int64 (N,), ascending, of the first n images of each class that is there; n is what the
    rarest one has. labels: int (M,)."""
    classes, counts = np.unique(labels, return_counts=True)
    rows = [np.flatnonzero(labels == c)[: counts.min()] for c in classes]
    return np.sort(np.concatenate(rows)) if rows else np.zeros(0, np.int64)


def rows_alike(labels, others, classes=None) -> tuple[np.ndarray, np.ndarray]:
    """Rows int64 of two sets whose labels are then distributed alike, as near copies are counted: of
    the classes that both have, as many of each within a set.

    Args:
        labels, others: int (N,) and (M,). classes: of these alone; None is all.
    """
    shared = np.intersect1d(labels, others)
    shared = shared if classes is None else np.intersect1d(shared, classes)
    found = []
    for y in (np.asarray(labels), np.asarray(others)):
        rows = np.flatnonzero(np.isin(y, shared))
        found.append(rows[balanced_rows(y[rows])])
    return found[0], found[1]


def fid(real, fake) -> float:
    """Frechet distance of two feature sets, float (N, D) and (M, D) (Heusel et al. 2017), float64.

    Raises:
        ValueError: fewer than two rows, or different D.
    """
    from torch_fidelity import metric_fid

    found = map(metric_fid.fid_features_to_statistics, _pair(real, fake))
    return metric_fid.fid_statistics_to_metric(*found, verbose=False)[metric_fid.KEY_METRIC_FID]


def class_fid(real, real_labels, fake, fake_labels, n_classes: int) -> np.ndarray:
    """FID of each class's features, float64 (K,): what a wrong label costs, which FID of all images
    at once does not see.

    nan where a class has fewer than D + 1 images on either side: fewer leave the covariance
    singular, and FID tells then of the number of images.

    Args:
        real, fake: float (N, D) and (M, D). real_labels, fake_labels: int (N,) and (M,) in 0..K-1.
    """
    real, fake = np.asarray(real), np.asarray(fake)
    real_labels, fake_labels = np.asarray(real_labels), np.asarray(fake_labels)
    result, enough = np.full(n_classes, np.nan), real.shape[1] + 1
    for c in range(n_classes):
        a, b = real[real_labels == c], fake[fake_labels == c]
        if min(len(a), len(b)) >= enough:
            result[c] = fid(a, b)
    return result


def kid(real, fake, n_subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> float:
    """Mean squared MMD with the cubic kernel over random subsets (Binkowski et al. 2018); unbiased,
    so it may fall below 0.

    Args:
        real, fake: float (N, D), (M, D). subset_size: at most; the smaller set bounds it.

    Raises:
        ValueError: as for fid.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    real, fake = _pair(real, fake)
    size = min(subset_size, len(real), len(fake))
    if size == max(len(real), len(fake)):
        n_subsets = 1  # each subset would be everything
    found = kid_features_to_metric(
        real, fake, kid_subsets=n_subsets, kid_subset_size=size, rng_seed=seed, verbose=False
    )
    return found[KEY_METRIC_KID_MEAN]


def precision_recall(
    real, fake, k: int = NEIGHBOURS, at_most: int = PRC_IMAGES, device: str = "cpu"
) -> tuple[float, float]:
    """Improved precision and recall in % (Kynkaanniemi et al. 2019): the share of fake features
    within the k-th-neighbour radius of some real one, and the other way round.

    Args:
        real, fake: float (N, D), (M, D). k: neighbours, the point itself not counted. at_most: rows of
            either set, drawn at random from a larger one: the cost grows with their product.

    Raises:
        ValueError: k images or fewer in a set, or as for fid.
    """
    from torch_fidelity import metric_prc as prc

    draw = np.random.default_rng(0)
    real, fake = (
        x if len(x) <= at_most else x[np.sort(draw.choice(len(x), at_most, replace=False))]
        for x in (np.asarray(real), np.asarray(fake))
    )
    real, fake = (x.to(device) for x in _pair(real, fake))
    N = min(len(real), len(fake))
    if N <= k:
        raise ValueError(f"precision_recall: expected more than k = {k} images, got {N}")
    rows = max(64, 2**24 // max(len(real), len(fake)))  # a block of distances holds 128 MiB
    found = prc.prc_features_to_metric(
        fake, real, prc_neighborhood=k, prc_batch_size=rows, save_cpu_ram=True, verbose=False
    )
    return 100 * found[prc.KEY_METRIC_PRECISION], 100 * found[prc.KEY_METRIC_RECALL]


def _check_pair(real, fake) -> None:
    shapes = np.shape(real), np.shape(fake)
    if shapes[0][1] != shapes[1][1] or min(shapes[0][0], shapes[1][0]) < 2:
        raise ValueError(
            "expected two sets of at least two features of equal width, got shapes "
            f"{shapes[0]} and {shapes[1]}"
        )


def _pair(real, fake) -> tuple[torch.Tensor, torch.Tensor]:
    """Both sets as float64 tensors."""
    _check_pair(real, fake)
    return tuple(torch.as_tensor(np.asarray(a, np.float64)) for a in (real, fake))


def check_inception(path: Path, download: bool = False) -> None:
    """Raise FileNotFoundError where there are no weights at path and none may be downloaded."""
    if path.exists() or download:
        return
    from torch_fidelity import feature_extractor_inceptionv3 as inception

    raise FileNotFoundError(
        f"fid_features: inception needs its weights at {path}, from {inception.URL_INCEPTION_V3}; "
        "put the file there, run with --download (in JupyterLab: %env DIFFLT_DOWNLOAD=1), or use phi_0"
    )


def load_inception(path: Path, device: str = "cpu", download: bool = False):
    """torch-fidelity's Inception network with the weights at path, checked by their hash.

    Raises:
        FileNotFoundError: no weights and no download. ValueError: another file than expected.
    """
    from torch_fidelity import feature_extractor_inceptionv3 as inception

    wanted = path.stem.rpartition("-")[2]
    if not path.exists() and download:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(inception.URL_INCEPTION_V3, str(path), wanted)
        except (urllib.error.URLError, OSError) as error:
            raise FileNotFoundError(
                f"fid_features: {path} cannot be downloaded ({error}); put the file there, or use phi_0"
            ) from None
    check_inception(path)
    weights = path.read_bytes()
    found = hashlib.sha256(weights).hexdigest()
    if not found.startswith(wanted):
        raise ValueError(
            f"{path}: expected a sha256 that begins with {wanted}, got {found[:8]}; remove it, and fetch it again"
        )
    # torch-fidelity unpickles what it is given: it is given tensors that were read safely.
    safe = io.BytesIO()
    torch.save(torch.load(io.BytesIO(weights), weights_only=True, map_location="cpu"), safe)
    safe.seek(0)
    net = inception.FeatureExtractorInceptionV3("inception", ["2048"], safe)
    return net.to(device)


@torch.no_grad()
def inception_features(net, images: np.ndarray, batch_size: int = 64) -> np.ndarray:
    """float32 (N, 2048) of uint8 images (N, H, W, C); the network makes them 299 pixels wide."""
    device, parts = next(net.parameters()).device, []
    for start in range(0, len(images), batch_size):
        x = torch.from_numpy(np.array(images[start : start + batch_size])).permute(0, 3, 1, 2)
        x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
        parts.append(net(x.to(device))[0].float().cpu())
    return torch.cat(parts).numpy() if parts else np.zeros((0, 2048), np.float32)
