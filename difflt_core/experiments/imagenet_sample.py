"""A small folder in the shape of ImageNet-LT, from the embedded digits: the files, lists and loader of
the real thing, for smoke and demo runs of notebook 06."""

import os
from operator import attrgetter
from pathlib import Path

import numpy as np

from ..config import DataConfig, RunConfig, load_config, vary
from ..data.digits import render_digits
from ..engine.files import atomic_write
from ..profiles import IMAGENET_SAMPLE
from .sample_folder import sample_folder

__all__ = ["check_imagenet", "imagenet_run"]

_PIXELS = 40  # of a file


def check_imagenet(config: RunConfig) -> None:
    """Notebook 06 runs on ImageNet-LT, or on the sample that smoke and demo make of the digits.

    Raises:
        ValueError: other data.
    """
    sample = config.profile in IMAGENET_SAMPLE and config.data.name == "digits"
    if config.data.name != "imagenet_lt" and not sample:
        raise ValueError(
            "profile: notebook 06 is about ImageNet-LT; expected imagenet, or the digits of smoke or "
            f"demo, got {config.profile} with {config.data.name}; leave it out with --only"
        )


def imagenet_run(config: RunConfig, out: Path | str, data_dir: Path | str) -> tuple[RunConfig, str]:
    """What notebook 06 runs on: configuration and data folder. Profile imagenet is itself; smoke and
    demo get the sample, which is written below out/runs.

    Args:
        out, data_dir: as for Pipeline.

    Raises:
        ValueError: as check_imagenet.
    """
    check_imagenet(config)
    if config.data.name == "imagenet_lt":
        return config, str(data_dir)
    folder = sample_folder("imagenet-sample", config, out, _write)
    usual, changes = load_config(config.profile), dict(IMAGENET_SAMPLE[config.profile])
    first = config.seeds[: changes.pop("n_seeds")]
    changes["seeds"] = first if config.seeds == usual.seeds else config.seeds
    of_data = ("data.", "seeds", "n_draws")  # the others give way to what somebody chose
    own = {
        path: value
        for path, value in changes.items()
        if path.startswith(of_data) or attrgetter(path)(config) == attrgetter(path)(usual)
    }
    return vary(config, own), str(folder)


def _write(folder: Path, data: DataConfig, seed: int) -> None:
    """JPEGs in train/<synset>/ and val/<synset>/, and the three lists. Class sizes are those of data, in
    an order that is not sorted, as in ImageNet-LT."""
    K = data.n_classes or 10
    order = np.random.default_rng(0).permutation(K)  # class of each digit
    names = [f"n{90_000_000 + c}" for c in range(K)]
    large = data.model_copy(update={"image_size": _PIXELS})
    for split, images, labels in render_digits(large, seed):
        base, rows = ("val" if split == "test" else "train"), []
        seen: np.ndarray = np.zeros(K, int)
        for image, digit in zip(images, labels, strict=True):
            c, i = order[digit], seen[digit]
            path = f"{base}/{names[c]}/{names[c]}_{split}_{i:05}.JPEG"
            _write_jpeg(folder / path, image)
            rows.append(f"{path} {c}")
            seen[digit] += 1
        atomic_write(folder / f"ImageNet_LT_{split}.txt", "\n".join(rows) + "\n")


def _write_jpeg(path: Path, image: np.ndarray) -> None:
    from PIL import Image

    os.makedirs(path.parent, exist_ok=True)
    Image.fromarray(image[..., 0]).convert("RGB").save(path, "JPEG", quality=95)
