"""The balanced set as class folders of PNG, for any other program: the real training images, the
generated ones that the filter keeps, a manifest of every image, and a data card:
`python -m difflt_core.reporting.export --profile folder --data-dir /data --set path=my_images --to balanced`.

torchvision's ImageFolder and the imagefolder of Hugging Face's datasets read it as it is.
"""

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from ..config import vary
from ..data.long_tail import LongTail, load_split
from ..data.sources import in_data_dir
from ..engine.files import new_folder, refuse_existing
from ..engine.progress import bar
from ..engine.provenance import commit, environment
from ..experiments.pipeline import Pipeline
from ..experiments.results import generated
from ..generation.memorisation import Memorisation, nearest_training
from ..generation.quality import held_out, rows_alike
from ..notebooks import UsageError
from ..options import USER_ERRORS, add_hours, build_parser, read_run
from ..profiles import PARAMETERS
from .items import as_markdown
from .predict import SavedModel, need_onnx, save_model, write_onnx
from .runner import lengths_for

__all__ = ["export", "export_once", "main"]

_REAL = ("array", "copy", "link")


def export(pipeline: Pipeline, to: Path | str, real: str = "array") -> pd.DataFrame:
    """Write the balanced set of one seed into a new folder, and return its manifest.

    Args:
        to: the folder: <class>/real_00000.png, <class>/generated_00000.png, manifest.csv, README.md. It is
            complete or not there at all.
        real: the real images as the generator saw them ("array"), or their files, copied ("copy") or as
            symbolic links ("link"), where the data are image files.

    Returns:
        One row for each image: file ("" for a generated one that was not kept), class, origin (real or
        generated), type (of TYPES), distance (to the class centre, in class radii), nearest (file of the
        training image that is nearest, itself or mirrored where the generator saw both) and
        nearest_distance (root mean square, in grey levels), kept, seed, artifact (key of the generated
        images).

    Raises:
        ValueError: an unknown `real`, or files asked for where there are none. FileExistsError: `to` is
            there already.
    """
    to, train = Path(to), load_split(pipeline.data(), "train")
    _check_real(pipeline, real)
    with new_folder(to) as work:
        manifest, found = _write(pipeline, work, train, real)
        manifest.to_csv(
            work / "manifest.csv", index=False, float_format="%.4f", lineterminator="\n"
        )
        card = data_card(pipeline, manifest, train, found)
        (work / "README.md").write_text(card, encoding="utf-8")
    return manifest


def _check_real(pipeline: Pipeline, real: str) -> None:
    """Raise where the real images cannot be given that way."""
    if real not in _REAL:
        raise ValueError(f"real: expected one of {', '.join(_REAL)}, got {real!r}")
    if real != "array" and load_split(pipeline.data(), "train").files is None:
        raise ValueError(f"real: {pipeline.config.data.name} has no image files; use array")


def export_once(pipeline: Pipeline, to: Path) -> Path:
    """The same into a folder below `to` that is named by what it holds, balanced-<what is kept>-<key>,
    unless it is there already."""
    balanced = to / f"balanced-{pipeline.config.filtering.keep}-{pipeline.type_samples().key[:8]}"
    if not balanced.exists():
        export(pipeline, balanced)
    return balanced


def _write(pipeline, work: Path, train: LongTail, real: str) -> tuple[pd.DataFrame, Memorisation]:
    """The images, their manifest, and how near the generated ones come to the training images."""
    folders = _folder_names(train.class_names)
    for folder in folders:
        (work / folder).mkdir()
    n = len(train.labels)
    with bar(n, "writing real images", "image", context=pipeline.store.context) as progress:
        names = []
        for i, c in enumerate(train.labels):
            names.append(_write_real(pipeline, work, folders[c], train, i, real))
            progress.update()
    rows = pd.DataFrame(
        {"file": names, "class": [train.class_names[c] for c in train.labels], "origin": "real"}
    )
    samples, made = pipeline.generate(), generated(pipeline)
    images, found = samples.array("images"), None
    distance: np.ndarray = np.zeros(0)
    nearest: np.ndarray = np.zeros(0, np.int64)
    if len(made):
        device, flip = pipeline.store.context.device_here, pipeline.config.diffusion.flip
        distance, nearest = nearest_training(images, train.images, device, mirrored=flip)
        others = held_out(pipeline.data())
        mine, theirs = rows_alike(made["label"], others.labels)
        if len(theirs):
            apart = nearest_training(others.images[theirs], train.images, device, mirrored=flip)[0]
            found = Memorisation(distance[mine], nearest[mine], apart)
    files = []
    with bar(len(made), "writing generated images", "image", context=pipeline.store.context) as b:
        for i, (c, kept) in enumerate(zip(made["label"], made["kept"], strict=True)):
            files.append(f"{folders[c]}/generated_{i:05}.png" if kept else "")
            if kept:
                _png(images[i], work / files[-1])
            b.update()
    drawn = pd.DataFrame(
        {
            "file": files,
            "class": [train.class_names[c] for c in made["label"]],
            "origin": "generated",
            "type": made["type"],
            "distance": made["d"],
            "nearest": [names[j] for j in nearest],
            "nearest_distance": distance,
            "kept": made["kept"],
            "seed": pipeline.config.seed,
            "artifact": samples.key,
        }
    )
    manifest = pd.concat([rows.assign(kept=True), drawn], ignore_index=True)
    return manifest.astype({"seed": "Int64"}), found


