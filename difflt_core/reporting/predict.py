"""A trained classifier for images of one's own: the class of each file, how sure, and whether it looks
like none of the classes: `python -m difflt_core.reporting.predict --model DIR photo.jpg folder ...`.

`save_model` writes such a folder: safetensors and JSON alone, so that loading it runs no code of it.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import sys
import uuid
import warnings
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from scipy.spatial.distance import cdist
from scipy.special import softmax

from ..data.crops import centre_crops
from ..data.folders import images_in, kinds
from ..data.image_files import read_image
from ..data.long_tail import load_split, to_float
from ..engine.artifacts import Artifact
from ..engine.files import atomic_write, new_folder
from ..engine.progress import Context, bar, resolve_device
from ..engine.provenance import commit
from ..experiments.pipeline import Pipeline
from ..options import USER_ERRORS
from ..recognition.classifier import extract, load_classifier
from ..recognition.geometry import class_geometry

__all__ = [
    "SavedModel",
    "image_paths",
    "main",
    "need_onnx",
    "predict",
    "save_model",
    "save_model_once",
    "write_onnx",
]

_PARTS = ("classifier", "phi_0")
_BATCH = 256
_N_BEST = 5  # likely classes that are told


def save_model(pipeline: Pipeline, to: Path | str, trained: str = "train_classifier") -> None:
    """Write a classifier of one seed into a new folder: classifier/ and phi_0/, each model.safetensors
    and model.json; with phi_0 the classes' centres and radii; about.json.

    Args:
        trained: the method of Pipeline that trains it, as in Variant; DiffuLT's final one, or that on
            the real images alone.

    Raises:
        FileExistsError: `to` is there already; it is complete or not there at all.
    """
    config = pipeline.config
    with new_folder(Path(to)) as work:
        train, extractor = load_split(pipeline.data(), "train"), pipeline.train_extractor()
        for name, artifact in zip(_PARTS, (getattr(pipeline, trained)(), extractor), strict=True):
            (work / name).mkdir()
            for file in ("model.safetensors", "model.json"):
                shutil.copyfile(artifact.path / file, work / name / file)
        phi_0 = load_classifier(extractor, pipeline.store.context.device_here)
        centres, radii = class_geometry(phi_0, train, config.filtering.radius)
        np.save(work / "phi_0" / "centres.npy", centres)
        np.save(work / "phi_0" / "radii.npy", radii)
        about = {
            "class_names": train.class_names,
            "training_images": train.class_counts.tolist(),
            "image_shape": train.images.shape[1:],
            "aid_factor": config.filtering.aid_factor,
            "profile": config.profile,
            "trained": trained,
            "method": config.classifier.method,
            "seed": config.seed,
            "commit": commit(),
        }
        atomic_write(work / "about.json", json.dumps(about, indent=1, ensure_ascii=False) + "\n")


def save_model_once(pipeline: Pipeline, to: Path, name: str, trained: str) -> Path:
    """The same into the folder classifier-<name>-<hash of what it holds> below `to`, unless it is there
    already."""
    filtering = pipeline.config.filtering
    parts = getattr(pipeline, trained)().key, pipeline.train_extractor().key
    held = repr((*parts, filtering.radius, filtering.aid_factor))
    saved = to / f"classifier-{name}-{hashlib.sha256(held.encode()).hexdigest()[:8]}"
    if not saved.exists():
        save_model(pipeline, saved, trained)
    return saved


@dataclass(frozen=True)
class SavedModel:
    """A folder that save_model wrote. device: "cpu" or "cuda"."""

    folder: Path
    device: str = "cpu"

    def _part(self, name: str) -> Artifact:
        return Artifact(Path(self.folder) / name, "", {})

    @cached_property
    def about(self) -> dict:
        path = Path(self.folder) / "about.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: expected a folder that notebook 12 wrote, or --model DIR of "
                "difflt_core.reporting.export or .baseline"
            )
        with _copied_whole(path):
            found = json.loads(path.read_text(encoding="utf-8"))
            missing = {"class_names", "image_shape", "aid_factor"}.difference(found)
            if missing:
                raise ValueError(f"without {', '.join(sorted(missing))}")
        return found

    @cached_property
    def crop_size(self) -> int:
        """Pixels of the crops of a file that the classifier looks at; 0: at the array's image."""
        with _copied_whole(self.folder / "classifier"):
            return self._part("classifier").json("model").get("crop_size", 0)

    @cached_property
    def classifier(self):
        return self._load("classifier")

    @cached_property
    def phi_0(self):
        return self._load("phi_0")

    def _load(self, name: str):
        with _copied_whole(self.folder / name):
            return load_classifier(self._part(name), self.device)

    def probabilities(self, files: list[Path], images: np.ndarray) -> np.ndarray:
        """float32 (N, K) of image files, which are also given as uint8 (N, H, W, C) at the size of the
        generator's."""
        if not self.crop_size:
            logits = extract(self.classifier, images)[1]
        else:
            crops = centre_crops(files, self.crop_size, self.device)
            with torch.no_grad():
                batches = (self.classifier(x) for x in crops)
                logits = np.concatenate([batch.cpu().numpy() for batch in batches])
        return softmax(logits, axis=1)

    def nearest(self, images: np.ndarray) -> np.ndarray:
        """float64 (N,): the distance to the nearest class centre in phi_0's features, in its radii."""
        features, _ = extract(self.phi_0, images)
        with _copied_whole(self.folder / "phi_0"):
            centres, radii = (self._part("phi_0").array(name) for name in ("centres", "radii"))
        return (cdist(features, centres) / radii).min(axis=1)


