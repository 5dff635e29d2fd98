"""What a profile costs on one GPU, on paper: the stages that each notebook builds, their FLOPs, and
the hours at a share of the GPU's peak.

Nothing is trained. The notebooks' own code declares what they build, so it is executed with a store
that only notes what it is asked for; a cell that needs a result is left out.
"""

import argparse
import contextlib
import functools
import io
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import numpy as np
import pandas as pd
import torch

from ..config import (
    ClassifierConfig,
    DataConfig,
    DiffusionConfig,
    SamplingConfig,
    SauConfig,
    load_config,
)
from ..data.long_tail import class_sizes, shortfall
from ..engine import scheduler
from ..engine.artifacts import Artifact, Node, Store
from ..experiments import pipeline, results
from ..generation.network import make_unet
from ..generation.training import _SAMPLE_EVERY, _SAMPLE_STEPS
from ..notebooks import Notebook, find_notebooks
from ..recognition.methods import heads_of
from ..recognition.networks import make_backbone
from .shared import write

__all__ = ["Work", "add_options", "cost_of", "main_rows", "planned", "run", "unet_flop"]

PROFILES = ("cifar10-fast", "cifar100-fast", "cifar10", "cifar100", "imagenet")
# ImageNet-LT, whose files are not needed here: classes, images of the largest, all (docs/protocol.md).
IMAGENET_LT = (1000, 1280, 115_846)
_BACKWARD = 2  # in forwards


def add_options(parser) -> None:
    add = parser.add_argument
    add("--profile", action="append", help=f"repeatable (default: {', '.join(PROFILES)})")
    add("--peak", type=float, default=989.0, help="TFLOP/s, dense bf16 (default: an H100's 989)")
    share = "of the peak that a large network reaches (default: 0.15, as EDM's ImageNet-64 run did)"
    add("--share", type=_share, default=0.15, help=share)
    floor = "a training step takes at least so long, whatever it computes (default: 5)"
    add("--step-ms", type=float, default=5.0, help=floor)


def _share(text: str) -> float:
    if not 0 < (share := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"expected more than 0 and at most 1, got {text}")
    return share


def run(options) -> None:
    for profile in options.profile or PROFILES:
        table = _table(profile, options)
        face = (
            f"Profile {profile} on one GPU of {options.peak:g} TFLOP/s, on paper: "
            f"{100 * options.share:g} % of the peak, a training step of at least "
            f"{options.step_ms:g} ms. Each notebook alone, and after the ones before it."
        )
        record = {"rows": table.to_dict("records"), "share": options.share, "peak": options.peak}
        write(options, f"cost-{profile}", face, table, record, f"{_memory(profile)}\n{_NOTE}")


_NOTE = (
    "Counted are multiplications and additions of the networks; not counted: reading data, testing, "
    "metrics. Share and floor are assumptions until a GPU has measured them "
    "(`python -m difflt_core.benchmarks throughput`)."
)


def _table(profile: str, options) -> pd.DataFrame:
    known: dict[str, Work] = {}
    rows = []
    for notebook in find_notebooks():
        found = {}
        if notebook.runs_by_default(profile):
            found = cost_of(planned(notebook, profile))
        if found:
            new = {key: work for key, work in found.items() if key not in known}
            rows.append(_row(notebook.path.stem, found, options, new))
        known |= found
    rows.append(_row("all", known, options))
    return pd.DataFrame(rows + main_rows(profile, options))


def main_rows(profile: str, options) -> list[dict]:
    """What table 7's rows at the profile's own r cost, for one seed and for all; and its notebook there,
    with one seed."""
    rows, config = [], load_config(profile)
    seeds, own = config.seeds, {"ratios": [config.data.imb_ratio], "seeds": list(config.seeds[:1])}
    for chosen in (seeds[:1], seeds):
        name = f"DiffuLT and the other losses at one r, {len(chosen)} seed{'s' if len(chosen) > 1 else ''}"
        rows.append(_row(name, cost_of(_main_table(profile, chosen)), options))
    for notebook in find_notebooks():
        if notebook.number == "05" and notebook.runs_by_default(profile):
            found = cost_of(planned(notebook, profile, **own))
            rows.append(_row("notebook 05 at that r alone, 1 seed", found, options))
    return rows


def _row(name: str, works: dict, options, new: dict | None = None) -> dict:
    """new: what no notebook before it has built."""
    every = works.values()
    return {
        "notebook": name,
        "stages": len(works),
        "trained, M images": f"{sum(w.images for w in every if w.steps) / 1e6:.1f}",
        "PFLOP": f"{sum(w.flop for w in every) / 1e15:.0f}",
        "h alone": f"{_hours(works, options):.2f}",
        "h after the others": "" if new is None else f"{_hours(new, options):.2f}",
    }


