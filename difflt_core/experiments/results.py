"""What is measured of a variant, and an experiment: declared variants, one long frame of results."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from ..config import RunConfig, vary
from ..data.long_tail import load_split, shot_groups
from ..data.sources import in_data_dir
from ..engine.artifacts import Artifact
from ..engine.scheduler import Planner
from ..generation.quality import Quality
from ..profiles import unknown
from ..recognition.accuracy import group_accuracy
from ..recognition.classifier import load_classifier, logits_split, predict
from ..selection.sample_types import TYPES, kept_name
from .pipeline import Pipeline

__all__ = [
    "MEASURES",
    "Experiment",
    "Variant",
    "accuracy",
    "agreement",
    "agreement_by_image",
    "agreement_by_type",
    "at_ratios",
    "build_together",
    "generated",
    "features_of_class",
    "group_rule",
    "kept",
    "logits",
    "noise_share",
    "on_network_of_sau",
    "predictions",
    "type_shares",
    "wide",
    "wide_of_ratios",
]


def predictions(p: Pipeline, artifact: Artifact, split: str = "test") -> np.ndarray:
    """Classes int64 (N,) that a trained classifier gives the images of val or test."""
    return logits(p, artifact, split).argmax(axis=1)


def logits(p: Pipeline, artifact: Artifact, split: str = "test") -> np.ndarray:
    """Logits float32 (N, K) that a trained classifier gives the images of val or test."""
    context = p.store.context
    root = in_data_dir(p.config.data.path, context.data_dir)
    return logits_split(artifact, load_split(p.data(), split), root, context)


def accuracy(p: Pipeline, artifact: Artifact, split: str = "test") -> dict[str, float]:
    """Accuracy in % of a trained classifier on val or test: overall, many, medium, few."""
    data, d = p.data(), p.config.data
    labels, counts = load_split(data, split).labels, load_split(data, "train").class_counts
    predicted = predictions(p, artifact, split)
    return group_accuracy(predicted, labels, counts, d.many_above, d.few_below)


def agreement_by_image(p: Pipeline) -> np.ndarray:
    """1.0 where the oracle puts a generated image into the class it was generated for, else 0.0;
    nan without an oracle. float (N_gen,)."""
    samples = p.generate()
    labels = np.asarray(samples.array("labels"))
    if not p.has_oracle:
        return np.full(len(labels), np.nan)
    oracle = load_classifier(p.train_oracle(), p.store.context.device_here)
    return (predict(oracle, samples.array("images")) == labels).astype(float)


def agreement(p: Pipeline) -> float:
    """Share in % of generated images that the oracle puts into the class they were generated
    for."""
    right = agreement_by_image(p)
    return 100 * float(right.mean()) if len(right) else float("nan")


def type_shares(p: Pipeline) -> dict[str, float]:
    """Share of each sample type among the generated images, in %."""
    counts = np.array(p.type_samples().json("info")["counts"])
    return dict(zip(TYPES, (100 * counts / max(1, counts.sum())).tolist(), strict=True))


def noise_share(p: Pipeline) -> float:
    """Share in % of the synthetic images that counted as noise in SAU's whole training; nan without
    the synthetic-aware branch."""
    if p.config.sau.branches == "unaware":
        return float("nan")
    curve = p.train_sau().array("loss")  # (n_steps, 4), at last noisy and synthetic images
    return 100 * curve[:, 2].sum() / max(1, curve[:, 3].sum())


def on_network_of_sau(config: RunConfig) -> RunConfig:
    """The configuration whose classifiers have SAU's network, so that a table beside SAU is of one."""
    return vary(config, {f"classifier.{k}": getattr(config.sau, k) for k in ("arch", "width")})


def kept(p: Pipeline) -> np.ndarray:
    """Indices int64 of the generated images that the rule filtering.keep leaves."""
    return np.asarray(p.type_samples().array(kept_name(p.config.filtering.keep)))


def generated(p: Pipeline) -> pd.DataFrame:
    """The generated images, a row for each in their order: label (0..K-1, the class it is made for), d
    (distance to the centre of that class, in class radii), type (of TYPES), kept (by filtering.keep)."""
    typed = p.type_samples()
    labels, d = np.asarray(p.generate().array("labels")), np.asarray(typed.array("d"))
    types = np.array(TYPES)[np.asarray(typed.array("type"))]
    mine = np.isin(np.arange(len(labels)), kept(p))
    return pd.DataFrame({"label": labels, "d": d, "type": types, "kept": mine})


