"""Where the synthetic images of SAU come from (docs/protocol.md, SAU): DiffuLT's generator, a folder,
an .npz file, or a text-to-image pipeline of diffusers. What a class gets is decided in one place.

offered (generation/sampling.py, generation/text2image.py, or here) -> types (sample_types.py)
-> build_synthetic
"""

import math
import tokenize
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np

from ..config import SyntheticConfig
from ..data.folders import check_unchanged, class_folders, folder_fingerprint, images_in
from ..data.image_files import read_images, refuse_unreadable
from ..data.long_tail import load_split, shortfall
from ..data.sources import in_data_dir
from ..engine.artifacts import Stage
from ..engine.chunks import finish_images
from ..engine.files import file_sha256, writable
from ..generation.text2image import build_text2image, read_prompts

__all__ = ["SOURCES", "build_folder", "build_npz", "build_synthetic", "source_facts"]

_SAVE_NPZ = "save it with numpy.savez(path, images=images, labels=labels)"
_ROWS = 4096  # images of an .npz held at a time
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
    path, recipe = in_data_dir(config.path, data_dir), config.text2image
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
    folder = in_data_dir(recipe.pipeline, data_dir)
    return {
        "text2image": recipe.model_dump(mode="json", exclude={"prompts"}),
        "fingerprint": folder_fingerprint(folder, every_file=True) if folder.is_dir() else "",
        "prompts": read_prompts(in_data_dir(recipe.prompts, data_dir)),
        "seed": seed,
    }


def build_folder(work, config: dict, inputs: dict, context) -> None:
    """Source "folder": the images in <path>/<class name>/ at any depth, by name, shrunk to the data
    set's size and colours."""
    train = load_split(inputs["data"], "train")
    root, known = in_data_dir(config["path"], context.data_dir), set(train.class_names)
    check_unchanged(root, folder_fingerprint(root), config["fingerprint"])
    unknown = [name for name in class_folders(root) if name not in known]
    if unknown:
        raise ValueError(f"{root}: unknown classes {unknown}; the data have {sorted(known)}")
    files = [images_in(root / name) for name in train.class_names]
    labels = np.repeat(np.arange(len(files)), [len(found) for found in files])
    flat = [path for found in files for path in found]
    _, bad, odd = read_images(work, "synthetic", flat, train.images.shape[1:], context)
    refuse_unreadable(bad, odd)
    finish_images(work, "synthetic", labels, config)


def build_npz(work, config: dict, inputs: dict, context) -> None:
    """Source "npz": arrays images uint8 (N, H, W, C) and labels integer (N,) of one file.

    Raises:
        ValueError: an array that is missing, holds objects, or does not fit the data set.
    """
    train = load_split(inputs["data"], "train")
    path, shape = in_data_dir(config["path"], context.data_dir), train.images.shape[1:]
    check_unchanged(path, file_sha256(path), config["sha256"])
    target = work / "synthetic_images.npy"
    try:
        labels = _read_npz(path, shape, target)
        K = len(train.class_names)
        if len(labels) and not 0 <= labels.min() <= labels.max() < K:
            raise ValueError(
                f"{path}: labels: expected 0 to {K - 1}, the {K} classes of the data set in their "
                f"order, got {labels.min()} to {labels.max()}"
            )
    except ValueError:
        target.unlink(missing_ok=True)
        raise
    finish_images(work, "synthetic", labels, config)


def _read_npz(path: Path, shape: tuple[int, int, int], target: Path) -> np.ndarray:
    """Its labels; its images go to the .npy file target, a part at a time. The arrays' headers are
    read first, so that a small file cannot unpack to more than it says, and never a pickle."""
    try:
        with zipfile.ZipFile(path) as file:
            with _member(file, "images") as images, _member(file, "labels") as labels:
                (n, *size), dtype = _header(images)
                if dtype != np.uint8 or tuple(size) != shape:
                    raise _Misfit(
                        f"images: expected uint8 (N, {', '.join(map(str, shape))}) as in the data set, "
                        f"got {dtype} {(n, *size)}; shrink them, or use a folder of image files"
                    )
                labels_shape, dtype = _header(labels)
                if not np.issubdtype(dtype, np.integer) or labels_shape != (n,):
                    raise _Misfit(f"labels: expected integers ({n},), got {dtype} {labels_shape}")
                with open(target, "wb") as f:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (n, *shape)}
                    np.lib.format.write_array_header_1_0(f, header)
                    for start in range(0, n, _ROWS):
                        f.write(_exactly(images, min(_ROWS, n - start) * math.prod(shape)))
                return np.frombuffer(_exactly(labels, n * dtype.itemsize), dtype)
    except _Misfit as error:
        raise ValueError(f"{path}: {error}") from None
    except _NOT_PLAIN as error:
        raise ValueError(
            f"{path}: expected plain arrays in an .npz file ({error}); objects and pickles are never "
            f"read: {_SAVE_NPZ}, images uint8 (N, H, W, C), labels int64 (N,)"
        ) from None


# What zipfile and numpy raise at files that are damaged, encrypted, or not theirs.
_NOT_PLAIN = (
    ValueError,
    TypeError,
    RuntimeError,
    EOFError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


class _Misfit(Exception):
    """An array that is whole but not what the data set needs."""


def _member(file: zipfile.ZipFile, name: str):
    """One array of an .npz, opened."""
    if f"{name}.npy" not in file.namelist():
        raise _Misfit(f"expected arrays images and labels, got no {name}")
    info = file.getinfo(f"{name}.npy")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError("compressed in another way than numpy's")  # unpacked without a limit
    return file.open(info)


def _header(f) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of an .npy file, which is left at its first value."""
    version = np.lib.format.read_magic(f)
    if version != (1, 0):  # the others are for long names of fields, and may claim a long header
        raise ValueError(f"an array of format {version}")
    shape, in_columns, dtype = np.lib.format.read_array_header_1_0(f)
    if dtype.hasobject:
        raise ValueError("objects")
    if in_columns and len(shape) > 1:
        raise _Misfit("an array in Fortran order; save numpy.ascontiguousarray(images)")
    if min(shape, default=-1) < 0:
        raise ValueError(f"an array of shape {shape}")
    return shape, dtype


def _exactly(f, n: int) -> bytes:
    data = f.read(n)
    if len(data) < n:
        raise EOFError("it ends before its last value")
    return data


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
    finish_images(work, "synthetic", labels[index], info)


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