def _hours(works: dict, options) -> float:
    rate = options.peak * 1e12 * options.share
    return sum(max(w.flop / rate, w.steps * options.step_ms / 1e3) for w in works.values()) / 3600


@dataclass(frozen=True)
class Work:
    """Of one stage: its name, FLOPs, images that went through training or were drawn, steps of
    training."""

    stage: str
    flop: float = 0.0
    images: float = 0.0
    steps: int = 0


def planned(notebook: Notebook, profile: str, **parameters) -> dict[str, Node]:
    """The stages that a notebook builds at a profile, by key, in an order in which they can be built."""
    nodes: dict[str, Node] = {}
    with tempfile.TemporaryDirectory() as out, _only_noted(nodes):
        values = {"profile": profile, "device": "cpu", "out": out, "data_dir": out, **parameters}
        given = "\n".join(f"{k} = {v!r}" for k, v in notebook.arguments(values).items())
        names: dict = {"display": lambda *_: None}
        for cell in notebook.content["cells"]:
            if cell["cell_type"] == "code":
                source = "".join(cell["source"])
                of_parameters = "parameters" in cell["metadata"].get("tags", [])
                _execute(source + ("\n" + given if of_parameters else ""), names)
    return nodes


def _main_table(profile: str, seeds: tuple[int, ...]) -> dict[str, Node]:
    """The stages of table 7's rows at the profile's own r."""
    nodes: dict[str, Node] = {}
    with tempfile.TemporaryDirectory() as out, _only_noted(nodes):
        for seed in seeds:
            p = pipeline.Pipeline(load_config(profile), out, "cpu", data_dir=out).vary(
                {"seed": seed}
            )
            p.train_classifier()
            for method in ("bsce", "ldam", "ride"):
                p.vary({"classifier.method": method}).train_on_real()
    return nodes


def _execute(source: str, names: dict) -> None:
    """Run a cell; without the results of what was only noted, most cannot be run to their end."""
    import matplotlib

    matplotlib.use("agg")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(source, "<cell>", "exec"), names)
    except Exception:  # any: the cell needs what was not built
        pass


@contextlib.contextmanager
def _only_noted(nodes: dict) -> Iterator[None]:
    """Inside, a store and a planner note what they are asked for and build nothing."""

    def plan(planner, jobs=None) -> None:
        for key, node in planner.nodes.items():
            nodes.setdefault(key, node)

    def note(store, *asked) -> Artifact:
        planner = scheduler.Planner(store)
        found = planner.get(*asked)
        plan(planner)
        return found

    def frame(experiment, *measures) -> pd.DataFrame:
        experiment.build(*measures)
        return pd.DataFrame(columns=["variant", "seed", "metric", "value"])

    with (
        mock.patch.object(Store, "get", note),
        mock.patch.object(scheduler.Planner, "run", plan),
        mock.patch.object(results.Experiment, "frame", frame),
        mock.patch.object(results.Quality, "check", lambda _: None),  # of data and weights
        mock.patch.object(pipeline, "fingerprint", lambda *_: ""),
        mock.patch.object(pipeline.Pipeline, "class_counts", lambda p: _sizes(p.config.data)),
    ):
        yield


def cost_of(nodes: dict[str, Node]) -> dict[str, Work]:
    """The work of planned stages, by key."""
    return {key: _work(node, nodes) for key, node in nodes.items()}


def _work(node: Node, nodes: dict) -> Work:
    name, config = node.stage.name, node.config
    if name in ("extractor", "classifier"):
        recipe, shape = ClassifierConfig.model_validate(config["classifier"]), _shape(node, nodes)
        size = recipe.crop_size or shape[0]
        views = 2 if recipe.method in ("paco", "gpaco") else 1
        net = _backbone_flop(recipe.arch, recipe.width, size, *shape[1:], **heads_of(recipe))
        seen = recipe.n_steps * recipe.batch_size * views
        return Work(name, seen * net * (1 + _BACKWARD), seen, recipe.n_steps)
    if name == "sau":
        sau = SauConfig.model_validate(config["sau"])
        net = _backbone_flop(sau.arch, sau.width, *_shape(node, nodes))
        seen = sau.n_steps * sau.batch_size * {"both": 4}.get(sau.branches, 2)
        return Work(name, seen * net * (1 + _BACKWARD), seen, sau.n_steps)
    if name == "diffusion":
        return _generator_work(node, nodes)
    if name == "samples":
        return _samples_work(node, nodes)
    return Work(name)


