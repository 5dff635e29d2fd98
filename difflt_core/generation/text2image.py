"""Synthetic images from a text-to-image pipeline of diffusers that the user names, with the user's
prompts (SAU's source is GLIDE with prompts from GPT-3.5; docs/protocol.md, SAU).
"""

import hashlib
import inspect
import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from ..config import Text2ImageConfig
from ..data.image_files import fit_image
from ..data.long_tail import load_split, shortfall
from ..data.sources import in_data_dir
from ..engine.chunks import Chunks, finish_images
from ..engine.files import file_sha256
from ..engine.precision import half_precision, out_of_memory
from ..engine.seeding import generator

__all__ = ["build_text2image", "load_pipeline", "prompts_by_class", "read_prompts"]


def read_prompts(path: Path) -> list[tuple[str, str]]:
    """(class, prompt) of each line "class: prompt" or "class<tab>prompt" of a UTF-8 file; empty lines
    and those that start with # are left out.

    Raises:
        FileNotFoundError: no such file. ValueError: a line of another form.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"prompts: expected a text file with lines 'class: prompt', got {path}; choose it with "
            "--set prompts=NAME (inside --data-dir, or an absolute path)"
        )
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, prompt = line.partition("\t" if "\t" in line else ": ")
        if not name.strip() or not prompt.strip():
            raise ValueError(f"{path}, line {number}: expected 'class: prompt', got {line[:100]!r}")
        found.append((name.strip(), prompt.strip()))
    return found


def prompts_by_class(pairs, class_names) -> list[list[str]]:
    """Prompts of each class, in class order. A class is called by its name, else by its index.

    Raises:
        ValueError: an unknown class, or one without a prompt.
    """
    known = {str(c): c for c in range(len(class_names))}
    known |= {name: c for c, name in enumerate(class_names)}
    unknown = sorted({name for name, _ in pairs} - set(known))
    if unknown:
        raise ValueError(f"prompts: unknown classes {unknown}; the data have {list(class_names)}")
    prompts: list[list[str]] = [[] for _ in class_names]
    for name, prompt in pairs:
        prompts[known[name]].append(prompt)
    without = [name for name, found in zip(class_names, prompts, strict=True) if not found]
    if without:
        raise ValueError(f"prompts: classes {without} have none; add a line 'class: prompt' each")
    return prompts


def build_text2image(work, config: dict, inputs: dict, context) -> None:
    """Source "text2image": (1 + surplus) (M - n_c) images per class from the user's pipeline, with
    the prompts of the class in turn.

    The noise of image i of class y is a function of (seed, y, i) alone. Resumes after a kill;
    several processes share the batches.
    """
    recipe = Text2ImageConfig.model_validate(config["text2image"])
    train = load_split(inputs["data"], "train")
    prompts, shape = prompts_by_class(config["prompts"], train.class_names), train.images.shape[1:]
    wanted = np.ceil(shortfall(train.class_counts) * (1 + recipe.surplus)).astype(int)
    todo = [(y, i) for y, n in enumerate(wanted) for i in range(n)]
    pipeline, facts = load_pipeline(recipe, context)
    size = recipe.batch_size
    chunks = Chunks(work, "synthetic", (len(todo), *shape), size)
    for part in chunks.todo("text to image", context):
        texts = [prompts[y][i % len(prompts[y])] for y, i in todo[part]]
        noise = [generator(config["seed"], "text2image", y, i) for y, i in todo[part]]
        try:
            pictures = _draw(pipeline, recipe, texts, noise)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(error, "synthetic.text2image.batch_size", size) from None
        chunks.write(part, np.stack([fit_image(picture, shape) for picture in pictures]))
    chunks.merge()
    told = hashlib.sha256(json.dumps(config["prompts"]).encode()).hexdigest()
    facts |= {**config["text2image"], "prompts_sha256": told, "seed": config["seed"]}
    finish_images(work, "synthetic", [y for y, _ in todo], facts)


def _draw(pipeline, recipe: Text2ImageConfig, texts: list[str], noise: list) -> list:
    """One PIL image per text, each from its own generator."""
    return pipeline(
        prompt=texts,
        generator=noise,
        num_inference_steps=recipe.n_steps,
        guidance_scale=recipe.guidance,
    ).images


def load_pipeline(recipe: Text2ImageConfig, context) -> tuple:
    """The user's diffusers pipeline on the context's device, and where it comes from. Only
    safetensors are loaded, never a torch pickle or code that comes with the weights.

    Raises:
        ImportError: no transformers. FileNotFoundError: not on disk, or no safetensors.
        ValueError: not a text-to-image pipeline.
    """
    if find_spec("transformers") is None:
        raise ImportError(
            "text2image: the text encoders need the package transformers; install it with "
            'pip install -e ".[text2image]" in the checkout'
        )
    from diffusers import DiffusionPipeline

    safe = {"use_safetensors": True, "local_files_only": not context.download}
    folder = in_data_dir(recipe.pipeline, context.data_dir)
    dtype = torch.bfloat16 if half_precision(recipe.precision, context.device) else torch.float32
    try:
        if not folder.is_dir():  # the hub's cache, in a folder named by the commit
            which = {"revision": recipe.revision or None}
            folder = Path(DiffusionPipeline.download(recipe.pipeline, **which, **safe))
        pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype, **safe)
    except (OSError, ValueError) as error:
        fault = f"{type(error).__name__}: {error}".splitlines()[0]
        raise FileNotFoundError(
            f"text2image_pipeline: expected a diffusers pipeline with safetensors weights in {folder}, "
            f"or by the name {recipe.pipeline!r} in the hub's cache, got {fault}; put it there, or let "
            "--download fetch it (in JupyterLab: %env DIFFLT_DOWNLOAD=1)"
        ) from error
    missing = {"prompt", "guidance_scale"} - set(inspect.signature(pipeline.__call__).parameters)
    if missing:
        raise ValueError(
            f"text2image_pipeline: expected one that draws from a prompt, got {type(pipeline).__name__} "
            f"of {recipe.pipeline!r}, which takes no {' and no '.join(sorted(missing))}; choose another"
        )
    pipeline.set_progress_bar_config(disable=True)
    facts = {"class": type(pipeline).__name__, "folder": folder.name}
    facts["model_index_sha256"] = file_sha256(folder / "model_index.json")
    return pipeline.to(context.device), facts
