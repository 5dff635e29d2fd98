"""How FID and its relatives are measured: in which features, against which images. One protocol per
run, whose words stand in every table."""

import hashlib
import io
import urllib.error
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from .classifiers import extract, load_classifier
from .data import load_split
from .metrics import fid, kid, precision_recall

__all__ = ["Protocol", "inception_features", "load_inception"]

# The network of the original FID code, converted by torch-fidelity; 8 digits of its sha256 are in the name.
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"


class Protocol:
    """The feature space and the reference set of a pipeline's config.metrics.

    Args:
        pipeline: gives phi_0 (of its first seed: one space for all repeats) and the reference images.
    """

    def __init__(self, pipeline):
        self.config, self.context = pipeline.config.metrics, pipeline.store.context
        self.pipeline = pipeline.vary({"seed": pipeline.config.seeds[0]})

    def features(self, images: np.ndarray) -> np.ndarray:
        """float32 (N, D) of uint8 images (N, H, W, C)."""
        if self.config.features == "inception":
            return inception_features(self._inception, images)
        return extract(self._phi0, images)[0]

    def fid(self, images: np.ndarray) -> float:
        return fid(self.real, self.features(images))

    def scores(self, images: np.ndarray) -> dict[str, float]:
        """FID, KID, and improved precision and recall in %."""
        fake = self.features(images)
        precision, recall = precision_recall(self.real, fake)
        return {
            "FID": fid(self.real, fake),
            "KID": kid(self.real, fake),
            "precision": precision,
            "recall": recall,
        }

    @cached_property
    def real(self) -> np.ndarray:
        """Features of the reference images."""
        return self.features(self.reference.images)

    @cached_property
    def reference(self):
        """The images that generated ones are compared with, a LongTail."""
        kind, data = self.config.reference, self.pipeline.data()
        if kind == "balanced train":
            data = self.pipeline.balanced("fid_reference = balanced train").data()
        if kind != "held-out":
            return load_split(data, "train")
        validation = load_split(data, "val")
        return validation if len(validation.labels) else load_split(data, "test")

    def words(self, n_generated: int) -> str:
        """For the caption of a table."""
        space = {"phi_0": "phi_0's features", "inception": "Inception features"}
        n, kind = len(self.reference.labels), self.config.reference
        where = self.reference.split if kind == "held-out" else kind
        return (
            f"{space[self.config.features]}, {n_generated} generated images against {n} of {where}"
        )

    @cached_property
    def _phi0(self):
        return load_classifier(self.pipeline.train_extractor(), self.context.device)

    @cached_property
    def _inception(self):
        path = Path(self.context.data_dir) / INCEPTION
        return load_inception(path, self.context.device, self.context.download)


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
    if not path.exists():
        raise FileNotFoundError(
            f"fid_features: inception needs its weights at {path}, from {inception.URL_INCEPTION_V3}; "
            "put the file there, run with --download, or use phi_0"
        )
    weights = path.read_bytes()
    found = hashlib.sha256(weights).hexdigest()
    if not found.startswith(wanted):
        raise ValueError(
            f"{path}: expected a sha256 that begins with {wanted}, got {found[:8]}; fetch it again"
        )
    # torch-fidelity unpickles what it is given: it is given tensors that were read safely.
    safe = io.BytesIO()
    torch.save(torch.load(io.BytesIO(weights), weights_only=True, map_location="cpu"), safe)
    safe.seek(0)
    net = inception.FeatureExtractorInceptionV3("inception", ["2048"], safe)
    return net.to(device)


@torch.no_grad()
def inception_features(net, images: np.ndarray, batch_size: int = 64) -> np.ndarray:
    """float32 (N, 2048) of uint8 images (N, H, W, C); the network resizes them to 299 pixels itself."""
    device, parts = next(net.parameters()).device, []
    for start in range(0, len(images), batch_size):
        x = torch.from_numpy(np.array(images[start : start + batch_size])).permute(0, 3, 1, 2)
        x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
        parts.append(net(x.to(device))[0].float().cpu())
    return torch.cat(parts).numpy() if parts else np.zeros((0, 2048), np.float32)