@contextlib.contextmanager
def _copied_whole(path: Path):
    """Say of what cannot be read where it is, and what helps."""
    try:
        yield
    except (SafetensorError, ValueError, KeyError, EOFError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); copy the folder again") from error


def write_onnx(model: SavedModel, images: np.ndarray) -> Path:
    """Write classifier/model.onnx beside the weights: images float32 (N, C, H, W) in [-1, 1] to logits
    float32 (N, K), and compare it with torch.

    Args:
        images: real ones, uint8 (N, H, W, C), to compare them on.

    Raises:
        ImportError: without the extra onnx. RuntimeError: logits that differ by more than 1e-4.
    """
    need_onnx()
    import onnxruntime

    net, x = model.classifier.float().cpu(), to_float(images)
    if model.crop_size:  # it looks at crops of the files, which are larger
        x = F.interpolate(x, (model.crop_size, model.crop_size), mode="bilinear")
    path = Path(model.folder) / "classifier" / "model.onnx"
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter's own code
            torch.onnx.export(
                net, (x[:2],), part, input_names=["images"], output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("N")},), external_data=False, verbose=False,
            )  # fmt: skip
            ours = net(x).numpy()
        session = onnxruntime.InferenceSession(part, providers=["CPUExecutionProvider"])
        theirs = session.run(["logits"], {"images": x.numpy()})[0]
        apart = float(np.abs(ours - theirs).max())
        if not apart <= 1e-4:
            raise RuntimeError(
                f"onnx: logits differ from torch's by {apart:.2g}, expected at most 1e-4"
            )
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def need_onnx() -> None:
    """Raise ImportError where the extra onnx is not installed."""
    if any(find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxscript")):
        raise ImportError(
            "onnx: needs the packages onnx, onnxruntime and onnxscript; install them with "
            'pip install -e ".[onnx]" in the checkout'
        )


def predict(model: SavedModel, files: list[Path], context: Context | None = None) -> pd.DataFrame:
    """One row for each file: file, class, probability, then class_2, probability_2, ... of the next
    likely; distance (to the nearest class centre, in class radii) and out_of_distribution (farther
    than aid_factor radii from every class). A file that cannot be read has an empty class, and says
    so in the column fault."""
    about, rows = model.about, []
    names, shape = about["class_names"], tuple(about["image_shape"])
    n_best = min(_N_BEST, len(names))
    with bar(len(files), "predicting", "image", context=context) as progress:
        for start in range(0, len(files), _BATCH):
            chunk = files[start : start + _BATCH]
            read, whys = zip(*(read_image(path, shape) for path in chunk), strict=True)
            good = [i for i, image in enumerate(read) if image is not None]
            found: dict[int, dict] = {}
            if good:
                images = np.stack([read[i] for i in good])
                p = model.probabilities([chunk[i] for i in good], images)
                best, d = np.argsort(-p, axis=1, kind="stable")[:, :n_best], model.nearest(images)
                for row, i in enumerate(good):
                    found[i] = _told(names, p[row], best[row], d[row], about["aid_factor"])
            for i, why in enumerate(whys):
                found.setdefault(i, {"class": "", "fault": f"cannot be read as an image: {why}"})
            rows += [{"file": _shown(file)} | found[i] for i, file in enumerate(chunk)]
            progress.update(len(chunk))
    return pd.DataFrame(rows, columns=["file", *_columns(n_best)])


def _shown(path: Path) -> str:
    """Its name as text that can be written: bytes that are not UTF-8 as \\x.."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _columns(n_best: int) -> list[str]:
    more = [f"{name}_{k}" for k in range(2, n_best + 1) for name in ("class", "probability")]
    return ["class", "probability", *more, "distance", "out_of_distribution", "fault"]


def _told(names, p, best, d: float, aid_factor: float) -> dict:
    row = {"fault": "", "distance": d, "out_of_distribution": bool(d > aid_factor)}
    for k, c in enumerate(best):
        suffix = f"_{k + 1}" if k else ""
        row |= {f"class{suffix}": names[c], f"probability{suffix}": p[c]}
    return row


def image_paths(given: list[Path]) -> list[Path]:
    """The files given, and the images below the folders given, in order; hidden ones are left out.

    Raises:
        FileNotFoundError: what is not there; no image at all.
    """
    found: list[Path] = []
    for path in given:
        if not path.exists():
            raise FileNotFoundError(f"{path}: there is no such file or folder")
        found += images_in(path) if path.is_dir() else [path]
    if not found:
        there = kinds(entry.name for path in given for entry in path.rglob("*") if entry.is_file())
        raise FileNotFoundError(
            f"{given[0]}: expected images, got {there}; convert them to JPEG or PNG"
        )
    return found


def main(argv: list[str] | None = None) -> int:
    about = " ".join(__doc__.split("\n\n")[0].split(":")[0].split())
    parser = argparse.ArgumentParser(
        prog="python -m difflt_core.reporting.predict", description=about
    )
    add = parser.add_argument
    add("images", nargs="+", type=Path, help="image files, and folders of them")
    add(
        "--model",
        type=Path,
        required=True,
        metavar="DIR",
        help="what notebook 12, export or baseline wrote",
    )
    add("--to", type=Path, metavar="FILE", help="write the CSV here (default: standard output)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    options = parser.parse_args(argv)
    try:
        device = resolve_device(options.device)
        model, files = SavedModel(options.model, device), image_paths(options.images)
        if options.to and not options.to.parent.is_dir():  # before the work
            raise FileNotFoundError(f"{options.to.parent}: there is no such folder; make it first")
        if options.to and options.to.is_dir():
            raise IsADirectoryError(
                f"--to {options.to}: expected a file, got a folder; name a file in it"
            )
        found = predict(model, files, context=Context(device))
        text = found.to_csv(index=False, float_format="%.4f", lineterminator="\n")
        atomic_write(options.to, text) if options.to else print(text, end="")
    except USER_ERRORS as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    unread = int((found["class"] == "").sum())
    if unread:
        print(f"{unread} of {len(found)} files cannot be read as images", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