def _write_real(pipeline, work: Path, folder: str, train: LongTail, i: int, real: str) -> str:
    """The name of a real image in the export, once it is there."""
    if real == "array" or train.files is None:
        name = f"{folder}/real_{i:05}.png"
        _png(train.images[i], work / name)
        return name
    root = in_data_dir(pipeline.config.data.path, pipeline.store.context.data_dir)
    source = root / train.files[i]
    name = f"{folder}/real_{i:05}{source.suffix.lower()}"
    if real == "link":
        (work / name).symlink_to(source.resolve())
    else:
        shutil.copyfile(source, work / name)
    return name


def _png(image: np.ndarray, path: Path) -> None:
    from PIL import Image

    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else np.asarray(image)).save(path)


def _folder_names(class_names: tuple[str, ...]) -> list[str]:
    """A folder for each class, inside the export whatever a class is called, no two alike on any disk."""
    names: list[str] = []
    for c, name in enumerate(class_names):
        safe = re.sub(r'[\x00-\x1f/\\:*?"<>|]', "_", name).strip(". ") or f"class {c}"
        taken = {n.casefold() for n in names}
        names.append(safe if safe.casefold() not in taken else f"{safe} ({c})")
    return names


def data_card(pipeline: Pipeline, manifest: pd.DataFrame, train: LongTail, found) -> str:
    """What the export's README.md says: how it was made, what is in it, what was measured, its
    limits."""
    config, env = pipeline.config, environment(pipeline.store.context.device_here)
    drawn, real = (manifest[manifest["origin"] == origin] for origin in ("generated", "real"))
    counts = pd.DataFrame(
        {
            "class": train.class_names,
            "real": [int((real["class"] == name).sum()) for name in train.class_names],
            "generated, kept": [
                int(((drawn["class"] == name) & (drawn["kept"])).sum())
                for name in train.class_names
            ],
        }
    )
    kept = drawn[drawn["kept"].astype(bool)]
    shares = (
        (100 * kept["type"].value_counts(normalize=True)).round(1).to_dict() if len(kept) else {}
    )
    told = ", ".join(f"{share:g} % {name}" for name, share in shares.items()) or "no image"
    copies = (
        f"{found.words()}." if found else "Whether images are copies was not measured: too few."
    )
    size = "x".join(map(str, train.images.shape[1:3]))
    return f"""# A long-tailed set of images, balanced with generated ones

{len(real)} real and {len(kept)} generated images of {len(train.class_names)} classes, {size} pixels, by difflt (DiffuLT, NeurIPS 2024), seed {config.seed}.
`manifest.csv` has a row for each image, also for the {len(drawn) - len(kept)} generated ones that the filter dropped.

{counts.map(as_markdown).to_markdown(index=False, disable_numparse=True)}

## How the generated images were made

A diffusion model was trained on the real images of this set and on nothing else, and drew what each class lacks. Settings: {config.diffusion.n_steps:,} steps of
{config.diffusion.batch_size} images, tau = {config.diffusion.tau:g}, alpha = {config.diffusion.alpha:g}; {config.sampling.sampler}, {config.sampling.n_steps} steps,
guidance {config.sampling.guidance:g}. Kept: {config.filtering.keep}. Profile {config.profile}, commit {commit() or "unknown"}, torch {env["packages"]["torch"]}, {env["hardware"]}.

## What was measured

- Of the kept images: {told}. ID lie within the radius of their class in the features of a classifier that was trained on the real images, AID within
  {config.filtering.aid_factor:g} radii; `distance` is in radii.
- {copies}

## Limits

- A generated image may show another class than its folder says. Its class was asked for, not looked at by anybody.
- A classifier should give generated images less weight than real ones (omega; 0.3 in the paper).
- They show what the real images show, and their one-sidedness too. Rights in the real images extend to what is made of them.
- Test on real images alone.
"""


def main(argv: list[str] | None = None) -> int:
    parser = build_parser("python -m difflt_core.reporting.export", __doc__.split("\n\n")[0])
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--real", choices=_REAL, default="array",
        help="real images as arrays at the generator's size (default), or their files: copy, link",
    )  # fmt: skip
    parser.add_argument(
        "--model", type=Path, metavar="DIR",
        help="train the final classifier too, into a new folder for difflt_core.reporting.predict",
    )  # fmt: skip
    parser.add_argument(
        "--onnx", action="store_true", help="with --model: as ONNX too (the extra onnx)"
    )
    add_hours(parser, "as ./run_all.sh had it, whose lengths are taken")
    run = read_run(argv, parser)
    if run is None:
        return 2
    options, config = run.options, run.config
    try:
        _check_targets(options)
        if options.hours:
            found = lengths_for(options, measure=False)
            config = vary(config, {PARAMETERS[name]: steps for name, steps in found.items()})
        pipeline = Pipeline(config, run.out, run.device, data_dir=run.data_dir)
        pipeline = pipeline.vary({"seed": config.seeds[0]})
        _check_real(pipeline, options.real)
        last = "train_classifier" if options.model else "type_samples"
        pipeline.build([{}], stages=(last,))
        manifest = export(pipeline, options.to, options.real)
        if options.model:
            save_model(pipeline, options.model)
        if options.model and options.onnx:
            write_onnx(SavedModel(options.model), load_split(pipeline.data(), "train").images[:256])
    except (*USER_ERRORS, ImportError, RuntimeError, UsageError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    print(f"{int(manifest['kept'].sum())} images in {options.to}")
    return 0


def _check_targets(options) -> None:
    """Raise for what would fail after hours of training."""
    for folder in (options.to, options.model):
        if folder:
            refuse_existing(folder)
    if options.model and options.model.resolve() == options.to.resolve():
        raise ValueError(f"--model: expected another folder than --to {options.to}, got the same")
    if options.onnx and not options.model:
        raise ValueError("--onnx: goes with --model DIR, whose classifier it writes")
    if options.onnx:
        need_onnx()


if __name__ == "__main__":
    sys.exit(main())
