"""Does the generator repeat its training images? Distances to the nearest one, of generated images
and of real ones that nobody trained on.

After the nearest L2 distances of Carlini et al. 2023, "Extracting training data from diffusion
models", whose fixed threshold is here one that held-out images set.
"""

from dataclasses import dataclass

import numpy as np
import torch

__all__ = ["Memorisation", "memorisation", "nearest_training"]

_BLOCK_BYTES = 2**27  # of one block of images in float64


@dataclass(frozen=True)
class Memorisation:
    """What `memorisation` found. Distances are root-mean-square pixel differences in grey levels,
    0..255, to the nearest training image.

    Args:
        generated: of the generated images, float64 (N,). nearest: index int64 (N,) of the training
            image. held_out: of real images outside the training set, float64 (M,).
    """

    generated: np.ndarray
    nearest: np.ndarray
    held_out: np.ndarray

    @property
    def n_nearest(self) -> int:
        """How many held-out images are the nearest 1 % of them; at least one."""
        return max(1, round((len(self.held_out) + 1) / 100))

    @property
    def threshold(self) -> float:
        """Grey levels: the distance that the nearest 1 % of the held-out images keep to."""
        return float(np.sort(self.held_out)[self.n_nearest - 1])

    @property
    def n_near(self) -> int:
        """How many generated images are as near as that to a training image, or nearer."""
        return int((self.generated <= self.threshold).sum())

    @property
    def share(self) -> float:
        """The same in % of the generated images: 100 for copies, near `expected` for new images."""
        return 100 * self.n_near / len(self.generated)

    @property
    def expected(self) -> float:
        """The share in % that new images like the held-out ones have on average: about 1, from some
        hundreds of held-out images on."""
        return 100 * self.n_nearest / (len(self.held_out) + 1)

    @property
    def spread(self) -> float:
        """Standard deviation of that share in %, over draws of N and M independent images (the
        beta-binomial distribution)."""
        from scipy.stats import betabinom

        N, M, k = len(self.generated), len(self.held_out), self.n_nearest
        return 100 * float(betabinom(N, k, M + 1 - k).std()) / N

    def pairs(self, k: int = 12) -> list[tuple[int, int, float]]:
        """The k closest: (generated image, its nearest training image, distance), closest first."""
        order = np.argsort(self.generated, kind="stable")[:k]
        return [(int(i), int(self.nearest[i]), float(self.generated[i])) for i in order]

    def words(self) -> str:
        """For a caption."""
        return (
            f"{self.share:.1f} % of {len(self.generated)} generated images come within "
            f"{self.threshold:.1f} grey levels (root mean square) of a training image, as the "
            f"nearest {self.n_nearest} of {len(self.held_out)} held-out images do; new images: "
            f"{self.expected:.1f} ± {self.spread:.1f} %"
        )


def memorisation(
    generated: np.ndarray,
    held_out: np.ndarray,
    train: np.ndarray,
    device: str = "cpu",
    mirrored: bool = False,
) -> Memorisation:
    """Compare how near generated images, and real ones outside the training set, come to it.

    The two sets compare when their labels are distributed alike, e.g. both balanced. Smooth or
    faint images are near to everything: a large share asks for a look at the pairs, it does not
    prove copies.

    Args:
        generated, held_out, train: uint8 (N, H, W, C), (M, H, W, C), (n, H, W, C), none empty.
        mirrored: as for nearest_training.

    Raises:
        ValueError: an empty set, other values than bytes, or images of different shapes.
    """
    for name, images in (("generated", generated), ("held_out", held_out)):
        if not len(images):
            raise ValueError(f"memorisation: expected at least one image in {name}, got none")
    distances, nearest = nearest_training(generated, train, device, mirrored=mirrored)
    apart = nearest_training(held_out, train, device, mirrored=mirrored)[0]
    return Memorisation(distances, nearest, apart)


def nearest_training(
    images: np.ndarray,
    train_images: np.ndarray,
    device: str = "cpu",
    rows: int = 0,
    mirrored: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Root-mean-square pixel difference to the nearest training image, and which one that is.

    Squared differences of bytes are whole numbers that float64 holds exactly: a copy is at 0, and
    neither blocks nor the device change a distance.

    Args:
        images, train_images: uint8 (N, H, W, C) and (n, H, W, C), often memory-mapped.
        rows: images of either side at a time; 0 is up to 1,024 that fill 128 MiB.
        mirrored: whether a training image's mirror image counts as that image, as for a generator
            that was trained on both.

    Returns:
        distance float64 (N,) in grey levels 0..255; index int64 (N,), the first of equal ones.

    Raises:
        ValueError: no training image, other values than bytes, or images of different shapes.
    """
    _check(images, train_images)
    n = len(train_images)
    if mirrored:
        train_images = np.concatenate([train_images, train_images[:, :, ::-1]])
    N, D = len(images), int(np.prod(images.shape[1:]))
    rows = rows or max(1, min(1024, _BLOCK_BYTES // (8 * D)))
    squared = torch.full((N,), torch.inf, dtype=torch.float64, device=device)
    index = torch.zeros(N, dtype=torch.int64, device=device)
    for i in range(0, N, rows):
        x, part = _flat(images[i : i + rows], device), slice(i, i + rows)
        for j in range(0, len(train_images), rows):
            y = _flat(train_images[j : j + rows], device)
            between = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T  # (rows, rows)
            least, where = between.min(dim=1)
            nearer = least < squared[part]
            squared[part] = torch.where(nearer, least, squared[part])
            index[part] = torch.where(nearer, where + j, index[part])
    return (squared / D).sqrt().cpu().numpy(), (index % n).cpu().numpy()


def _flat(images: np.ndarray, device: str) -> torch.Tensor:
    """float64 (B, D) of uint8 (B, H, W, C)."""
    return torch.from_numpy(np.array(images)).to(device).flatten(1).double()


def _check(images: np.ndarray, train_images: np.ndarray) -> None:
    if not len(train_images):
        raise ValueError("nearest_training: expected at least one training image, got none")
    if images.dtype != np.uint8 or train_images.dtype != np.uint8:
        raise ValueError(
            "nearest_training: expected uint8 images 0..255, got "
            f"{images.dtype} and {train_images.dtype}"
        )
    if images.shape[1:] != train_images.shape[1:]:
        raise ValueError(
            "nearest_training: expected images of one shape (H, W, C), got "
            f"{images.shape[1:]} and {train_images.shape[1:]}"
        )
