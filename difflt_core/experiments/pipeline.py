"""What each stage of DiffuLT needs, and the call that plans and builds them.

data -> train_extractor -> train_diffusion -> generate -> type_samples -> train_classifier
"""

import copy
import functools
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from ..config import ClassifierConfig, DiffusionConfig, RunConfig, TrainingConfig, vary
from ..data.folders import training_counts
from ..data.long_tail import class_sizes, load_split, shortfall
from ..data.sources import build_data, fingerprint, in_data_dir
from ..engine.artifacts import Artifact, Stage, Store
from ..engine.cluster import facts
from ..engine.code_version import Chosen
from ..engine.live_code import remember
from ..engine.precision import set_kernels
from ..engine.progress import Context
from ..engine.provenance import ROOT, cache_folder
from ..engine.scheduler import Planner
from ..generation.network import make_unet
from ..generation.sampling import build_samples, check_sampling
from ..generation.training import build_diffusion, plain_part
from ..recognition.classifier import build_classifier, build_extractor
from ..recognition.sau import build_sau, renew_statistics
from ..selection.sample_types import build_types, kept_name
from ..selection.synthetic import SOURCES, build_synthetic, source_facts

__all__ = ["Pipeline"]

_Recipe = TypeVar("_Recipe", bound=TrainingConfig)

_READERS = "difflt_core.data.sources.READERS"  # of these tables a stage's code is its own entries
_OBJECTIVES = "difflt_core.recognition.methods.OBJECTIVES"
_POLICIES = "difflt_core.data.augment.POLICIES"
_BACKBONES = "difflt_core.recognition.networks.BACKBONES"
_AID_LOSSES = "difflt_core.generation.losses.AID_LOSSES"
remember()  # all stages are imported, and nobody had the time to replace any of their code