def _generator_work(node: Node, nodes: dict) -> Work:
    recipe = DiffusionConfig.model_validate(node.config["diffusion"])
    net = unet_flop(recipe.preset, *_shape(node, nodes))
    late = recipe.n_steps - recipe.n_plain_steps
    plain = 0 if "plain" in node.inputs else recipe.n_plain_steps
    # L_CBDM, and L_AID's readings but "own" and "sample", ask once more; "sample" a quarter, six times
    both = recipe.tau > 0 or (recipe.alpha > 0 and recipe.aid_reading == "other")
    more = float(both) + float(recipe.alpha > 0 and recipe.aid_reading == "difference")
    forwards = plain * (1 + _BACKWARD) + late * (1 + more) * (1 + _BACKWARD)
    if recipe.alpha > 0 and recipe.aid_reading == "sample":
        forwards += late * (_SAMPLE_STEPS + _BACKWARD) / _SAMPLE_EVERY
    seen = (plain + late) * recipe.batch_size
    return Work("diffusion", forwards * recipe.batch_size * net, seen, plain + late)


def _samples_work(node: Node, nodes: dict) -> Work:
    sampling = SamplingConfig.model_validate(node.config["sampling"])
    shape, counts = _shape(node, nodes), _sizes(_data(node, nodes))
    net = unet_flop(node.config["diffusion"]["preset"], *shape)
    n = int(shortfall(counts, sampling.fill_to).sum())
    if node.config.get("n_per_class"):
        n = node.config["n_per_class"] * len(counts)
    calls = sampling.n_steps * (2 if sampling.sampler == "heun" else 1)
    # guided calls ask twice; in an interval of noise they are fewer, which is not counted
    return Work("samples", n * calls * net * (2 if sampling.guidance > 1 else 1), n)


def _data(node: Node, nodes: dict) -> DataConfig:
    return DataConfig.model_validate(nodes[node.inputs["data"].key].config["data"])


def _shape(node: Node, nodes: dict) -> tuple[int, int, int]:
    """Pixels, channels, classes."""
    data = _data(node, nodes)
    return data.image_size, _channels(data), len(_sizes(data))


def _channels(data: DataConfig) -> int:
    return 1 if data.name in ("digits", "fashion_mnist") else 3


def _sizes(data: DataConfig) -> np.ndarray:
    """Training images of each class by the protocol; of ImageNet-LT, whose lists are not read here, as
    many classes and images, the largest class of its size and the rest alike."""
    K = data.n_classes or data.own_classes
    if K and data.n_max and data.imb_ratio:
        return np.array(class_sizes(K, data.n_max, data.imb_ratio, data.imb_type))
    if data.name != "imagenet_lt":
        raise ValueError(f"cost: the class sizes of {data.name} are not known without its files")
    K, largest, total = IMAGENET_LT
    rest = np.diff(np.linspace(0, total - largest, K).astype(int))
    return np.concatenate([[largest], rest])


@functools.cache
def unet_flop(preset: str, size: int, channels: int, K: int) -> float:
    """Of one image's forward through the generator."""
    with torch.device("meta"):
        label = torch.zeros(1, dtype=torch.long)  # the timestep may be any, too
        return _flop(make_unet(preset, K, size, channels), size, channels, label, label)


@functools.cache
def _backbone_flop(arch: str, width: int, size: int, channels: int, K: int, **heads) -> float:
    return _flop(make_backbone(arch, K, channels, width, **heads), size, channels)


def _memory(profile: str) -> str:
    """What the backward of a batch of the profile's generator keeps, in a sentence."""
    config = load_config(profile)
    data, recipe = config.data, config.diffusion
    K = len(_sizes(data))
    size = _activations(recipe.preset, data.image_size, _channels(data), K) / 2
    forwards = 2 if recipe.tau > 0 else 1
    whole = size * forwards * recipe.batch_size / 1e9
    return (
        f"The backward of the generator keeps about {size / 1e6:.0f} MB of activations per image and "
        f"forward in bf16: {whole:.0f} GB for {recipe.batch_size} images and {forwards} forwards. "
        "What does not fit goes through in parts, whose gradients add up."
    )


def _activations(preset: str, size: int, channels: int, K: int) -> float:
    """Bytes that the backward of one image's forward keeps in fp32, weights not counted."""
    kept: dict[int, int] = {}

    def note(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    with torch.device("meta"):
        net, label = make_unet(preset, K, size, channels), torch.zeros(1, dtype=torch.long)
        weights = {p.untyped_storage()._cdata for p in net.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            net(torch.zeros(1, channels, size, size), label, label)
    return float(sum(n for storage, n in kept.items() if storage not in weights))


def _flop(net, size: int, channels: int, *labels) -> float:
    """Of one image's forward."""
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.zeros(1, channels, size, size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net.eval()(x, *labels)
    return float(counter.get_total_flops())
