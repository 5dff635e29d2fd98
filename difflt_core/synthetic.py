"""Where the synthetic images of SAU come from (PEERS.md section 4): DiffuLT's generator, a folder, an
.npz file, or a text-to-image pipeline of diffusers. What a class gets is decided in one place.

offered (sampling.py, text2image.py, or here) -> types (filtering.py) -> build_synthetic
"""

import warnings
import zipfile
from pathlib import Path

import numpy as np

from .config import SyntheticConfig
from .conversion import read_images, refuse_unreadable
from .data import load_split, shortfall
from .datasets import folder_fingerprint, images_in, located
from .store import Stage, file_sha256, finish_chunks, writable
from .text2image import build_text2image, read_prompts

__all__ = ["SOURCES", "build_folder", "build_npz", "build_synthetic", "source_facts"]

_SAVE_NPZ = "save it with numpy.savez(path, images=images, labels=labels)"
_MORE = {  # what to do when a class has too few
    "diffult": "raise fill_to",
    "folder": "add images",
    "npz": "add images",
    "text2image": "raise text2image_surplus",
}


def source_facts(config: SyntheticConfig, data_dir, seed: int) -> dict:
    """What makes two sources other than DiffuLT's generator the same: names, hashes and settings.

    Raises:
        FileNotFoundError: what is expected where. ValueError: a line of the prompts, or no pipeline.
    """
    path, recipe = located(config.path, data_dir), config.text2image
    choose = "(inside --data-dir, or an absolute path)"
    if config.source == "folder":
        if not config.path or not path.is_dir():
            raise FileNotFoundError(
                f"synthetic_path: expected a directory with one folder per class, got {path}; "
                f"choose it with --set synthetic_path=NAME {choose}"
            )
        return {"path": config.path, "fingerprint": folder_fingerprint(path)}
    if config.source == "npz":
        if path.suffix != ".npz" or not path.is_file():
            raise FileNotFoundError(
                f"synthetic_path: expected an .npz file, got {path}; choose it with --set "
                f"synthetic_path=NAME.npz {choose}; a pickle is never read: {_SAVE_NPZ}"
            )
        return {"path": config.path, "sha256": file_sha256(path)}
    if not recipe.pipeline:
        raise ValueError(
            "text2image_pipeline: expected a folder in diffusers' format or a name on the hub, got "
            "''; set text2image_pipeline=NAME"
        )
    folder = located(recipe.pipeline, data_dir)
    return {
        "text2image": recipe.model_dump(mode="json", exclude={"prompts"}),
        "fingerprint": folder_fingerprint(folder) if folder.is_dir() else "",
        "prompts": read_prompts(located(recipe.prompts, data_dir)),
        "seed": seed,
    }


def build_folder(work, config: dict, inputs: dict, context) -> None:
    """Source "folder": the images in <path>/<class name>/ at any depth, by name, shrunk to the data
    set's size and colours."""
    train = load_split(inputs["data"], "train")
    root, known = located(config["path"], context.data_dir), set(train.class_names)
    unknown = sorted(p.name for p in root.iterdir() if p.is_dir() and p.name not in known)
    if unknown:
        raise ValueError(f"{root}: unknown classes {unknown}; the data have {sorted(known)}")
    files = [images_in(root / name) for name in train.class_names]
    labels = np.repeat(np.arange(len(files)), [len(found) for found in files])
    flat = [path for found in files for path in found]
    _, bad, modes = read_images(work, "synthetic", flat, train.images.shape[1:], context)
    refuse_unreadable(bad, modes)
    finish_chunks(work, "synthetic", labels, config)