class Pipeline:
    """The stages of one configuration. Each method returns an artifact: found when it exists, else
    built.

    Args:
        config: what to run. out: folder whose runs/cache holds the artifacts, unless DIFFLT_CACHE names
            another; "" is the checkout.
        device: "auto", "cpu" or "cuda"; never changes a key. progress: show bars.
        data_dir: where data sets lie; "" is data/ in the checkout.
    """

    def __init__(
        self,
        config: RunConfig,
        out: Path | str = "",
        device: str = "auto",
        progress: bool = True,
        data_dir: Path | str = "",
    ):
        self.config = config
        # One thread per stage on small images: it is nearly as fast as all cores, stages run side by
        # side instead, and results do not depend on the number of cores.
        threads = 1 if config.data.is_small else None
        data_dir = str(Path(data_dir or ROOT / "data").resolve())
        download = os.environ.get("DIFFLT_DOWNLOAD", "0") != "0"  # set by ./run_all.sh --download
        every = float(os.environ.get("DIFFLT_CHECKPOINT_S", Context.checkpoint_s))
        device, auto_precision = facts(device)
        set_kernels(device)  # what a notebook measures itself is computed as a stage is
        context = Context(
            device, progress, data_dir, download, threads, every, auto_precision=auto_precision
        )
        self.store = Store(cache_folder(Path(out or ROOT)), context)
        # every artifact this pipeline touched, for the provenance of a table
        self.used: dict[str, Artifact] = {}
        self._sources: dict[str, Any] = {}  # what makes folders the same: a look takes seconds

    def vary(self, changes: dict) -> "Pipeline":
        """The same store, a changed configuration, one shared record of what was used."""
        other = copy.copy(self)
        other.config = vary(self.config, changes)
        return other

    def build(
        self,
        variants: Iterable[dict],
        jobs: int | None = None,
        stages: tuple[str, ...] = ("train_classifier", "train_oracle"),
    ) -> None:
        """Train everything that these variants and their oracles need, side by side.

        Args:
            variants: changes as for vary, e.g. [{"seed": 0}, {"seed": 0, "diffusion.tau": 1.0}].
            jobs: stages at a time; None is DIFFLT_JOBS, or the number of GPUs or CPU cores.
            stages: the methods of this class that are wanted in the end.
        """
        planner = Planner(self.store)
        for changes in variants:
            self.vary(changes).plan(planner, stages)
        planner.run(jobs)

    def plan(self, planner: Planner, stages: Iterable[str]) -> None:
        """Hand what these stages need to a planner, which trains it with that of other pipelines.

        Args:
            stages: as for build; the oracle only where the data have one.
        """
        planned = self.vary({})
        planned.store, planned.used = planner, {}
        for stage in stages:
            if stage != "train_oracle" or self.has_oracle:
                getattr(planned, stage)()

    def data(self) -> Artifact:
        config, stage = self._data_recipe()
        return self._get(stage, config)

    def _data_recipe(self) -> tuple[dict, Stage]:
        data, context = self.config.data, self.store.context
        bounds = {"many_above", "few_below"}  # of groups, which are no part of the data
        chosen = data.model_dump(mode="json", exclude=bounds)
        config: dict = {"data": chosen, "seed": self.config.draw}
        config["source"] = self._source(
            f"{data.name} {data.path}",
            lambda: fingerprint(data, context.data_dir, context.download),
        )
        return config, Stage("data", build_data, chosen={_READERS: self.config.data.name})

    def _source(self, name: str, look: Callable[[], Any]) -> Any:
        """What a look at a source says, which this pipeline and its variants take once; a stage that
        reads a folder refuses one that has changed since."""
        if name not in self._sources:
            self._sources[name] = look()
        return self._sources[name]

    def class_counts(self) -> np.ndarray:
        """Training images of each class, int64 (K,): by the protocol, or as the data have them, which
        are then read."""
        data = self.config.data
        if data.n_classes and data.n_max and data.imb_ratio:
            return np.array(class_sizes(data.n_classes, data.n_max, data.imb_ratio, data.imb_type))
        there = getattr(self.store, "store", self.store)  # a planner builds nothing
        config, stage = self._data_recipe()
        return load_split(there.get(stage, config), "train").class_counts

    def as_long_on_real(self) -> dict[str, dict]:
        """Changes with which train_on_real trains as long as the final classifier does on its larger
        set: as many updates of the weights, or as many epochs of its own set."""
        fill_to = self.config.sampling.fill_to
        final = self._in_steps(self.config.classifier, fill_to)
        share = self._n_images(None) / self._n_images(fill_to)
        parts = {"equal updates": 1.0, "equal epochs": share}
        return {name: _stretched(final, part, "extractor") for name, part in parts.items()}

    def as_long_as_sau(self) -> dict:
        """Changes with which train_on_synthetic has as many updates of the weights as train_sau, on the
        same images; none where it has them anyway."""
        sau = self._in_steps(self.config.sau, 0)
        final = self._in_steps(self.config.classifier, 0)
        part = sau.n_steps / final.n_steps
        return {} if part == 1 else _stretched(final, part, "classifier")

    def rates_of_sau(self) -> dict:
        """Changes with which train_on_synthetic has the learning rate, weight decay, warm-up and momentum
        of train_sau; none where it has them anyway."""
        sau, final = self._in_steps(self.config.sau, 0), self._in_steps(self.config.classifier, 0)
        names = ("lr", "weight_decay", "warmup_steps", "schedule", "nesterov")
        if all(getattr(sau, name) == getattr(final, name) for name in names):
            return {}
        return {f"classifier.{name}": getattr(sau, name) for name in names}

    def _in_steps(self, recipe: _Recipe, fill_to: int | None) -> _Recipe:
        """The recipe with its length in steps; fill_to: see _n_images."""
        if recipe.epochs is None and recipe.warmup_epochs is None:
            return recipe
        return recipe.in_steps(self._n_images(fill_to))

    def _n_images(self, fill_to: int | None) -> int:
        """Of the real training set (None), or of one where every class is filled up to so many images (0:
        to the largest class), before the filter."""
        counts = self.class_counts()
        missing = 0 if fill_to is None else shortfall(counts, fill_to)
        return int((counts + missing).sum())

    def train_extractor(self) -> Artifact:
        """phi_0; also the cross-entropy baseline where the final classifier has its network and recipe."""
        return self._train_on_real(self.config.extractor)

    def train_diffusion(self) -> Artifact:
        # before hours of training
        _check_network(self.config.diffusion.preset, self.config.data.image_size)
        check_sampling(self.config.sampling, self.config.diffusion)
        p = self._of_the_generator()
        config = self._generator_config(self.config.diffusion.canonical())
        inputs = {"data": self.data()}
        if self.config.diffusion.alpha > 0:  # else neither phi_0 nor the radii matter
            filtering = self.config.filtering
            config |= {"radius": filtering.radius, "aid_factor": filtering.aid_factor}
            inputs["extractor"] = p.train_extractor()
        if self.config.diffusion.n_plain_steps:
            inputs["plain"] = self.train_plain()
        return self._get(self._diffusion_stage(self.config.diffusion), config, **inputs)

    def train_plain(self) -> Artifact:
        """The first part of the generator, without L_CBDM and L_AID, which variants share."""
        recipe = plain_part(self.config.diffusion)
        config = self._generator_config(recipe) | {"keep_state": True}
        return self._get(self._diffusion_stage(recipe), config, data=self.data())

    def _diffusion_stage(self, recipe: DiffusionConfig) -> Stage:
        """Only L_AID has a formula, and looks at phi_0."""
        chosen: Chosen = {_AID_LOSSES: (), _BACKBONES: ()}
        if recipe.alpha > 0:
            chosen = {_AID_LOSSES: recipe.aid_formula, _BACKBONES: self.config.extractor.arch}
        return Stage("diffusion", build_diffusion, parallel=True, chosen=chosen)

    def _generator_config(self, recipe: DiffusionConfig) -> dict:
        """What the training of a generator reads, without what only L_AID needs."""
        config = {
            "diffusion": recipe.model_dump(mode="json", exclude={"seed"}),
            "seed": self._of_the_generator().config.seed,
        }
        if recipe.head_share < 1:
            config["many_above"] = self.config.data.many_above
        return config

    def generate(self) -> Artifact:
        """The images that fill every class up."""
        return self._samples({})

    def quality_samples(self) -> Artifact:
        """Images of every class alike, of a draw of their own: what FID and its like measure."""
        return self._samples({"n_per_class": self.config.metrics.n_per_class})

    def _samples(self, extra: dict) -> Artifact:
        recipe, sampling = self._dump("diffusion"), self._dump("sampling")
        names = ["parameterisation", "edm_mean", "edm_std", "sigma_data"]
        names += ["n_timesteps", "beta_schedule", "preset"]
        config = {
            "sampling": sampling,
            "diffusion": {name: recipe[name] for name in names},
            "seed": self._of_the_generator().config.seed,
            **extra,
        }
        inputs = {"data": self.data(), "diffusion": self.train_diffusion()}
        if self.config.sampling.guide == "earlier":
            inputs["plain"] = self.train_plain()
        return self._get(Stage("samples", build_samples, parallel=True), config, **inputs)

    def _of_the_generator(self) -> "Pipeline":
        """This pipeline with the seed of its generator, which repeats may share."""
        seed = self.config.diffusion.seed
        return self if seed is None else self.vary({"seed": seed})

    def type_samples(self) -> Artifact:
        return self._types(self.generate())

    def _types(self, samples: Artifact) -> Artifact:
        filtering = self._dump("filtering")
        filtering.pop("keep")  # every rule is written, so that rules share one artifact
        return self._get(
            Stage("types", build_types, chosen={_BACKBONES: self.config.extractor.arch}),
            {"filtering": filtering},
            data=self.data(),
            extractor=self.train_extractor(),
            samples=samples,
        )

    def synthetic(self) -> Artifact:
        """Synthetic images that fill every class up to the largest one, from the configured source:
        images uint8 (N_syn, H, W, C), labels int64 (N_syn,), and info with their origin."""
        synthetic, offered = self.config.synthetic, self.synthetic_source()
        config = {"source": synthetic.source, "kept": None}
        inputs = {"data": self.data(), "offered": offered}
        if synthetic.filtered:
            config["kept"] = kept_name(self.config.filtering.keep)
            inputs["types"] = self._types(offered)
        return self._get(Stage("synthetic", build_synthetic), config, **inputs)

    def synthetic_source(self) -> Artifact:
        """All images of the synthetic source. One set for all repeats, unless DiffuLT draws it."""
        synthetic = self.config.synthetic
        if synthetic.source == "diffult":
            return self.generate()
        data_dir, seed = self.store.context.data_dir, self.config.data_seed
        facts = self._source(
            f"{synthetic.model_dump_json()} {seed}",
            lambda: source_facts(synthetic, data_dir, seed),
        )
        return self._get(SOURCES[synthetic.source], facts, data=self.data())

    def train_classifier(self) -> Artifact:
        config = {
            **self._recipe(self.config.classifier, self.config.sampling.fill_to),
            "kept": kept_name(self.config.filtering.keep),
        }
        return self._get(
            self._classifier_stage(),
            config,
            data=self.data(),
            samples=self.generate(),
            types=self.type_samples(),
        )

    def _classifier_stage(self) -> Stage:
        return Stage("classifier", build_classifier, chosen=_choices(self.config.classifier))

    def train_on_synthetic(self) -> Artifact:
        """The final classifier on the real images and those of synthetic(), which weigh omega."""
        synthetic, fill_to = self.config.synthetic, self.config.sampling.fill_to
        to_largest = fill_to == 0 or fill_to == self.class_counts().max()
        if synthetic.source == "diffult" and to_largest:
            # the same images by another way, trained once
            unfiltered = {} if synthetic.filtered else {"filtering.keep": "all"}
            return self.vary(unfiltered).train_classifier()
        config = {**self._recipe(self.config.classifier, 0), "kept": None}
        inputs = {"data": self.data(), "samples": self.synthetic()}
        return self._get(self._classifier_stage(), config, **inputs)

    def train_on_real(self) -> Artifact:
        """The final classifier's recipe and method on the real images alone, for as long as phi_0:
        as many steps, or epochs of the real images."""
        length = ("n_steps", "epochs", "warmup_steps", "warmup_epochs")
        kept = (*length, "omega")  # omega is of no use here
        change = {name: getattr(self.config.extractor, name) for name in kept}
        return self._train_on_real(self.config.classifier.model_copy(update=change))

    def _train_on_real(self, recipe: ClassifierConfig) -> Artifact:
        stage = Stage("extractor", build_extractor, chosen=_choices(recipe))
        return self._get(stage, self._recipe(recipe, None), data=self.data())

    def _recipe(self, recipe: ClassifierConfig, fill_to: int | None) -> dict:
        settings = self._in_steps(recipe, fill_to).settings()
        config = {"classifier": settings, "seed": self.config.seed}
        return config | ({"path": self.config.data.path} if recipe.crop_size else {})

    def train_sau(self) -> Artifact:
        """SAU on the real images and those of synthetic()."""
        inputs = {"data": self.data(), "synthetic": self.synthetic()}
        if self.config.sau.prototypes == "second draw":
            inputs["pool"] = self.balanced("the authors' second draw of prototypes").data()
        recipe = self._in_steps(self.config.sau, 0).settings()
        of_images = recipe.pop("norm_statistics") == "images"
        stage = Stage("sau", build_sau, chosen=_parts(self.config.sau))
        trained = self._get(stage, {"sau": recipe, "seed": self.config.seed}, **inputs)
        if not of_images:
            return trained
        config = {name: recipe[name] for name in ("batch_size", "precision")}
        config["seed"], network = self.config.seed, {_BACKBONES: self.config.sau.arch}
        stage = Stage("statistics", renew_statistics, chosen=network)
        inputs = {"data": inputs["data"], "synthetic": inputs["synthetic"], "sau": trained}
        return self._get(stage, config, **inputs)

    def balanced(self, what: str) -> "Pipeline":
        """The same data without the cut to a long tail."""
        if not self.has_oracle:
            raise ValueError(
                f"{what}: needs the images that the long tail leaves out, and {self.config.data.name} "
                "has none; use the digits or CIFAR, or cut it (--set n_max=N --set imb_ratio=R)"
            )
        return self.vary({"data.imb_ratio": 1.0})

    def train_oracle(self) -> Artifact:
        """A classifier on balanced data, for reporting the class agreement of generated images.
        Never used for training."""
        return self.balanced("the oracle").train_extractor()

    @property
    def has_oracle(self) -> bool:
        """Whether there are balanced data to train it on; image files have them where each class has
        the n_max images that the cut to a long tail begins with."""
        data, seed = self.config.data, self.config.draw
        if not data.from_files or None in (data.n_max, data.imb_ratio):
            return not data.from_files
        root = in_data_dir(data.path, self.store.context.data_dir)
        name = f"training images of {root}, seed {seed}"
        return min(self._source(name, lambda: training_counts(root, data, seed))) >= data.n_max

    def _dump(self, part: str) -> dict:
        return getattr(self.config, part).model_dump(mode="json")

    def _get(self, stage: Stage, config: dict, **inputs: Artifact) -> Artifact:
        artifact = self.store.get(stage, config, inputs)
        self.used[f"{stage.name}/{artifact.key}"] = artifact
        return artifact


@functools.cache
def _check_network(preset: str, image_size: int) -> None:
    """Raise ValueError where a generator of that preset cannot draw images of that size."""
    with torch.device("meta"):
        make_unet(preset, 1, image_size, 1)


def _stretched(recipe: TrainingConfig, part: float, name: str) -> dict[str, int]:
    """Changes that give the training called name so large a part of a recipe's length in steps."""
    return {
        f"{name}.n_steps": max(1, round(part * recipe.n_steps)),
        f"{name}.warmup_steps": round(part * recipe.warmup_steps),
    }


def _parts(recipe: TrainingConfig) -> dict:
    """The network and the policies that a training's code depends on."""
    policies = tuple(sorted({recipe.policy, recipe.second_policy}))
    return {_BACKBONES: recipe.arch, _POLICIES: policies}


def _choices(recipe: ClassifierConfig) -> dict:
    """The same, and its method."""
    return {_OBJECTIVES: recipe.method, **_parts(recipe)}
