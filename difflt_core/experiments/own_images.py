"""What notebook 12 runs on: the user's folder; or, at smoke and demo size, a small folder of digits."""

from pathlib import Path

import numpy as np

from ..config import DataConfig, RunConfig, vary
from ..data.digits import render_digits
from ..profiles import OWN_IMAGES, SAMPLE_FOLDER
from .sample_folder import sample_folder

__all__ = ["check_own_images", "own_images", "rare_classes"]


def check_own_images(config: RunConfig) -> None:
    """Notebook 12 runs on a folder of images, or on one that is made of the digits.

    Raises:
        ValueError: data that are neither.
    """
    if config.data.name not in ("folder", "digits"):
        raise ValueError(
            f"profile: notebook 12 is about a folder of images; got {config.data.name}; use --profile "
            "folder --set path=NAME, or smoke or demo, or leave it out with --only"
        )


def own_images(config: RunConfig, out: Path | str, data_dir: Path | str) -> tuple[RunConfig, str]:
    """Configuration and data folder: those given, where the data are a folder; of the digits, their class
    folders of PNG are written below out/runs first. Of several that write them at once, one does.

    Args:
        out, data_dir: as for Pipeline.

    Raises:
        ValueError: as check_own_images.
    """
    check_own_images(config)
    if config.data.name == "folder":
        return config, str(data_dir)
    folder = sample_folder(OWN_IMAGES, config, out, _write)
    changes = {**SAMPLE_FOLDER, "data.name": "folder", "data.path": folder.name}
    return vary(config, changes), str(folder.parent)


def _write(work: Path, data: DataConfig, seed: int) -> None:
    from PIL import Image

    for split, images, labels in render_digits(data, seed):
        for i, (image, digit) in enumerate(zip(images, labels, strict=True)):
            path = work / split / f"digit {digit}" / f"{i:05}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[..., 0]).save(path)


def rare_classes(counts) -> np.ndarray:
    """The third of the classes with the fewest training images, at least one: indices int64 (n,), the
    rarest first. counts: int (K,)."""
    order = np.argsort(np.asarray(counts), kind="stable")
    return order[: max(1, len(order) // 3)]