def agreement_by_type(p: Pipeline) -> pd.DataFrame:
    """Generated images by the class they are made for, few-shot or not, and by type: their number, and
    the share in % that the oracle puts into that class (nan for none). A row for each pair, with the
    columns made for, type, images, agreement."""
    images, d = generated(p).assign(right=agreement_by_image(p)), p.config.data
    counts = load_split(p.data(), "train").class_counts
    few = images["label"].isin(shot_groups(counts, d.many_above, d.few_below)["few"])
    rows = []
    for group, member in (("few-shot classes", few), ("other classes", ~few)):
        for name in TYPES:
            right = images["right"][member & (images["type"] == name)]
            rows.append((group, name, len(right), 100 * right.mean() if len(right) else np.nan))
    return pd.DataFrame(rows, columns=["made for", "type", "images", "agreement"])


def features_of_class(p: Pipeline, c: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """phi_0's features float32 (M, D) and the types int8 (M,), indices into TYPES, of the first n
    images that are generated for class c; M <= n."""
    rows = np.flatnonzero(np.asarray(p.generate().array("labels")) == c)[:n]
    return tuple(np.asarray(p.type_samples().array(name)[rows]) for name in ("features", "type"))


def group_rule(p: Pipeline) -> str:
    """The rule of the shot groups in words, for every table that uses them."""
    many, few = p.config.data.many_above, p.config.data.few_below
    rule = f"Many: n > {many} training images, medium: {few} to {many}, few: n < {few}."
    test = load_split(p.data(), "test")
    untested = [n for n, k in zip(test.class_names, test.class_counts, strict=True) if not k]
    sizes = test.class_counts[test.class_counts > 0]
    if len(set(sizes.tolist())) > 1:
        rule += (
            f" Test images of a class: {sizes.min()} to {sizes.max()}; overall counts each alike."
        )
    if not untested:
        return rule
    return f"{rule} Without test images, so in no group: {', '.join(untested)}."


@dataclass(frozen=True)
class Variant:
    """Changes of the configuration, and the method of Pipeline that trains the classifier to be
    tested: "train_classifier" (real and generated images), "train_on_real", "train_extractor" (phi_0,
    plain cross-entropy), "train_on_synthetic" or "train_sau"; or "type_samples", where images are
    measured and no classifier. seeds: of these alone, where a variant is too dear for all; None is
    all of the experiment's."""

    changes: dict = field(default_factory=dict)
    trained: str = "train_classifier"
    seeds: tuple[int, ...] | None = None

    @property
    def generates(self) -> bool:
        """Whether it has generated images to be measured."""
        return self.trained not in ("train_on_real", "train_extractor")


class Experiment:
    """Declared variants, each on every seed.

    Args:
        pipeline: whose configuration is varied.
        variants: by name, a Variant, or its changes where the final classifier is tested.
        seeds: repeats; None is config.seeds.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        variants: dict[str, Variant | dict],
        seeds: Iterable[int] | None = None,
    ):
        self.pipeline = pipeline
        self.variants = {
            name: v if isinstance(v, Variant) else Variant(v) for name, v in variants.items()
        }
        self.seeds = tuple(pipeline.config.seeds if seeds is None else seeds)

    def plan(self) -> list[tuple[int, str, Variant]]:
        """Every seed, and the variants that it has."""
        each = self.variants.items()
        return [(s, n, v) for s in self.seeds for n, v in each if v.seeds is None or s in v.seeds]

    def at(self, name: str, seed: int) -> Pipeline:
        """The pipeline of a variant and a seed."""
        return self.pipeline.vary({"seed": seed, **self.variants[name].changes})

    def build(self, *measures: str) -> "Experiment":
        """Train what the measures of all variants need, side by side, and return the experiment."""
        build_together([self], *measures)
        return self

    def frame(self, *measures: str) -> pd.DataFrame:
        """One row per variant, seed and metric: the columns variant, seed, metric, value.

        Args:
            measures: of MEASURES. A variant without generated images has none of those that measure
                them.
        """
        self.build(*measures)
        quality, rows = Quality(self.pipeline), []
        for seed, name, variant in self.plan():
            p = self.at(name, seed)
            for measure in measures:
                if MEASURES[measure].of_images and not variant.generates:
                    continue
                found = MEASURES[measure].take(p, variant, quality)
                rows += [(name, seed, metric, value) for metric, value in found.items()]
        return pd.DataFrame(rows, columns=["variant", "seed", "metric", "value"])


def build_together(experiments: Iterable[Experiment], *measures: str) -> None:
    """Train what the measures of all variants of several experiments, of one store, need, side by
    side."""
    experiments = list(experiments)
    extra = sorted({stage for m in measures for stage in MEASURES[m].stages})
    for experiment in experiments if "quality" in measures else ():
        Quality(experiment.pipeline).check()
    planner = Planner(experiments[0].pipeline.store)
    for experiment in experiments:
        for seed, name, variant in experiment.plan():
            stages = (variant.trained, *(extra if variant.generates else ()))
            experiment.at(name, seed).plan(planner, stages)
    planner.run()


def given_ratios(ratios: Iterable[float] | None, config: RunConfig) -> list[float] | None:
    """The ratios that somebody asked a notebook for, before anything is trained.

    Raises:
        ValueError: something else than numbers >= 1, one that the largest class is too small for, or
            data that are not cut.
    """
    if ratios is None:
        return None
    if config.data.imb_ratio is None:
        raise ValueError(
            f"ratios: these data are taken as they are, got {ratios!r}; leave ratios out, or cut the "
            "data (imb_ratio=50)"
        )
    try:
        found = [float(r) for r in ratios]
    except (TypeError, ValueError):
        found = []
    if not found or min(found) < 1 or isinstance(ratios, str):
        raise ValueError(f"ratios: expected a list of numbers >= 1, as [100, 10], got {ratios!r}")
    for r in found:
        vary(config, {"data.imb_ratio": r})
    return found


def given_variants(names: Sequence[str] | None, variants: dict[str, Variant]) -> dict[str, Variant]:
    """Those of a table's rows that somebody asked a notebook for, in their order; all for None.

    Raises:
        ValueError: something else than a list of some of them.
    """
    if names is None:
        return variants
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"variants: expected a list of names, got {names!r}")
    for name in names:
        if name not in variants:
            raise ValueError(unknown("variant", name, variants))
    return {name: v for name, v in variants.items() if name in set(names)}


def at_ratios(
    pipeline: Pipeline, variants: dict[str, Variant | dict], ratios: Iterable[float] | None = None
) -> dict[str, Experiment]:
    """The same variants at several ratios r of the largest class to the smallest: an experiment each, by
    the ratio in words, the configuration's own first.

    Args:
        ratios: beside the own one. None is 100, 50, 10 for CIFAR as it is, a fifth of the own one for
            the digits, and no other for other data. Data that are as they are have no other. On the
            digits the others have the first seed alone.
    """
    config = pipeline.config
    own, digits = config.data.imb_ratio, config.data.name == "digits"
    if own is None:
        return {"as it is": Experiment(pipeline, variants)}
    usual: list[float] = []
    if config.data.name.startswith("cifar") and not config.data.is_small:
        usual = [100, 50, 10]
    elif digits:
        usual = [max(1.0, own / 5)]
    others = usual if ratios is None else ratios
    return {
        f"{r:g}": Experiment(
            pipeline.vary({"data.imb_ratio": r}),
            variants,
            config.seeds[:1] if digits and r != own else None,
        )
        for r in dict.fromkeys([own, *others])
    }


def wide_of_ratios(
    by_ratio: dict[str, Experiment], *measures: str, by: str = "variant"
) -> pd.DataFrame:
    """wide() of each ratio's experiment, one below the other, the ratio as the column r."""
    build_together(by_ratio.values(), *measures)
    frames = []
    for r, experiment in by_ratio.items():
        frame = wide(experiment.frame(*measures), by)
        frame.insert(0, "r", r)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def wide(frame: pd.DataFrame, by: str = "variant") -> pd.DataFrame:
    """A long frame with a row per variant and seed, in their order, and a column per metric; the
    column of names is called `by`."""
    order = list(dict.fromkeys(frame["metric"]))
    index = frame[["variant", "seed"]].drop_duplicates()
    values = frame.set_index(["variant", "seed", "metric"])["value"].unstack("metric")[order]
    found = index.merge(values, left_on=["variant", "seed"], right_index=True)
    found.columns.name = None
    return found.rename(columns={"variant": by}).reset_index(drop=True)


@dataclass(frozen=True)
class _Measure:
    """take: of (pipeline, variant, quality) to numbers by metric. of_images: it measures generated
    images. stages: what it needs beside the classifier."""

    take: Callable[[Pipeline, Variant, Quality], dict]
    of_images: bool = True
    stages: tuple[str, ...] = ()


def _accuracy(p: Pipeline, variant: Variant, _quality) -> dict:
    return accuracy(p, getattr(p, variant.trained)())


def _copies(p: Pipeline, _variant, quality: Quality) -> dict:
    """Share of generated images as near to a training image as copies are, and what new images
    like the held-out ones would have of them."""
    found = quality.memorisation(p)
    return {"copies %": found.share, "copies % of new images": found.expected}


MEASURES: dict[str, _Measure] = {
    "accuracy": _Measure(_accuracy, of_images=False),
    "agreement": _Measure(lambda p, *_: {"agreement": agreement(p)}, stages=("train_oracle",)),
    "types": _Measure(lambda p, *_: type_shares(p)),
    "noise": _Measure(
        lambda p, variant, _: {
            "noise": noise_share(p) if variant.trained == "train_sau" else float("nan")
        },
        of_images=False,
    ),
    "kept": _Measure(lambda p, *_: {"kept": len(kept(p))}),
    "generated": _Measure(lambda p, *_: {"generated": len(p.generate().array("labels"))}),
    "quality": _Measure(lambda p, _, quality: quality.scores(p), stages=("quality_samples",)),
    "copies": _Measure(_copies, stages=("quality_samples",)),
}