def build_npz(work, config: dict, inputs: dict, context) -> None:
    """Source "npz": arrays images uint8 (N, H, W, C) and labels integer (N,) of one file.

    Raises:
        ValueError: an array that is missing, holds objects, or does not fit the data set.
    """
    train = load_split(inputs["data"], "train")
    path, shape = located(config["path"], context.data_dir), train.images.shape[1:]
    images, labels = _read_npz(path)
    if images.dtype != np.uint8 or images.shape[1:] != shape:
        raise ValueError(
            f"{path}: images: expected uint8 (N, {', '.join(map(str, shape))}) as in the data set, "
            f"got {images.dtype} {images.shape}; shrink them, or use a folder of image files"
        )
    K = len(train.class_names)
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{path}: labels: expected integers ({len(images)},), got {labels.dtype} {labels.shape}"
        )
    if len(labels) and not 0 <= labels.min() <= labels.max() < K:
        raise ValueError(
            f"{path}: labels: expected 0 to {K - 1}, the {K} classes of the data set in their order, "
            f"got {labels.min()} to {labels.max()}"
        )
    np.save(work / "synthetic_images.npy", images)
    finish_chunks(work, "synthetic", labels, config)


def _read_npz(path: Path) -> list[np.ndarray]:
    """Its arrays images and labels; never a pickle."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return [arrays[name] for name in ("images", "labels")]
    except KeyError as error:
        raise ValueError(f"{path}: expected arrays images and labels, got {error}") from None
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path}: expected plain arrays in an .npz file ({error}); objects and pickles are never "
            f"read: {_SAVE_NPZ}, images uint8 (N, H, W, C), labels int64 (N,)"
        ) from None


SOURCES = {
    "folder": Stage("folder", build_folder),
    "npz": Stage("npz", build_npz),
    "text2image": Stage("text2image", build_text2image, parallel=True),
}


def build_synthetic(work, config: dict, inputs: dict, context) -> None:
    """The first M - n_c images of each class, of all that are offered or of those that the filter
    keeps: images.npy uint8 (N_syn, H, W, C), labels.npy int64 (N_syn,), and info.json.

    config: {"source": name, "kept": name of the kept indices or None}. inputs: data, offered and,
    with "kept", types. A class that gets fewer, or none, is warned of.
    """
    train, offered = load_split(inputs["data"], "train"), inputs["offered"]
    labels = np.asarray(offered.array("labels"))
    kept = np.arange(len(labels))
    if config["kept"]:
        kept = np.asarray(inputs["types"].array(config["kept"]))
    needed = shortfall(train.class_counts)
    index = np.concatenate([kept[labels[kept] == c][:n] for c, n in enumerate(needed)])
    _copy_rows(offered.array("images"), index, work / "synthetic_images.npy")
    total, passed, used = (
        np.bincount(found, minlength=len(needed)) for found in (labels, labels[kept], labels[index])
    )
    _warn_of_gaps(train.class_names, needed, used, config)
    counts = {"needed": needed, "offered": total, "dropped": total - passed, "used": used}
    origin = {"artifact": f"{offered.path.parent.name}/{offered.key}", **offered.json("info")}
    info = {**config, "from": origin, "class_names": train.class_names}
    info |= {name: per_class.tolist() for name, per_class in counts.items()}
    finish_chunks(work, "synthetic", labels[index], info)


def _copy_rows(images: np.ndarray, index: np.ndarray, path: Path, chunk: int = 4096) -> None:
    """The rows of a memory-mapped array, to a file, without holding them all."""
    shape = (len(index), *images.shape[1:])
    copied = writable(path, np.uint8, shape)
    for start in range(0, len(index), chunk):
        part = slice(start, start + chunk)
        copied[part] = images[index[part]]


def _warn_of_gaps(names, needed: np.ndarray, used: np.ndarray, config: dict) -> None:
    """Say which classes get fewer images than they need, and what to do."""
    filtered = ["set synthetic_filtered=false"] if config["kept"] else []
    remedy = " or ".join([_MORE[config["source"]], *filtered])
    gaps = {
        "no synthetic image, so that they train on real ones alone": (used == 0) & (needed > 0),
        "fewer synthetic images than they need": (0 < used) & (used < needed),
    }
    for what, which in gaps.items():
        found = [f"{names[c]} ({used[c]} of {needed[c]})" for c in np.flatnonzero(which)]
        if found:
            more = f" and {len(found) - 20} more" if len(found) > 20 else ""
            warnings.warn(
                f"classes with {what}: {', '.join(found[:20])}{more}; {remedy}", stacklevel=2
            )
